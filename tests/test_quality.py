"""Quality without labels: both figures on features whose answer is known, and where they stand."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import data
import eval_linear
import train
from data import Augment
from models import encoder_of
from plumbing import quality as module
from plumbing.command_line import flag
from plumbing.features import eval_side, ready
from plumbing.files import Images
from plumbing.layout import layout
from plumbing.quality import effective_rank, quality, recovered
from plumbing.runs import draw_progress, read_checkpoint


def orthogonal(count: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(count, count, generator=torch.Generator().manual_seed(0)).double())[0]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_effective_rank_counts_directions_of_equal_size(rank):
    values = torch.zeros(8).double()
    values[:rank] = 5.0
    features = orthogonal(20)[:, :8] @ values.diag() @ orthogonal(8)
    assert effective_rank(features) == pytest.approx(rank, abs=1e-6)


def test_the_effective_rank_is_exp_of_an_entropy():
    features = orthogonal(6)[:, :2] @ torch.tensor([3.0, 1.0]).double().diag() @ orthogonal(2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(features) == pytest.approx(math.exp(entropy), abs=1e-6)
    assert effective_rank(100 * features) == pytest.approx(math.exp(entropy), abs=1e-6), "length does not count"


def test_features_that_are_all_alike_have_rank_one_and_recover_nothing():
    features = torch.ones(50, 16)
    assert effective_rank(features) == pytest.approx(1, abs=1e-4)
    assert recovered(features, features) <= 1 / 50


def test_a_second_view_that_resembles_its_own_first_view_finds_it():
    first = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    second = first.clone()
    assert recovered(first, 3 * second) == 1
    second[:30] = second[:30].roll(1, 0)  # these resemble another picture
    assert recovered(first, second) == pytest.approx(0.7)


# -------------------------------------------------------------------------- of encoder and images


class Pixels(torch.nn.Module):
    """An encoder whose features are the pixels."""

    def features(self, x):
        return x.flatten(1)


class Constant(Pixels):
    def features(self, x):
        return torch.ones(len(x), 8)


def images(count, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Images(torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator), side=side)


SETTINGS = {"size": 16, "eval_size": 16, "arch": "resnet10"}
CPU = torch.device("cpu")
STILL = Augment(16, scale=(1, 1), ratio=(1, 1), jitter=(0, 0, 0, 0), gray_p=0, flip_p=0)


def test_features_that_know_a_picture_recover_it_and_constant_ones_do_not():
    shown = images(300)
    assert quality(Pixels(), shown, SETTINGS, STILL, CPU)["recovered"] == 1
    figures = quality(Constant(), shown, SETTINGS, Augment(16), CPU)
    assert figures["recovered"] <= 1 / 300 and figures["rank"] == pytest.approx(1, abs=1e-3)
    hard = quality(Pixels(), shown, SETTINGS, Augment(16), CPU)["recovered"]
    assert hard < 0.9, "views that differ are harder"


def test_at_most_a_thousand_images_count_and_fewer_than_ten_give_no_figures(monkeypatch):
    assert quality(Pixels(), images(9), SETTINGS, STILL, CPU) == {}
    assert quality(Pixels(), images(10), SETTINGS, STILL, CPU)["recovered"] == 1
    monkeypatch.setattr(module, "MOST", 20)
    assert quality(Pixels(), images(500), SETTINGS, STILL, CPU)["rank"] <= 20


def test_a_look_draws_the_same_views_every_time_and_disturbs_nothing():
    encoder = encoder_of(TINY | {"seed": 0, "layers": 2})
    encoder.train()
    before, state = {k: v.clone() for k, v in encoder.state_dict().items()}, torch.get_rng_state()
    first = quality(encoder, images(50), SETTINGS, Augment(16), CPU)
    assert torch.equal(torch.get_rng_state(), state) and encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    torch.manual_seed(7)
    assert quality(encoder, images(50), SETTINGS, Augment(16), CPU) == first


# --------------------------------------------------------------------------- pictures kept aside


def listed(count, folder=""):
    return [f"{folder}{i:05d}.jpg" for i in range(count)]


@pytest.mark.parametrize("folder", ["", "photos/", "train/", "train/only/"])
def test_of_a_folder_without_labels_a_tenth_is_kept_and_the_line_says_so(folder):
    shown = layout(listed(3000, folder))
    assert 230 < len(shown.test) < 370 and len(shown.train) + len(shown.test) == 3000
    assert not {*shown.train} & {*shown.test} and {label for _, label in shown.test} == {None}
    assert f"{len(shown.test)} of them kept to judge features by" in shown.said and shown.lacks


def test_few_pictures_all_train_and_of_many_a_thousand_are_kept():
    few = layout(listed(199))
    assert not few.test and len(few.train) == 199 and "kept" not in few.said
    assert layout(listed(200)).test and len(layout(listed(15_000)).test) == 1000


def test_pictures_that_come_or_go_move_few_others():
    before = {*layout(listed(3000)).test}
    assert {*layout(listed(3500)).test} >= before and {*layout(listed(2500)).test} <= before
    many, more = ({*layout(listed(n)).test} for n in (15_000, 15_500))
    assert len(many - more) < 60, "beyond a thousand, as many leave as come"


def test_with_labels_nobody_is_kept_aside():
    shown = layout(listed(300, "train/a/") + listed(300, "train/b/"))
    assert not shown.test and len(shown.train) == 600


# ------------------------------------------------------------------------------- where it is told


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """A folder of 240 drawn pictures without labels, and a run on it, with what it printed."""
    root = tmp_path_factory.mktemp("blind")
    drawn, _ = data.folders.shapes.draw(240, 0, size=16)
    (root / "pictures").mkdir()
    for i, image in enumerate(drawn):
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(root / "pictures" / f"{i}.png")
    settings = TINY | {"data_dir": root / "pictures", "out": root / "run", "epochs": 3, "knn_every": 2}
    return root, [word for name, value in settings.items() for word in (flag(name), str(value))]


@pytest.fixture(scope="module")
def run(blind):
    from contextlib import redirect_stdout
    from io import StringIO

    root, line = blind
    with redirect_stdout(StringIO()) as printed:
        assert train.main(line) == 0
    return root / "run", printed.getvalue().splitlines()


def test_a_run_without_labels_notes_both_figures_where_a_look_is_due_and_at_the_end(run):
    home, printed = run
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    assert ["recovered" in row for row in rows] == [False, True, True]
    held = int(re.search(r"(\d+) of them kept to judge", "\n".join(printed))[1])
    last = rows[-1]
    assert held >= 10 and 1 / held <= last["recovered"] <= 1 and 1 <= last["rank"] <= held
    assert printed[-2].endswith(
        f"a second view finds its own picture in {last['recovered']:.1%} of the cases, "
        f"effective rank {last['rank']:.1f}"
    )


def test_the_figures_are_those_of_the_kept_pictures(run, blind):
    home, _ = run
    checkpoint = read_checkpoint(home)
    encoder = encoder_of(checkpoint["config"])
    encoder.load_state_dict(checkpoint["encoder"])
    held = data.load("folder", blind[0] / "pictures", size=16).test
    figures = quality(encoder, held, checkpoint["config"], Augment(16), CPU)
    assert {name: checkpoint["history"][-1][name] for name in figures} == pytest.approx(figures)


def test_no_kept_picture_has_trained(run, blind):
    from plumbing.fingerprints import among

    dataset = data.load("folder", blind[0] / "pictures", size=16)
    checkpoint = read_checkpoint(run[0])
    assert not among(checkpoint["images"], dataset.test).any() and among(checkpoint["images"], dataset.train).all()


def test_an_evaluation_without_labels_tells_both_figures_next_to_the_untrained_network(
    blind, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("plumbing.features.pick_precision", lambda *_: "fp32")  # the run's, also where bf16 is fast
    home, _ = run
    assert eval_linear.main([str(home), "--json", str(tmp_path / "e.json")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "e.json").read_text())
    history = read_checkpoint(home)["history"]
    for name in ("recovered", "rank"):
        assert written["trained"][name] == pytest.approx(history[-1][name])
    dataset, config = data.load("folder", blind[0] / "pictures", size=16), read_checkpoint(home)["config"]
    untrained = encoder_of(config)
    ready(untrained, CPU, dataset.train, eval_side(config, dataset.test))
    assert written["untrained"] == pytest.approx(quality(untrained, dataset.test, config, Augment(16), CPU))
    assert written["untrained"]["rank"] != written["trained"]["rank"]
    assert re.search(r"no labels \(no class folders\): judged by \d+ pictures that did not train", printed)
    for name in ("trained", "untrained"):
        row = f"{100 * written[name]['recovered']:.1f} +{written[name]['rank']:.1f}"
        assert re.search(rf"^{name} +{row}$", printed, re.M)
    assert re.search(rf"^guessing +{100 / len(dataset.test):.1f}$", printed, re.M)
    assert written["cautions"] == [] and "caution" not in printed


def test_other_pictures_without_labels_can_judge_a_run(run, blind, tmp_path, capsys):
    (tmp_path / "again").mkdir()
    for path in (blind[0] / "pictures").iterdir():
        (tmp_path / "again" / f"x{path.name}").write_bytes(path.read_bytes())  # other names: others are kept
    assert eval_linear.main([str(run[0]), "--data-dir", str(tmp_path / "again"), "--size", "20"]) == 0
    printed = capsys.readouterr().out
    assert "judged by" in printed and "caution" not in printed


def test_pictures_that_were_too_few_to_keep_any_are_said_to_have_trained(blind, tmp_path, capsys):
    root, line = blind
    (tmp_path / "few").mkdir()
    files = sorted((root / "pictures").iterdir())
    for path in files[:190]:
        (tmp_path / "few" / path.name).write_bytes(path.read_bytes())
    shorter = ["--data-dir", str(tmp_path / "few"), "--out", str(tmp_path / "run"), "--epochs", "1"]
    assert train.main([*line, *shorter]) == 0
    assert "kept to judge" not in capsys.readouterr().out
    for path in files[190:]:
        (tmp_path / "few" / path.name).write_bytes(path.read_bytes())
    assert eval_linear.main([str(tmp_path / "run")]) == 0
    assert re.search(r"caution: \d+ of the \d+ test images were trained on without labels", capsys.readouterr().out)


def test_too_few_pictures_are_refused_with_the_reason(run, tmp_path, capsys):
    for i in range(50):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    assert eval_linear.main([str(run[0]), "--data-dir", str(tmp_path)]) == 2
    assert "no labels to evaluate with: no class folders" in capsys.readouterr().err


def test_protocols_that_need_labels_refuse_pictures_without(run, capsys):
    from lab.evaluate import main

    assert main([str(run[0]), "--few-labels"]) == 2
    assert "no labels to evaluate with" in capsys.readouterr().err
    assert main([str(run[0])]) == 0
    assert "effective rank" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("recovered", "rank"), ("knn",), ()])
def test_the_picture_of_a_run_shows_what_was_looked_at(tmp_path, monkeypatch, names):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    monkeypatch.setattr("plumbing.runs.replacing", lambda path, name: open(tmp_path / "p.png", "wb"))
    values = {"recovered": 0.25, "rank": 7.0, "knn": 0.5}
    row = {"epoch": 1, "nce": 2.0, "loss": 2.0} | {name: values[name] for name in names}
    draw_progress([row, {"epoch": 2, "nce": 1.0, "loss": 1.0}], 100, tmp_path / "p.png")
    axes = drawn[0].axes[1:]
    shown = [line.get_ydata().tolist() for axis in axes for line in axis.get_lines()]
    assert shown == {("recovered", "rank"): [[25.0], [7.0]], ("knn",): [[50.0]], (): [[]]}[names]


def test_the_page_shows_both_curves_and_both_figures(run, tmp_path):
    from figures import page

    home, _ = run
    rows = read_checkpoint(home)["history"]
    pictures = page.curves(rows, 96)["pictures"]
    assert "recovered: " in pictures and "effective rank: " in pictures
    measured = {"trained": {"recovered": 0.5, "rank": 9.0}, "untrained": {"recovered": 0.25, "rank": 3.0}}
    checkpoint, file = read_checkpoint(home), tmp_path / "eval.json"
    file.write_text(json.dumps(measured | {"config": checkpoint["config"], "date": "2024-01-01"}))
    assert page.curves(rows, 96)["looks"] == page.BLIND == page.accuracy(file, checkpoint)["ways"]
    table = page.accuracy(file, checkpoint)["table"]
    assert "50.0" in table and "25.0" in table and "9.0" in table and "raw" not in table


def test_a_quick_knn_asks_no_more_neighbours_than_the_smallest_class_allows(monkeypatch):
    """One picture of class 1 in training: with k = 20 it could not win a vote."""
    drawn = torch.zeros(31, 3, 16, 16, dtype=torch.uint8)
    drawn[30] += 255
    labels = torch.tensor([0] * 30 + [1])
    known = Images(drawn, labels=labels, side=16)
    dataset = data.Dataset(known, known, known.take(torch.tensor([0, 30])), ("a", "b"))
    monkeypatch.setattr(eval_linear, "extract", lambda encoder, images, *_: images.pixels.flatten(1).float() - 127)
    assert eval_linear.knn_monitor(None, dataset, SETTINGS, CPU) == 1.0
