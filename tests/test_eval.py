"""The evaluation: kNN, linear probe, controls, export, and what it refuses."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, UNTRAINED
from torch import nn

import data
import eval_linear as program
import train
from eval_linear import eval_side, evaluate, knn, linear_probe
from models import Encoder, encoder_of
from plumbing.command_line import Parser
from plumbing.evaluation import accuracy_table, evaluation_options
from plumbing.features import extract, random_images, raw_pixels, settle_batchnorm
from plumbing.files import Images
from plumbing.image_ops import whole_image
from plumbing.runs import read_checkpoint, save_tensors

CPU, ROOT = torch.device("cpu"), Path(__file__).parent.parent


def clusters(count=200, classes=4, dim=10, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


def parse(line):
    return evaluation_options(Parser(), data.DATASETS).parse_args(line)


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A short finished run on the drawn pictures."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train.train(train.Config(**(TINY | {"data_dir": str(pictures), "out": str(out), "epochs": 1})))
    return out


# ------------------------------------------------------------------------------------------- probes


def test_knn_is_a_vote_weighted_by_the_exponential_of_the_cosine():
    train_features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[10.0, 0.0]])  # cosines 1, .8, .8
    vote = lambda t, k=3: knn(train_features, labels, query, torch.tensor([0]), k, t)  # noqa: E731
    assert vote(0.1) == 1.0, "exp(10) against 2 exp(8)"
    assert vote(1.0) == 0.0, "exp(1) against 2 exp(.8)"
    assert vote(1.0, k=1) == 1.0
    assert vote(0.1, k=200) == 1.0, "k is at most the number of training features"


def test_knn_and_linear_probe_find_clusters_and_find_nothing_in_noise():
    x, y = clusters()
    test_x, test_y = clusters(seed=1)
    assert knn(x, y, test_x, test_y, k=20) > 0.98 and linear_probe(x, y, test_x, test_y) > 0.98
    noise, other = torch.randn(400, 10), torch.randn(400, 10)
    labels = torch.arange(400) % 4
    assert 0.1 < knn(noise, labels, other, labels, 20) < 0.4 and 0.1 < linear_probe(noise, labels, other, labels) < 0.4


def test_linear_probe_does_not_care_about_scale_and_shift_of_a_feature():
    x, y = clusters(spread=1.5)
    test_x, test_y = clusters(spread=1.5, seed=1)
    scale, shift = torch.logspace(-3, 3, 10), torch.linspace(-50, 50, 10)
    plain, moved = (linear_probe(f(x), y, f(test_x), test_y) for f in (lambda v: v, lambda v: v * scale + shift))
    assert abs(plain - moved) <= 0.02
    assert plain > 0.6


def test_linear_probe_agrees_with_a_penalised_regression_fitted_by_hand():
    x, y = clusters(spread=1.0)
    x = (x - x.mean(0)) / x.std(0)
    head = program._fit(x, y, 4, 0.01)
    loss = F.cross_entropy(head(x), y) + 0.005 * head.weight.square().sum()
    gradients = torch.autograd.grad(loss, head.parameters())
    assert max(g.abs().max() for g in gradients) < 1e-3, "the fit has converged"


def test_linear_probe_is_saved_by_its_penalty_where_features_outnumber_images(monkeypatch):
    signal, y = clusters(120, spread=1.0)
    test_signal, test_y = clusters(400, spread=1.0, seed=1)
    x, test_x = torch.cat([signal, torch.randn(120, 300)], 1), torch.cat([test_signal, torch.randn(400, 300)], 1)
    chosen = linear_probe(x, y, test_x, test_y)
    monkeypatch.setattr(program, "STRENGTHS", (1e-9,) * 3)
    assert chosen > linear_probe(x, y, test_x, test_y) and chosen > 0.7


def test_a_class_that_is_rare_or_missing_in_a_tenth_ends_no_probe():
    """111 classes with one image each: whichever tenth is held out, some classes are only there."""
    x, y = torch.randn(111, 8), torch.arange(111)
    assert 0 <= linear_probe(x, y, x, y) <= 1


# ----------------------------------------------------------------------------------------- features


def test_features_are_frozen_whole_image_and_in_evaluation_mode(run, pictures):
    checkpoint = read_checkpoint(run)
    encoder = encoder_of(checkpoint["config"])
    images = Images(torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8), side=16)
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.train()
    features = extract(encoder, images, 16, CPU)
    assert features.shape == (7, encoder.feature_dim) and not features.requires_grad and encoder.training
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    torch.testing.assert_close(
        extract(encoder, images.take(torch.tensor([3])), 16, CPU)[0], features[3], rtol=1e-4, atol=1e-5
    )


def test_the_untrained_control_has_the_weights_of_before_the_first_step_and_fair_statistics(run, pictures):
    config = read_checkpoint(run)["config"]
    encoder, again = encoder_of(config), encoder_of(config)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters()))
    images = Images(torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8), side=16)
    settle_batchnorm(encoder, images, 16, CPU)
    x = whole_image(images.pixels, 16)
    assert encoder.backbone.bn1.momentum == 0.1, "fine-tuning starts from the usual setting"
    activations = encoder.backbone.conv1(x)
    torch.testing.assert_close(
        encoder.backbone.bn1.running_mean, activations.mean((0, 2, 3)).detach(), rtol=1e-3, atol=1e-4
    )
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("size", "side", "arch", "expected"),
    [(24, 32, "resnet10", 32), (32, 32, "resnet10", 32), (24, 96, "resnet10", 32), (24, 16, "resnet10", 24),
     (224, 256, "resnet18", 256), (24, 32, "vit_tiny", 24)],
)  # fmt: skip
def test_images_are_shown_whole_and_up_to_a_third_larger_than_the_views(size, side, arch, expected):
    images = Images(torch.zeros(1, 3, side, side, dtype=torch.uint8), side=side)
    assert eval_side({"size": size, "eval_size": 0, "arch": arch}, images) == expected
    assert eval_side({"size": size, "eval_size": 40, "arch": arch}, images) == 40


def test_random_images_are_always_the_same_and_never_more_than_there_are():
    images = Images(torch.zeros(50, 3, 8, 8, dtype=torch.uint8))
    few, again = random_images(images, 10), random_images(images, 10)
    assert torch.equal(few, again) and len(few.unique()) == 10 and few.sort().values.tolist() != list(range(10))
    assert random_images(images, 80).sort().values.tolist() == list(range(50))


def test_raw_pixels_are_the_normalised_image_at_32_pixels_at_most():
    images = Images(torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8), side=48)
    assert raw_pixels(images, 48).shape == (3, 3 * 32 * 32) and raw_pixels(images, 16).shape == (3, 3 * 16 * 16)


# --------------------------------------------------------------------------------------- everything


def test_the_command_prints_a_table_and_writes_fractions_beside_both_controls(run, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert program.main([str(run), "--json", str(file), "--k", "20"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(file.read_text())
    for name in ("trained", "untrained", "raw"):
        row = figures[name]
        assert set(row) == {"knn", "linear"}
        assert all(0 <= v <= 1 for v in row.values())
        assert f"{100 * row['knn']:.1f}" in printed and name in printed
    assert "96 labelled and 40 test images" in printed
    assert figures["k"] == 20 and figures["config"]["arch"] == "resnet10" and figures["date"] and figures["hardware"]


def test_the_same_checkpoint_gives_the_same_figures(run):
    args = parse([str(run)])
    checkpoint = read_checkpoint(run)
    dataset = program.load_for(checkpoint["config"], args)
    first, second = (evaluate(checkpoint, dataset, k=20, quiet=True) for _ in range(2))
    assert first == second and first["trained"] != first["untrained"]


def test_a_held_out_part_of_the_training_images_can_take_the_place_of_the_test_set(run):
    checkpoint = read_checkpoint(run)
    dataset = program.load_for(checkpoint["config"], parse([str(run), "--subset", "50", "--holdout", "30"]))
    assert len(dataset.labelled) == 50 and len(dataset.test) == 30
    inherited = checkpoint["config"] | {"subset": 40, "holdout": 20}
    dataset = program.load_for(inherited, parse([str(run)]))
    assert len(dataset.labelled) == 40 and len(dataset.test) == 20


def test_transfer_probes_the_same_backbone_on_another_dataset(run, pictures, tmp_path):
    for source in pictures.glob("*/*/*.png"):
        if source.parent.name in ("bar", "disc", "star"):
            place = tmp_path / "other" / source.relative_to(pictures)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.read_bytes())
    file = tmp_path / "transfer.json"
    line = [str(run), "--dataset", "folder", "--data-dir", str(tmp_path / "other"), "--json", str(file)]
    assert program.main(line) == 0
    assert 0 <= json.loads(file.read_text())["trained"]["linear"] <= 1


def test_the_table_shows_percent_with_spread_and_gaps():
    text = accuracy_table(
        {"trained": {"knn": 0.5, "linear_1": 0.25, "linear_1_std": 0.01, "finetune": 0.9}, "raw": {"knn": 0.1}}
    )
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["trained", "50.0", "25.0", "±", "1.0", "90.0"] and lines[2] == ["raw", "10.0", "-", "-"]


# ------------------------------------------------------------------------------------------- export


def test_the_exported_backbone_loads_into_torchvisions_resnet18_as_the_docs_say(tmp_path, monkeypatch):
    encoder = Encoder("resnet18", 32, dim=16, hidden=16)
    config = asdict(train.Config(arch="resnet18", size=32, dim=16, hidden=16, layers=2))
    save_tensors(UNTRAINED | {"config": config, "encoder": encoder.state_dict()}, tmp_path / "last.pt", "it")
    assert program.main([str(tmp_path / "last.pt"), "--export", str(tmp_path / "backbone.pt")]) == 0

    monkeypatch.chdir(tmp_path)
    lines = {}
    texts = "".join(file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    blocks = re.findall(r"```python\n(.*?)```", texts, re.S)
    exec(next(block for block in blocks if "backbone.pt" in block), lines)  # as a reader would
    model = lines["model"]
    model.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), encoder.eval().features(x))


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["nowhere"], "nowhere: no checkpoint there"),
        (["RUN", "--k", "0"], "--k must be at least 1"),
        (["RUN", "--json", "not/there/x.json"], "the folder not/there does not exist"),
        (["RUN", "--export", "not/there/x.pt"], "--export not/there/x.pt: the folder not/there does not exist"),
        (["RUN", "--dataset", "folder", "--data-dir", "not/there"], "--data-dir not/there: no such folder"),
        (["RUN", "--holdout", "97"], "--holdout 97"),
        (["RUN", "--k", "many"], "--k: invalid int value: 'many'"),
        ([], "the following arguments are required: RUN_OR_CHECKPOINT"),
        (["RUN", "--json", "."], "--json .: a folder; name a file"),
        (["RUN", "--device", "tpu"], "--device: device 'tpu' is not available"),
        (["RUN", "--size", "-1"], "--size not negative"),
        (["RUN", "--few-labels"], "unrecognized arguments: --few-labels"),
    ],
)
def test_bad_input_is_one_line(run, line, message, capsys):
    assert program.main([str(run) if word == "RUN" else word for word in line]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("eval_linear.py: ") and message in said[0]


def test_images_without_labels_cannot_be_evaluated_on_and_the_message_says_what_can(run, pictures, tmp_path, capsys):
    for i, path in enumerate(sorted(pictures.glob("train/*/*.png"))[:5]):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes())
    assert program.main([str(run), "--data-dir", str(tmp_path)]) == 2
    assert "no labels to evaluate with: name labelled images" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(run, tmp_path, capsys):
    content = (Path(run) / "last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    assert program.main([str(tmp_path / "half.pt")]) == 2
    assert "half.pt: damaged or not a checkpoint" in capsys.readouterr().err
