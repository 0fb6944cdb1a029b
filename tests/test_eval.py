"""The evaluation: kNN, linear probe, controls, export, and what it refuses."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, UNTRAINED
from PIL import Image
from torch import nn

import data
import eval_linear as program
import train
from eval_linear import eval_side, evaluate, knn, linear_probe
from models import encoder_of
from plumbing.command_line import Parser, UserError
from plumbing.evaluation import accuracy_table, dataset_options, evaluation_options
from plumbing.features import extract, random_images, raw_pixels, settle_batchnorm
from plumbing.files import Images, decode
from plumbing.fingerprints import twins
from plumbing.image_ops import normalize, whole_image
from plumbing.outputs import save_tensors
from plumbing.runs import read_checkpoint
from plumbing.scores import figures, neighbours

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
    assert figures["k"] == 17, "the smallest class has 9 images"
    assert "k = 17 (with 20, the smallest class could not win a vote)" in printed and figures["cautions"] == []
    assert set(figures["majority"]) == {"knn", "linear"} and "majority" in printed
    assert figures["config"]["arch"] == "resnet10" and figures["date"] and figures["hardware"]


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


def checkpoint_of(place, arch="resnet10", size=24, width=0):
    """A checkpoint whose BatchNorm statistics are not those of the start; returns its encoder."""
    config = (
        asdict(train.Config())
        | TINY
        | {"arch": arch, "size": size, "width": width, "seed": 0, "layers": 2, "dim": 16, "hidden": 16}
    )
    encoder = encoder_of(config).eval()
    for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    save_tensors(UNTRAINED | {"config": config, "encoder": encoder.state_dict()}, place / "last.pt", "it")
    return encoder


def lines_of_docs(arch, size):
    """The block of docs/usage.md that belongs to a run with this backbone and size."""
    text = (ROOT / "docs" / "usage.md").read_text()
    return re.search(rf"`--arch {arch} --size {size}`.*?```python\n(.*?)```", text, re.S)[1]


@torch.no_grad()
@pytest.mark.parametrize(("arch", "size"), [("resnet10", 24), ("resnet18", 96)])
def test_the_lines_of_the_docs_rebuild_the_exported_backbone_to_the_last_bit(tmp_path, monkeypatch, capsys, arch, size):
    encoder = checkpoint_of(tmp_path, arch, size)
    monkeypatch.chdir(tmp_path)
    assert program.main(["last.pt", "--export", "backbone.pt"]) == 0
    printed = capsys.readouterr().out
    lines, names = lines_of_docs(arch, size), {}
    assert lines in printed, "the program prints the same"
    exec(lines, names)  # as a reader would
    pixels = torch.rand(3, 3, 40, 40)
    assert torch.equal(names["model"](names["normalize"](pixels)), encoder.features(normalize(pixels).contiguous()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "size", "width"), [("resnet18", 32, 0), ("resnet10", 65, 8), ("resnet50", 64, 8), ("resnet34", 24, 16)]
)
def test_the_printed_lines_rebuild_any_run(tmp_path, monkeypatch, arch, size, width):
    encoder = checkpoint_of(tmp_path, arch, size, width)
    monkeypatch.chdir(tmp_path)
    assert program.main(["last.pt", "--export", "it.pt"]) == 0
    recipe, names = json.loads((tmp_path / "it.json").read_text()), {}
    assert recipe["arch"] == arch and recipe["size"] == size and recipe["small_stem"] == (size <= 64)
    exec("\n".join(recipe["lines"]), names)
    pixels = torch.rand(3, 3, 72, 72)
    assert torch.equal(names["model"](names["normalize"](pixels)), encoder.features(normalize(pixels).contiguous()))


@pytest.mark.parametrize(("shape", "size", "side"), [((28, 28), 24, 28), ((24, 24), 24, 24), ((90, 70), 56, 64)])
def test_the_printed_lines_show_a_picture_as_the_features_saw_it(tmp_path, monkeypatch, shape, size, side):
    """Squares up to 4/3 of --size keep their side; larger pictures are decoded to 8/7 of it."""
    (tmp_path / "in").mkdir()
    for i in range(20):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)).save(
            tmp_path / "in" / f"{i}.png"
        )
    monkeypatch.chdir(tmp_path)
    options = {"size": size, "width": 16, "data_dir": "in", "out": "run", "epochs": 1, "layers": 1}
    train.train(train.Config(**(TINY | options)))
    assert program.main(["run", "--export", "it.pt"]) == program.main(["run", "--features", "it.npz"]) == 0
    recipe, names = json.loads((tmp_path / "it.json").read_text()), {}
    exec("\n".join(recipe["lines"]), names)
    file = np.load("it.npz")
    with torch.no_grad():
        ours = torch.stack([names["model"](names["prepared"](Path("in") / name))[0] for name in file["paths"]])
    both = [features - features.mean(0) for features in (ours, torch.from_numpy(file["features"]))]  # (20, F)
    assert recipe["side"] == side and (F.cosine_similarity(*both) > 0.99).all()  # bf16 in evaluation


def noise(mode):
    """A picture of noise in that mode; "tRNS" is RGB with one colour that is transparent."""
    values = np.random.default_rng(0).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    return image.convert("RGB" if mode == "tRNS" else mode)


MODES = {
    "RGB": ("png", {}), "RGBA": ("png", {}), "LA": ("png", {}), "L": ("png", {}), "1": ("png", {}), "CMYK": ("tif", {}),
    "P": ("png", {"transparency": 7}), "tRNS": ("png", {"transparency": (0, 0, 0)}),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_the_printed_lines_show_a_picture_as_training_saw_it(tmp_path, monkeypatch, mode):
    checkpoint_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert program.main(["last.pt", "--export", "it.pt"]) == 0
    exec("\n".join(json.loads((tmp_path / "it.json").read_text())["lines"]), names := {})
    suffix, options = MODES[mode]
    image = noise(mode)
    image.paste(0, (0, 0, 24, 40)) if mode == "tRNS" else None
    image.save(tmp_path / f"it.{suffix}", **options)
    pixels = torch.from_numpy(decode(tmp_path / f"it.{suffix}", 32)).float() / 255
    assert torch.equal(names["prepared"](f"it.{suffix}"), names["normalize"](pixels)[None])


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_the_printed_lines_refuse_what_only_training_knew_how_to_scale(tmp_path, monkeypatch, kind):
    checkpoint_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert program.main(["last.pt", "--export", "it.pt"]) == 0
    exec("\n".join(json.loads((tmp_path / "it.json").read_text())["lines"]), names := {})
    Image.fromarray(np.full((40, 48), 999, dtype=kind)).save("deep.tif")
    with pytest.raises(ValueError, match="^deep.tif: more than 8 bits per value; scale them to 0 to 255 .*$"):
        names["prepared"]("deep.tif")


@pytest.mark.parametrize("content", ['{"knn": 0.5}', "[1, 2]", "3", '"lines"', "no JSON", "[" * 10**5])
def test_an_export_replaces_no_file_that_is_not_an_exports(tmp_path, monkeypatch, capsys, content):
    checkpoint_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert program.main(["last.pt", "--export", "it.pt"]) == program.main(["last.pt", "--export", "it.pt"]) == 0
    Path("backbone.json").write_text(content)
    capsys.readouterr()
    monkeypatch.setattr(program, "read_checkpoint", lambda *_: pytest.fail("it began to work"))
    assert program.main(["last.pt", "--export", "backbone.pt"]) == 2
    error = capsys.readouterr().err
    assert "--export: backbone.pt: would replace backbone.json, which no --export wrote" in error
    assert error.count("\n") == 1 and Path("backbone.json").read_text() == content and not Path("backbone.pt").exists()


def test_an_export_does_not_replace_the_settings_of_a_run(run, capsys):
    before = (run / "config.json").read_bytes()
    assert program.main([str(run), "--export", str(run / "config.pt")]) == 2
    assert "config.json: belongs to a run" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before and not (run / "config.pt").exists()


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["nowhere"], "nowhere: no checkpoint there"),
        (["RUN", "--k", "0"], "--k must be at least 1"),
        (["RUN", "--json", "not/there/x.json"], "the folder not/there does not exist"),
        (["RUN", "--export", "not/there/x.pt"], "--export: not/there/x.pt: the folder not/there does not exist"),
        (["RUN", "--dataset", "folder", "--data-dir", "not/there"], "--data-dir not/there: no such folder"),
        (["RUN", "--holdout", "97"], "--holdout 97"),
        (["RUN", "--k", "many"], "--k: invalid int value: 'many'"),
        ([], "the following arguments are required: RUN_OR_CHECKPOINT"),
        (["RUN", "--json", "."], "--json: .: a folder; name a file"),
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
    assert "no labels to evaluate with: no class folders; name labelled images" in capsys.readouterr().err


def solid(place, count, colour=(9, 9, 9), first=0):
    place.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        Image.new("RGB", (16, 16), (i, *colour[1:])).save(place / f"{i:03d}.png")


@pytest.mark.parametrize(
    ("folders", "why"),
    [
        (["a"], "all images lie in one folder"),
        (["train/a", "test/a"], "all images are of one class, a"),
        (["train/a", "train/b"], "there is train/, but no test/ next to it"),
        (["train/a", "train/b", "test"], "test/ has no class folders"),
        (["train", "test/a", "test/b"], "train/ has no class folders"),
        (["train/a", "test/a", "test/b"], "all training images are of one class, a"),
    ],
)
def test_each_reason_why_there_is_nothing_to_evaluate_with_is_told_apart(run, tmp_path, capsys, folders, why):
    for folder in folders:
        solid(tmp_path / folder, 3)
    assert program.main([str(run), "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"no labels to evaluate with: {why}" in said[0]


def test_a_test_set_that_cannot_be_read_is_a_reason_of_its_own(run, tmp_path, capsys):
    for folder in ("train/a", "train/b"):
        solid(tmp_path / folder, 3)
    (tmp_path / "test" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a" / "0.png").write_bytes(b"no image")
    assert program.main([str(run), "--data-dir", str(tmp_path)]) == 2
    assert "no labels to evaluate with: none of the test images can be read" in capsys.readouterr().err


def figures_of(run, place, tmp_path, *more):
    file = tmp_path / "figures.json"
    assert program.main([str(run), "--data-dir", str(place), "--json", str(file), *more]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize(("one", "other"), [("bar", "Bar"), ("cat", "kitten")])
def test_classes_that_only_one_set_has_are_named(run, tmp_path, capsys, one, other):
    solid(tmp_path / "in" / "train" / "a", 4)
    solid(tmp_path / "in" / "train" / one, 4, (9, 99, 9))
    solid(tmp_path / "in" / "test" / "a", 3, first=9)
    solid(tmp_path / "in" / "test" / other, 3, (9, 99, 9), first=9)
    cautions = figures_of(run, tmp_path / "in", tmp_path)["cautions"]
    assert cautions == [f"caution: 1 classes have no training image: {other} (3)",
                        f"caution: 1 classes have no test image: {one} (4)"]  # fmt: skip
    assert all(line in capsys.readouterr().out for line in cautions[:1])


def test_identical_files_in_both_sets_are_named(run, tmp_path):
    solid(tmp_path / "in" / "train" / "a", 5)
    solid(tmp_path / "in" / "train" / "b", 5, (9, 99, 9))
    solid(tmp_path / "in" / "test" / "a", 3, first=3)  # 3 and 4 are in both
    solid(tmp_path / "in" / "test" / "b", 3, (9, 99, 9), first=50)
    (caution,) = figures_of(run, tmp_path / "in", tmp_path)["cautions"]
    assert caution == (
        "caution: 2 test images are identical to training images, for instance "
        "test/a/003.png = train/a/003.png, test/a/004.png = train/a/004.png"
    )
    on_disk = data.load("folder", tmp_path / "in", cache_gb=1e-9)
    assert [test for test, _ in twins(on_disk.train, on_disk.test)] == [0, 1]


def test_identical_images_in_memory_are_counted_too():
    pixels = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    assert twins(Images(pixels[:6]), Images(pixels[[7, 2, 8]])) == [(1, 2)]


def test_unbalanced_classes_get_balanced_accuracies_and_the_majoritys_share(run, tmp_path):
    for split, counts in (("train", (30, 6)), ("test", (20, 4))):
        for name, count, colour in zip("ab", counts, ((9, 9, 9), (9, 200, 9))):
            solid(tmp_path / "in" / split / name, count, colour, first=0 if split == "train" else 40)
    measured = figures_of(run, tmp_path / "in", tmp_path)
    assert set(measured["trained"]) == {"knn", "linear", "knn_balanced", "linear_balanced"}
    assert measured["majority"]["knn"] == pytest.approx(20 / 24) and measured["majority"]["knn_balanced"] == 0.5
    assert measured["k"] == 11


def deep(folder, top):
    """16 training and 8 test pictures of 16 bits, of two classes, with values up to top."""
    for split, count in (("train", 8), ("test", 4)):
        for name, share in (("a", 1), ("b", 2)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                value = top // share - (i + 8 * (split == "test")) * top // 64
                Image.fromarray(np.full((16, 16), value, dtype=np.uint16)).save(folder / split / name / f"{i}.png")
    return folder


def test_another_range_is_said_with_features_and_without_labels(tmp_path, capsys):
    for top in (4000, 60_000):
        (tmp_path / f"{top}").mkdir()
        for i in range(210):
            Image.fromarray(np.full((8, 8), top - i, dtype=np.uint16)).save(tmp_path / f"{top}" / f"{i}.png")
    out, words = tmp_path / "run", "0 to 4095 became 0 to 255 in training, 0 to 65535 here"
    train.train(train.Config(**(TINY | {"data_dir": str(tmp_path / "4000"), "out": str(out), "epochs": 1})))
    for more in ([], ["--features", str(tmp_path / "f.npz")]):
        for place, said in (("4000", 0), ("60000", 1)):
            capsys.readouterr()
            assert program.main([str(out), "--data-dir", str(tmp_path / place), *more]) == 0
            assert capsys.readouterr().out.count(words) == said


def test_another_range_of_16_bit_pictures_than_in_training_is_said(tmp_path):
    place, out = deep(tmp_path / "twelve", 4000), tmp_path / "run"
    train.train(train.Config(**(TINY | {"data_dir": str(place), "out": str(out), "epochs": 1, "batch_size": 8})))
    assert read_checkpoint(out)["span"] == [0, 4095] and figures_of(out, place, tmp_path)["cautions"] == []
    (caution,) = figures_of(out, deep(tmp_path / "sixteen", 60_000), tmp_path)["cautions"]
    words = "0 to 4095 became 0 to 255 in training, 0 to 65535 here"
    assert caution == f"caution: pictures of more than 8 bits per value: {words}"
    old = torch.load(out / "last.pt", weights_only=True)
    del old["span"]
    torch.save(old, tmp_path / "old.pt")
    assert figures_of(tmp_path / "old.pt", tmp_path / "sixteen", tmp_path)["cautions"] == []


@pytest.mark.parametrize(
    ("counts", "asked", "k"),
    [((500,) * 10, 200, 200), ((15, 15, 122), 200, 29), ((1, 500), 200, 1), ((140, 12), 20, 20), ((3, 0, 9), 20, 5)],
)
def test_k_is_bound_so_that_the_smallest_class_can_win_a_vote(counts, asked, k):
    labels = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    assert neighbours(asked, labels) == k


def test_with_the_bound_knn_is_no_majority_vote():
    """Two well separated classes of 140 and 12 images: with k = 200 all answers were the first."""
    centres, labels = torch.tensor([[1.0, 0.3], [1.0, -0.3]]), torch.tensor([0] * 140 + [1] * 12)
    x = centres[labels] + 0.02 * torch.randn(152, 2)
    truth = torch.tensor([0, 1] * 10)
    test = centres[truth] + 0.02 * torch.randn(20, 2)
    assert knn(x, labels, test, truth, 200) == 0.5 and knn(x, labels, test, truth, neighbours(200, labels)) == 1.0


def test_balanced_accuracy_is_the_mean_over_the_classes_of_the_test_set():
    truth = torch.tensor([0] * 6 + [2] * 2)
    right = torch.tensor([True] * 3 + [False] * 3 + [True] * 2)
    assert figures(right, right, truth) == {
        "knn": 5 / 8,
        "linear": 5 / 8,
        "knn_balanced": 0.75,
        "linear_balanced": 0.75,
    }


@pytest.mark.parametrize("faint", [0, 1], ids=["constant", "nearly-constant"])
def test_a_column_that_is_all_but_constant_in_training_does_not_drown_the_others(faint):
    """As border pixels of digits are: a quarter of the test images has a faint value in one."""
    x, y = clusters(1000, spread=1.0)
    test_x, test_y = clusters(400, spread=1.0, seed=1)
    column, test_column = torch.zeros(1000, 1), torch.zeros(400, 1)
    column[:faint], test_column[::4] = 0.004, 0.5
    clean = linear_probe(x, y, test_x, test_y)
    marked = linear_probe(torch.cat([x, column], 1), y, torch.cat([test_x, test_column], 1), test_y)
    assert clean > 0.8 and marked > clean - 0.02


def test_features_of_a_single_image_or_of_a_single_class_end_no_probe():
    x = torch.randn(5, 8)
    assert linear_probe(x[:1], torch.tensor([0]), x, torch.zeros(5, dtype=torch.long)) == 1.0
    assert linear_probe(torch.ones(5, 8), torch.arange(5), x, torch.arange(5)) <= 1.0


# --------------------------------------------------------------------------- which images are meant


def test_a_slash_more_or_another_way_to_write_a_folder_keeps_the_runs_holdout(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(pictures)
    config = TINY | {"data_dir": str(pictures), "holdout": 20, "subset": 40, "eval_size": 0}
    for place in (str(pictures) + "/", f"{pictures}/train/..", "link", "./link/"):
        options = dataset_options(config, parse(["run", "--data-dir", place]))
        assert (options["holdout"], options["subset"]) == (20, 40), place
    assert dataset_options(config, parse(["run", "--data-dir", str(pictures / "train")]))["holdout"] == 0


def test_another_folder_does_not_lose_the_runs_holdout_in_silence(pictures, capsys):
    config = TINY | {"data_dir": "gone", "holdout": 20, "subset": 0, "eval_size": 0}
    dataset_options(config, parse(["run", "--data-dir", str(pictures)]))
    assert "caution: the run's --holdout 20 holds for gone alone: name it again" in capsys.readouterr().out
    dataset_options(config, parse(["run", "--data-dir", str(pictures), "--holdout", "0"]))
    dataset_options(config, parse(["run", "--dataset", "cifar10"]))
    dataset_options(config | {"holdout": 0}, parse(["run", "--data-dir", str(pictures)]))
    assert capsys.readouterr().out == ""


def test_a_folder_for_drawn_shapes_is_refused():
    config = TINY | {"dataset": "shapes", "data_dir": "data", "eval_size": 0, "holdout": 0, "subset": 0}
    with pytest.raises(UserError, match="--data-dir means nothing with --dataset shapes: add --dataset folder"):
        dataset_options(config, parse(["run", "--data-dir", "my_images"]))
    assert dataset_options(config, parse(["run", "--dataset", "folder", "--data-dir", "x"]))["data_dir"] == "x"


def test_downloads_are_not_looked_for_in_the_runs_folder_of_photographs():
    config = TINY | {"data_dir": "photographs", "eval_size": 0, "holdout": 0, "subset": 0}
    assert dataset_options(config, parse(["run", "--dataset", "cifar10"]))["data_dir"] == "data"
    assert dataset_options(config, parse(["run", "--dataset", "stl10", "--data-dir", "x"]))["data_dir"] == "x"
    config |= {"dataset": "cifar10", "data_dir": "downloads"}
    assert dataset_options(config, parse(["run", "--dataset", "cifar100"]))["data_dir"] == "downloads"
    with pytest.raises(UserError, match="--dataset folder: name it with --data-dir"):
        dataset_options(config, parse(["run", "--dataset", "folder"]))


def test_images_are_decoded_as_large_as_they_are_evaluated(tmp_path):
    solid(tmp_path, 1)
    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    for options, side in (({"eval_size": 160}, 160), ({"eval_size": 0}, 64)):
        config = train.Config(**(TINY | {"data_dir": str(tmp_path), "batch_size": 2} | options))
        assert train.load_dataset(config).train.side == side
        measured = data.load(**dataset_options(asdict(config), parse(["run"])))
        assert measured.train.side == side


@pytest.mark.parametrize("where", ["own", "elsewhere"])
def test_test_images_that_were_trained_on_are_said(pictures, tmp_path, where):
    place = tmp_path / "images"
    shutil.copytree(pictures, place)
    out = str(tmp_path / "run")
    train.train(train.Config(**(TINY | {"data_dir": str(place), "out": out, "epochs": 1})))
    if where == "elsewhere":
        place = place.rename(tmp_path / "moved")
    assert figures_of(out, place, tmp_path)["cautions"] == []
    (caution,) = figures_of(out, place, tmp_path, "--holdout", "20")["cautions"]
    assert caution == "caution: 20 of the 20 test images were trained on without labels"


def test_after_files_were_added_nobody_who_trained_is_tested(tmp_path):
    place, out = tmp_path / "images", str(tmp_path / "run")
    for name, colour in (("a", (9, 9, 9)), ("b", (9, 200, 9))):
        solid(place / name, 60, colour)
    train.train(train.Config(**(TINY | {"data_dir": str(place), "out": out, "epochs": 1})))
    for i, (name, blue) in enumerate((("a", 30), ("b", 60), ("a", 90))):
        solid(place / name, 1, (9, 9, blue), first=100 + i)
    assert figures_of(out, place, tmp_path)["cautions"] == []


def test_a_damaged_checkpoint_is_named(run, tmp_path, capsys):
    content = (Path(run) / "last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    assert program.main([str(tmp_path / "half.pt")]) == 2
    assert "half.pt: damaged or not a checkpoint" in capsys.readouterr().err
