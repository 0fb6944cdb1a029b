"""Few labels, augmented views, fine-tuning with mixup and a restored last stage, refusals."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import eval_linear
from data import Augment
from lab import evaluate as program
from lab.backbones import build_backbone, encoder_of
from lab.evaluate import draw_labels, evaluate, few_labels, train_head
from lab.s3l import restore_last_stage
from lab.train import LabConfig, train
from models import Encoder
from plumbing.command_line import UserError
from plumbing.files import Dataset, Images
from plumbing.runs import read_checkpoint
from train import load_dataset

CPU = torch.device("cpu")
KINDS = {
    "whole": {},
    "dropped": {"drop_last_stage": True},
    "mobile": {"arch": "mobilenet_v3_small", "width": 0},
    "vit": {"arch": "vit_tiny", "width": 0},
    "byol": {"method": "byol"},
}


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory):
    """A function that gives the folder of a run of one epoch of that kind."""
    from conftest import TINY

    root = tmp_path_factory.mktemp("runs")

    def folder(kind):
        if kind == "byol":
            pytest.importorskip("lightly")
        if not (root / kind).exists():
            settings = TINY | {"data_dir": str(pictures), "out": str(root / kind), "epochs": 1, "knn_every": 0}
            train(LabConfig(**(settings | KINDS[kind])))
        return str(root / kind)

    return folder


def brightness(classes=("dark", "bright"), count=64):
    """A dataset of two classes that differ in brightness."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = Images((60 + noise + 130 * labels[:, None, None, None]).to(torch.uint8), labels=labels, side=16)
    return Dataset(images, images, images, classes)


# --------------------------------------------------------------------------------------- few labels


def test_few_labels_draws_a_balanced_share_and_reports_the_spread(monkeypatch):
    x, y, seen = torch.randn(400, 10), torch.arange(400) % 4, []
    monkeypatch.setattr(program, "linear_probe", lambda a, b, *_: seen.append(b.bincount().tolist()) or 0.1 * len(seen))
    mean, std = few_labels(x, y, x, y, 0.1)
    assert seen == [[10, 10, 10, 10]] * 5
    assert mean == pytest.approx(0.3) and std == pytest.approx(0.158, abs=1e-3)
    few_labels(x, y, x, y, 0.001, draws=2)
    assert seen[-1] == [1, 1, 1, 1], "at least one image per class"


def test_another_draw_gives_other_images():
    labels = torch.arange(400) % 4
    assert draw_labels(labels, 0.1, 0).equal(draw_labels(labels, 0.1, 0))
    assert not draw_labels(labels, 0.1, 0).equal(draw_labels(labels, 0.1, 1))


# -------------------------------------------------------------------------------------- the command


def test_the_command_prints_and_writes_few_labels_for_both_controls_too(runs, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert program.main([runs("whole"), "--json", str(file), "--few-labels", "--k", "20"]) == 0
    printed, figures = capsys.readouterr().out, json.loads(file.read_text())
    assert "linear, 1 %" in printed and "±" in printed
    for name in ("trained", "untrained", "raw"):
        keys = {"knn", "linear", "linear_1", "linear_1_std", "linear_10", "linear_10_std"}
        assert set(figures[name]) == keys and all(0 <= v <= 1 for v in figures[name].values())


def test_without_slow_protocols_the_figures_are_those_of_eval_linear(runs):
    checkpoint = read_checkpoint(runs("whole"))
    dataset = load_dataset(LabConfig(**checkpoint["config"]))
    figures = evaluate(checkpoint, dataset, k=20, device="cpu", quiet=True)
    assert figures == eval_linear.evaluate(checkpoint, dataset, k=20, device="cpu", quiet=True)
    assert set(figures) == {"trained", "untrained", "raw", "majority"}


def test_the_slow_protocols_are_measured_for_networks_only(runs, capsys):
    assert program.main([runs("whole"), "--augmented", "--finetune", "--epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "linear, augmented" in lines[2] and "fine-tuned" in lines[2]
    assert [line.split()[0] for line in lines[-3:]] == ["raw", "majority", "untrained:"]
    assert all(line.split()[-2:] == ["-", "-"] for line in lines[-3:-1])


@pytest.mark.parametrize("kind", ["mobile", "vit", "byol"])
def test_every_kind_of_run_is_evaluated(runs, kind, tmp_path):
    assert program.main([runs(kind), "--json", str(tmp_path / "x.json")]) == 0
    figures = json.loads((tmp_path / "x.json").read_text())
    assert 0 <= figures["trained"]["knn"] <= 1 and figures["trained"] != figures["untrained"]
    assert program.main([runs(kind), "--export", str(tmp_path / "backbone.pt")]) == 0


@pytest.mark.parametrize("kind", ["mobile", "vit", "dropped"])
def test_eval_linear_says_which_command_evaluates_a_run_of_the_lab(runs, kind, tmp_path, capsys):
    place = runs(kind)
    for options in ([], ["--export", str(tmp_path / "x.pt")]):
        assert eval_linear.main([place, *options]) == 2
        error = capsys.readouterr().err
        assert error.endswith(f"python -m lab.evaluate {place}\n") and error.count("\n") == 1


def test_a_run_without_its_last_stage_is_evaluated_fine_tuned_and_exported(runs, tmp_path):
    place, file = runs("dropped"), tmp_path / "figures.json"
    line = [place, "--finetune", "--epochs", "1", "--mixup", "1", "--restore-last-stage", "1"]
    assert program.main([*line, "--json", str(file)]) == 0
    assert 0 <= json.loads(file.read_text())["trained"]["finetune"] <= 1
    assert program.main([place, "--export", str(tmp_path / "backbone.pt")]) == 0
    weights = torch.load(tmp_path / "backbone.pt")
    assert {name.split(".")[0] for name in weights} == {"conv1", "bn1", "layer1", "layer2", "layer3"}


# --------------------------------------------------------------------- training a head, fine-tuning


@pytest.mark.parametrize("finetune", [False, True])
def test_training_a_head_learns_and_leaves_the_given_encoder_alone(finetune):
    encoder = Encoder("resnet10", 16, 8, 16, 2, 16)
    before = copy.deepcopy(encoder.state_dict())
    assert train_head(encoder, brightness(), 16, CPU, epochs=15, finetune=finetune) > 0.9
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_views_are_cropped_and_flipped_and_keep_their_colours(monkeypatch):
    crops = []
    monkeypatch.setattr(program, "Augment", lambda *given, **named: crops.append(Augment(*given, **named)) or crops[0])
    train_head(Encoder("resnet10", 16, 8, 16, 2, 16), brightness(), 16, CPU, epochs=1, finetune=False)
    assert crops == [Augment(16, jitter_p=0, gray_p=0, blur_p=0, solarize_p=0)]


def test_warm_up_moves_the_new_stage_alone_and_fine_tuning_then_moves_everything(runs, tiny, monkeypatch):
    checkpoint = read_checkpoint(runs("dropped"))
    encoder = eval_linear.load_backbone(checkpoint, encoder_of)
    whole, ends, extract = restore_last_stage(encoder, checkpoint["config"]), [], program.extract

    def look(trained, *given):
        ends.append(copy.deepcopy(trained.backbone.state_dict()))
        return extract(trained, *given)

    monkeypatch.setattr(program, "extract", look)
    start, dataset = copy.deepcopy(whole.backbone.state_dict()), load_dataset(tiny())
    train_head(whole, dataset, 16, CPU, epochs=0, finetune=True, warmup=2)
    train_head(whole, dataset, 16, CPU, epochs=1, finetune=True, warmup=2)
    moved = [{name for name, w in end.items() if not torch.equal(w, start[name])} for end in ends]
    assert moved[0] == {name for name in start if name.startswith("layer4")}, "BatchNorm's statistics included"
    assert moved[1] == set(start)


@pytest.mark.parametrize(
    "optimizer, name, rate", [("muon", "trained", 0.005), ("muon", "untrained", 0.03), ("sgd", "trained", 0.03)]
)
def test_a_network_that_muon_trained_is_fine_tuned_in_smaller_steps(optimizer, name, rate, monkeypatch):
    rates = []
    monkeypatch.setattr(program, "_optimiser", lambda encoder, head, rate, steps: 1 / rates.append(rate))
    encoder = Encoder("resnet10", 16, 8, 16, 2, 16)
    more = program.Protocols({"optimizer": optimizer}, ("finetune",), epochs=1)
    with pytest.raises(TypeError):
        more(name, encoder, brightness(), 16, torch.empty(0), torch.empty(0))
    assert rates == [rate]


@pytest.mark.parametrize("finetune, expected", [(True, "fp32"), (False, "bf16")])
def test_a_mobile_network_is_fine_tuned_in_fp32_on_a_cpu_with_bf16(finetune, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    taken, optimiser = [], program._optimiser
    monkeypatch.setattr(program, "_optimiser", lambda *given: (taken.append(given[0].precision), optimiser(*given))[1])
    encoder = Encoder(build_backbone("mobilenet_v3_small", 16), 16, dim=8, hidden=8)
    encoder.precision = "bf16"
    train_head(encoder, brightness(), 16, CPU, epochs=1, finetune=finetune)
    assert taken == [expected] and encoder.precision == "bf16"


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_fine_tuning_with_mixup_learns_from_mixtures_and_without_it_mixes_nothing(alpha, monkeypatch):
    targets, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y: (targets.append(y), cross_entropy(x, y))[1])
    encoder = Encoder("resnet10", 16, 8, 16, 2, 16)
    assert train_head(encoder, brightness(), 16, CPU, epochs=20, finetune=True, alpha=alpha) > 0.9
    mixed = [target for target in targets if target.ndim == 2 and (target > 0).all(1).any()]
    assert len(targets) == 20 and len(mixed) == (20 if alpha else 0)
    assert all(torch.allclose(target.sum(1), torch.ones(64)) for target in mixed)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("whole", ["--epochs", "0"], "--epochs must be at least 1"),
        ("whole", ["--epochs", "3", "--few-labels"], "--epochs means nothing without --augmented or --finetune"),
        ("whole", ["--k", "0"], "--k must be at least 1"),
        ("dropped", ["--mixup", "1"], "belong to fine-tuning: add --finetune"),
        ("dropped", ["--finetune", "--mixup", "-1"], "must be finite and not negative"),
        ("dropped", ["--finetune", "--mixup", "nan"], "must be finite and not negative"),
        ("whole", ["--finetune", "--restore-last-stage", "1"], "was trained with all of its stages"),
        ("vit", ["--size", "24"], "vit_tiny knows the side that it was trained at only: --size 16, not 24"),
    ],
)
def test_bad_options_are_one_line(runs, kind, options, message, capsys):
    place = runs(kind)
    capsys.readouterr()
    assert program.main([place, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: ") and message in error and error.count("\n") == 1


def test_a_side_that_a_vision_transformer_does_not_know_is_refused_in_a_study_too(runs, tiny):
    with pytest.raises(UserError, match="--size 16, not 32"):
        evaluate(read_checkpoint(runs("vit")), load_dataset(tiny()), size=32)


@pytest.mark.parametrize("classes", [1, 2])
def test_few_labels_with_one_image_a_draw_or_a_class_end_in_a_figure(classes):
    x, labels = torch.randn(8, 5), torch.arange(8) % classes
    mean, spread = few_labels(x, labels, x, labels, 0.01)
    assert 0 <= mean <= 1 and spread >= 0
