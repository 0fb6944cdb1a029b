"""S3L: a second stage at another size, a network without its last stage, and the study."""

import copy
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from invented import base
from PIL import Image

import eval_linear
from figures import plots
from figures import sweep as sweeper
from lab.backbones import build_backbone, encoder_of
from lab.s3l import restore_last_stage, start_from
from lab.studies import s3l, s3l_photos
from lab.train import LabConfig, build, train
from models import Encoder
from plumbing.command_line import UserError
from plumbing.runs import read_checkpoint
from train import Pretraining, load_dataset, seed_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(pictures, tmp_path_factory):
    """A run of one epoch at 16 px and one of a network without its last stage: their folders."""
    from conftest import TINY

    root = tmp_path_factory.mktemp("small")
    for name, options in (("whole", {}), ("dropped", {"drop_last_stage": True})):
        train(LabConfig(**(TINY | {"data_dir": str(pictures), "out": str(root / name), "epochs": 1} | options)))
    return {name: str(root / name) for name in ("whole", "dropped")}


# ------------------------------------------------------------------------ small -> full resolution


class Stop(Exception):
    pass


@pytest.mark.parametrize("start", ["carry", "forward"])
def test_a_second_stage_at_another_size_takes_the_encoder_and_carries_the_bank_or_makes_it_anew(
    start, lab_config, small, monkeypatch, tmp_path
):
    before, seen = read_checkpoint(small["whole"]), {}

    def look(self, pixels, index, lr):
        seen.update(
            copy.deepcopy({"encoder": self.encoder.state_dict(), "bank": self.bank.weight}), views=self.augment(pixels)
        )
        raise Stop

    monkeypatch.setattr(Pretraining, "step", look)
    with pytest.raises(Stop):
        train(lab_config(size=24, init_from=small["whole"], bank_init=start, out=str(tmp_path / "second"), seed=5))
    assert seen["views"].shape[-1] == 24
    for name, weight in before["encoder"].items():
        if "running" not in name and "num_batches" not in name:  # the forward pass moves BatchNorm's statistics
            assert torch.equal(seen["encoder"][name], weight), name
    expected = before["bank"]["weight"]
    if start == "forward":
        run = build(lab_config(size=24), 96, CPU)
        run.encoder.load_state_dict(before["encoder"])
        torch.manual_seed(seed_of(5, "bank"))
        run.enter(load_dataset(lab_config()).train, torch.arange(96))
        assert (run.bank.weight - expected).abs().max() > 0.1
        expected = run.bank.weight
    assert torch.equal(seen["bank"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bank_init": "carry", "subset": 64}, "--init-from .* --bank-init carry: .* --subset 0"),
        ({"bank_init": "carry", "dim": 8}, "--init-from .* --bank-init carry: .* rows of 16 numbers, --dim 8"),
        ({"size": 65}, "--init-from .* trained at --size 16, it cannot go on at 65"),
        ({"drop_last_stage": True}, "--init-from .* its encoder has another shape"),
        ({"method": "simclr"}, "--init-from .*: a run of --method ours has another head than --method simclr"),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_written(options, message, lab_config, small, tmp_path):
    with pytest.raises(UserError, match=message):
        train(lab_config(init_from=small["whole"], out=str(tmp_path / "new"), **options))
    assert not (tmp_path / "new").exists()


def test_a_bank_of_another_number_of_rows_is_refused(lab_config, small):
    config = lab_config(init_from="x", bank_init="carry")
    with pytest.raises(UserError, match="--init-from x .*: the run's bank has 96 rows, .* 95 images"):
        start_from(build(config, 95, CPU), read_checkpoint(small["whole"]), config)


@pytest.mark.parametrize("change", ["renamed", "edited"])
def test_a_bank_of_as_many_other_images_is_not_carried(lab_config, small, pictures, tmp_path, change):
    shutil.copytree(pictures, tmp_path / "copy")
    options = {"init_from": small["whole"], "bank_init": "carry", "data_dir": str(tmp_path / "copy")}
    train(lab_config(out=str(tmp_path / "same"), **options))
    file = sorted((tmp_path / "copy" / "train").glob("*/*.png"))[0]
    file.rename(file.with_name("zz.png")) if change == "renamed" else Image.new("RGB", (16, 16)).save(file)
    with pytest.raises(UserError, match="--init-from .* --bank-init carry: 1 of its 96 images are gone"):
        train(lab_config(out=str(tmp_path / "other"), **options))
    assert not (tmp_path / "other").exists()


def test_init_from_starts_with_the_weights_of_another_run(lab_config, small, tmp_path):
    config = lab_config(out=str(tmp_path / "second"), init_from=small["whole"], epochs=1, lr=1e-12, seed=9)
    train(config)
    weights = [read_checkpoint(p)["encoder"]["backbone.conv1.weight"] for p in (small["whole"], config.out)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="--init-from .* holds a resnet10, not a resnet18"):
        train(lab_config(out=str(tmp_path / "third"), init_from=small["whole"], arch="resnet18", epochs=1))


def test_a_run_that_started_from_another_is_resumed_without_it(lab_config, small, tmp_path):
    options = {"init_from": small["whole"], "bank_init": "carry", "seed": 9}
    whole = train(lab_config(out=str(tmp_path / "second"), **options))
    checkpoint = read_checkpoint(whole["out"])
    gone = lab_config(out=str(tmp_path / "third"), **options | {"init_from": "gone"})
    assert train(gone, checkpoint)["loss"] == whole["loss"]


def test_a_vision_transformer_knows_one_size(lab_config):
    config = lab_config(arch="vit_tiny", width=0, init_from="x")
    checkpoint = {"config": asdict(config), "encoder": encoder_of(asdict(config)).state_dict()}
    larger = replace(config, size=24)
    with pytest.raises(UserError, match="--init-from x: its encoder has another shape"):
        start_from(build(larger, 96, CPU), checkpoint, larger)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bank_init": "carry"}, "--bank-init carry takes the bank of the run that --init-from names"),
        ({"bank_init": "carry", "init_from": "x", "method": "simclr"}, "with --method ours"),
        ({"drop_last_stage": True, "arch": "mobilenet_v2", "width": 0}, "--drop-last-stage is an option of resnet10"),
        ({"torchvision_stem": True, "arch": "vit_tiny", "width": 0}, "--torchvision-stem is an option of resnet10"),
    ],
)
def test_options_that_make_no_sense_together_are_named(options, message, lab_config):
    with pytest.raises(UserError, match=message):
        lab_config(**options).check()
    with pytest.raises(ValueError, match="drop_last_stage is an option of"):
        build_backbone("vit_tiny", 16, drop_last_stage=True)


# ------------------------------------------------------------------------------ small architecture


def test_without_its_last_stage_a_resnet_gives_the_pooled_features_of_the_third():
    encoder = Encoder(build_backbone("resnet18", 32, 16, drop_last_stage=True), 32).eval()
    net, x = encoder.backbone, torch.randn(2, 3, 32, 32)
    stages = net.layer3(net.layer2(net.layer1(net.relu(net.bn1(net.conv1(x))))))
    assert encoder.feature_dim == 64
    torch.testing.assert_close(encoder.features(x), stages.mean((2, 3)))
    assert not any(name.startswith("layer4") for name in net.state_dict())


def test_the_restored_stage_is_that_of_an_untrained_network_on_top_of_the_trained_ones(small):
    checkpoint = read_checkpoint(small["dropped"])
    config, encoder = checkpoint["config"], encoder_of(checkpoint["config"])
    encoder.load_state_dict(checkpoint["encoder"])
    whole = restore_last_stage(encoder, config)
    fresh = encoder_of(config | {"drop_last_stage": False})
    assert whole.feature_dim == fresh.feature_dim == 2 * encoder.feature_dim
    assert whole.backbone.state_dict().keys() == fresh.backbone.state_dict().keys()
    for name, weight in whole.backbone.state_dict().items():
        source = fresh.backbone if name.startswith("layer4") else encoder.backbone
        assert torch.equal(weight, source.state_dict()[name]), name
    assert whole.features(torch.zeros(2, 3, 16, 16)).shape == (2, whole.feature_dim)


# ------------------------------------------------------------------------------------------ figure


@pytest.mark.parametrize("scale", sweeper.SCALES)
def test_every_arm_can_be_run_at_every_scale_and_differs_from_the_others(scale):
    arms = s3l.points(base(scale), scale)
    for config in arms.values():
        config.check()
    assert len({sweeper.identity(asdict(config), 0) for config in arms.values()}) == len(arms) == 7
    full, small, carried, anew, *_ = arms.values()
    first = replace(anew, init_from="", **json.loads(anew.init_from))
    assert first == small, "the first stage is the small resolution arm"
    assert replace(carried, bank_init="forward") == anew and anew.size == full.size and anew.epochs < full.epochs


@pytest.mark.parametrize("scale", sweeper.SCALES)
def test_photographs_have_arms_of_three_sides_and_one_stem(scale):
    arms, (first, middle, last) = s3l_photos.points(base(scale), scale), s3l_photos.SCALES[scale][0]
    for config in arms.values():
        config.check()
        assert config.torchvision_stem and config.size in (first, middle, last)
    assert len({sweeper.identity(asdict(config), 0) for config in arms.values()}) == len(arms) == 8
    full, _, small, carried, anew, *_ = arms.values()
    assert (full.size, small.size) == (last, first) and replace(carried, bank_init="forward") == anew
    assert replace(anew, init_from="", **json.loads(anew.init_from)) == small
    costs = [s3l.pretraining_flop(asdict(config)) for config in list(arms.values())[:3]]
    assert costs == sorted(costs, reverse=True), "a smaller side costs less"
    if scale == "cpu":
        assert (first, middle, last) == (64, 96, 160) and {config.subset for config in arms.values()} == {3000, 1500}


def test_torchvision_s_stem_is_for_small_views_too_and_goes_on_at_any_side(lab_config, tmp_path):
    options = {"torchvision_stem": True, "epochs": 1}
    small = train(lab_config(out=str(tmp_path / "small"), **options))
    assert read_checkpoint(small["out"])["encoder"]["backbone.conv1.weight"].shape[-1] == 7
    wide = lab_config(size=80, init_from=small["out"], bank_init="carry", out=str(tmp_path / "wide"))
    run = build(wide, 96, CPU)
    start_from(run, read_checkpoint(small["out"], LabConfig), wide)
    for name, weight in read_checkpoint(small["out"])["encoder"].items():
        assert torch.equal(run.encoder.state_dict()[name], weight), name
    with pytest.raises(UserError, match="cannot go on at 16: .* unless --torchvision-stem is on"):
        start_from(build(lab_config(init_from="x"), 96, CPU), read_checkpoint(small["out"]), lab_config(init_from="x"))
    assert eval_linear.main([small["out"], "--device", "cpu"]) == 2, "the core's networks have the small stem"


def test_the_two_stages_of_a_point_are_run_one_after_the_other_and_measured_together(lab_config, tmp_path, monkeypatch):
    monkeypatch.setitem(s3l.SCALES, "demo", (16, 64, 2, 1, 1, 1))
    base = lab_config(warmup=0.0)
    arms = s3l.points(base, "demo")
    names, measure = ("small -> full, bank carried", "all three", s3l.FULL), s3l.measure(base, "demo")
    runs = {}
    for name in names:
        config = replace(arms[name], width=8, dim=16, hidden=16, batch_size=16)
        runs[name] = sweeper.measured(tmp_path / name, name, config, 1, 0, False, False, measure)
    two, three, full = runs.values()
    assert two["config"]["init_from"] == arms[names[0]].init_from, "settings, and no place on this machine"
    (second,) = tmp_path.glob("*-before")
    first, after = read_checkpoint(str(second)), read_checkpoint(str(second).removesuffix("-before"))
    assert first["config"]["size"] == 8 and first["step"] == 8 and after["step"] == 4 and after["config"]["size"] == 16
    stages = (first, after)
    assert two["final"]["seconds"] == pytest.approx(sum(sweeper.training_seconds(stage["history"]) for stage in stages))
    assert two["final"]["tflop"] == pytest.approx(sum(s3l.pretraining_flop(stage["config"]) for stage in stages) / 1e12)
    assert three["final"]["finetune_tflop"] > full["final"]["finetune_tflop"], "the warm-up of the missing stage"
    assert three["final"]["tflop"] < two["final"]["tflop"] < full["final"]["tflop"]
    assert {"from scratch: finetune", "full, last stage anew: finetune", "linear", "knn"} <= full["final"].keys()
    assert full["final"]["full, last stage anew: finetune_tflop"] == three["final"]["finetune_tflop"]
    assert not any("scratch" in key or "anew" in key for key in two["final"])


def test_a_run_of_small_views_is_fine_tuned_on_images_that_were_not_reduced(tmp_path, lab_config, monkeypatch):
    for split, count in (("train", 16), ("test", 4)):
        for i in range(count):
            folder = tmp_path / "photos" / split / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((160, 160, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
    full = lab_config(data_dir=str(tmp_path / "photos"), size=160, subset=16, torchvision_stem=True)
    small, sides = replace(full, size=64), []
    monkeypatch.setattr(s3l, "train_head", lambda _, dataset, *given, **named: sides.append(dataset.test.side) or 0.5)
    checkpoint = {"config": asdict(small), "encoder": encoder_of(asdict(small)).state_dict()}
    s3l.Measure(full, 1, 1)(checkpoint | {"history": [{"seconds": 1.0}]}, load_dataset(small))
    assert load_dataset(small).test.side == 73 and sides == [160]


def test_arithmetic_is_counted():
    encoder = Encoder("resnet10", 16, 8, layers=0)
    first = 16 * 16 * 8 * 3 * 9 * 2  # positions, channels out and in, a kernel of 3 x 3, multiply and add
    assert s3l.forward_flop(encoder.backbone.conv1, 16) == first
    config = asdict(LabConfig(arch="resnet10", width=8, size=16, subset=100, batch_size=32, epochs=2, dim=8, hidden=8))
    one = s3l.forward_flop(encoder_of(config).eval(), 16)
    assert s3l.pretraining_flop(config) == one * (3 * 2 * 96 + 100)
    assert s3l.pretraining_flop(config | {"bank_init": "carry"}) == one * 3 * 2 * 96


def invented(better=(), seeds=(0, 1, 2)):
    """Runs as `sweep` would return them; points whose name is in better are 10 points higher."""
    runs = []
    for name, config in s3l.points(base("cpu"), "cpu").items():
        for seed in seeds:
            top, cost = 0.4 + 0.01 * seed + 0.1 * (name in better), 50.0 if name == s3l.FULL else 20.0
            final = {"linear": top, "knn": top, "finetune": top + 0.1, "seconds": cost, "tflop": cost / 10}
            final |= {"finetune_seconds": 30.0, "finetune_tflop": 5.0}
            if name == s3l.FULL:
                for control, accuracy in ((s3l.SCRATCH, 0.3), (s3l.ANEW, 0.6)):
                    beside = {"finetune": accuracy, "finetune_seconds": 30.0, "finetune_tflop": 5.0}
                    final |= {f"{control}: {key}": value for key, value in beside.items()}
            settings = asdict(replace(config, seed=seed))
            runs.append({"name": name, "seed": seed, "config": settings, "hardware": "a laptop", "final": final,
                         "epochs": [{"seconds": cost}], "controls": {}, "data": "", "method": "ours"})  # fmt: skip
    return runs


def test_the_figure_is_drawn_and_says_what_the_figures_say(tmp_path, monkeypatch):
    titles, finish = [], plots.finish
    monkeypatch.setattr(
        plots, "finish", lambda figure, title, *given: (titles.append(title), finish(figure, title, *given))
    )
    for i, seeds in enumerate(((0, 1, 2), (0,))):
        s3l.draw(invented(["all three"], seeds), tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 10_000
    assert "all three +10.0 ± 0.8 (40 %)" in titles[0] and "small data +0.0 ± 0.8 (40 %)" in titles[0]
    lines = s3l.table(invented(["all three"])).splitlines()
    assert "| all three | 20 | 2 | 30 | 5 | 51.0 ± 1.0 | 51.0 ± 1.0 | 61.0 ± 1.0 | 3 |" in lines
    assert "| from scratch | 0 | 0 | 30 | 5 | - | - | 30.0 ± 0.0 | 3 |" in lines
    assert "| full, last stage anew | 50 | 5 | 30 | 5 | - | - | 60.0 ± 0.0 | 3 |" in lines
    runs = [run | {"final": {k: v for k, v in run["final"].items() if ": " not in k}} for run in invented()]
    assert not any(control in s3l.table(runs) for control in (s3l.SCRATCH, s3l.ANEW)), "those not measured are left out"
