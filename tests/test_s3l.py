"""S3L on our method: a second stage at another size, a network without its last stage, mixup, and the figure about them."""

import copy
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent / "figures"))

import plots
import s3l
import sweep as sweeper

import eval_linear
import probes
from config import Config
from images import Dataset, Images, UserError
from models import Encoder, build_backbone
from pretraining import Pretraining, start_from
from probes import mixup, train_head
from runs import new_encoder, read_checkpoint, restore_last_stage
from train import load_dataset, seed_of, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(pictures, tmp_path_factory):
    """A run of one epoch at 16 px and one of a network without its last stage: their folders."""
    from conftest import TINY

    root = tmp_path_factory.mktemp("small")
    for name, options in (("whole", {}), ("dropped", {"drop_last_stage": True})):
        train(Config(**(TINY | {"data_dir": str(pictures), "out": str(root / name), "epochs": 1} | options)))
    return {name: str(root / name) for name in ("whole", "dropped")}


# ----------------------------------------------------------------------------------------------- small -> full resolution


class Stop(Exception):
    pass


@pytest.mark.parametrize("start", ["carry", "forward"])
def test_a_second_stage_at_another_size_takes_the_encoder_and_carries_the_bank_or_makes_it_anew(
    start, tiny, small, monkeypatch, tmp_path
):
    before, seen = read_checkpoint(small["whole"]), {}

    def look(self, pixels, index, lr):
        seen.update(
            copy.deepcopy({"encoder": self.encoder.state_dict(), "bank": self.bank.weight}), views=self.augment(pixels)
        )
        raise Stop

    monkeypatch.setattr(Pretraining, "step", look)
    with pytest.raises(Stop):
        train(tiny(size=24, init_from=small["whole"], bank_init=start, out=str(tmp_path / "second"), seed=5))
    assert seen["views"].shape[-1] == 24
    for name, weight in before["encoder"].items():
        if "running" not in name and "num_batches" not in name:  # the forward pass moves BatchNorm's statistics
            assert torch.equal(seen["encoder"][name], weight), name
    expected = before["bank"]["weight"]
    if start == "forward":
        run = Pretraining(tiny(size=24), 96, CPU)
        run.encoder.load_state_dict(before["encoder"])
        torch.manual_seed(seed_of(5, "bank"))
        run.init_bank(load_dataset(tiny()).train)
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
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_written(options, message, tiny, small, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tiny(init_from=small["whole"], out=str(tmp_path / "new"), **options))
    assert not (tmp_path / "new").exists()


def test_a_bank_of_another_number_of_rows_is_refused(tiny, small):
    run = Pretraining(tiny(), 95, CPU)
    with pytest.raises(UserError, match="--init-from x: the run's bank has 96 rows, .* 95 images"):
        run.load_bank(read_checkpoint(small["whole"]), "--init-from x")


def test_a_vision_transformer_knows_one_size(tiny):
    config = tiny(arch="vit_tiny", width=0, init_from="x")
    checkpoint = {"config": asdict(config), "encoder": new_encoder(asdict(config)).state_dict()}
    larger = replace(config, size=24)
    with pytest.raises(UserError, match="--init-from x: its encoder has another shape"):
        start_from(Pretraining(larger, 96, CPU), checkpoint, larger)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bank_init": "carry"}, "--bank-init carry takes the bank of the run that --init-from names"),
        ({"bank_init": "carry", "init_from": "x", "method": "simclr"}, "with --method ours"),
        ({"drop_last_stage": True, "arch": "mobilenet_v2", "width": 0}, "--drop-last-stage is an option of resnet10"),
    ],
)
def test_options_that_make_no_sense_together_are_named(options, message, tiny):
    with pytest.raises(UserError, match=message):
        tiny(**options).check()
    with pytest.raises(ValueError, match="drop_last_stage is an option of"):
        build_backbone("vit_tiny", 16, drop_last_stage=True)


# --------------------------------------------------------------------------------------------------- small architecture


def test_without_its_last_stage_a_resnet_gives_the_pooled_features_of_the_third():
    encoder = Encoder("resnet18", 32, 16, drop_last_stage=True).eval()
    net, x = encoder.backbone, torch.randn(2, 3, 32, 32)
    stages = net.layer3(net.layer2(net.layer1(net.relu(net.bn1(net.conv1(x))))))
    assert encoder.feature_dim == 64
    torch.testing.assert_close(encoder.features(x), stages.mean((2, 3)))
    assert not any(name.startswith("layer4") for name in net.state_dict())


def test_a_run_without_its_last_stage_is_evaluated_fine_tuned_and_exported(small, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    line = [small["dropped"], "--finetune", "--epochs", "1", "--mixup", "1", "--restore-last-stage", "1"]
    assert eval_linear.main([*line, "--json", str(figures)]) == 0
    assert 0 <= json.loads(figures.read_text())["trained"]["finetune"] <= 1
    assert eval_linear.main([small["dropped"], "--export", str(tmp_path / "backbone.pt")]) == 0
    model = torchvision.models.resnet18()
    model.conv1, weights = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.load(tmp_path / "backbone.pt")
    wide = build_backbone("resnet18", 32, drop_last_stage=True).state_dict()  # the same stages, of torchvision's width
    assert {name.split(".")[0] for name in weights} == {name.split(".")[0] for name in wide}
    missing, unexpected = model.load_state_dict(wide, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"layer4", "fc"}
    capsys.readouterr()
    for options, message in (
        (["--mixup", "1"], "belong to fine-tuning: add --finetune"),
        (["--finetune", "--mixup", "-1"], "must be finite and not negative"),
        (["--finetune", "--mixup", "nan"], "must be finite and not negative"),
    ):
        assert eval_linear.main([small["dropped"], *options]) == 2 and message in capsys.readouterr().err
    assert eval_linear.main([small["whole"], "--finetune", "--restore-last-stage", "1"]) == 2
    assert "was trained with all of its stages" in capsys.readouterr().err


def test_the_restored_stage_is_that_of_an_untrained_network_on_top_of_the_trained_ones(small):
    checkpoint = read_checkpoint(small["dropped"])
    config, encoder = checkpoint["config"], new_encoder(checkpoint["config"])
    encoder.load_state_dict(checkpoint["encoder"])
    whole = restore_last_stage(encoder, config)
    fresh = new_encoder(config | {"drop_last_stage": False})
    assert whole.feature_dim == fresh.feature_dim == 2 * encoder.feature_dim
    assert whole.backbone.state_dict().keys() == fresh.backbone.state_dict().keys()
    for name, weight in whole.backbone.state_dict().items():
        source = fresh.backbone if name.startswith("layer4") else encoder.backbone
        assert torch.equal(weight, source.state_dict()[name]), name
    assert whole.features(torch.zeros(2, 3, 16, 16)).shape == (2, whole.feature_dim)


def test_warm_up_moves_the_new_stage_alone_and_fine_tuning_then_moves_all(small, tiny, monkeypatch):
    checkpoint = read_checkpoint(small["dropped"])
    encoder = new_encoder(checkpoint["config"])
    encoder.load_state_dict(checkpoint["encoder"])
    whole, dataset, ends = restore_last_stage(encoder, checkpoint["config"]), load_dataset(tiny()), []

    def look(trained, *rest):
        ends.append(copy.deepcopy(trained.backbone.state_dict()))
        return probes_extract(trained, *rest)

    probes_extract = probes.extract
    monkeypatch.setattr(probes, "extract", look)
    start = copy.deepcopy(whole.backbone.state_dict())
    train_head(whole, dataset, 16, CPU, epochs=0, finetune=True, warmup=2)
    train_head(whole, dataset, 16, CPU, epochs=1, finetune=True, warmup=2)
    moved = [{name for name, w in end.items() if not torch.equal(w, start[name])} for end in ends]
    assert {name for name in start if name.startswith("layer4")} == moved[0], (
        "with BatchNorm's statistics, theirs alone"
    )
    assert moved[1] == set(start)


# ------------------------------------------------------------------------------------------------------------------ mixup


def test_mixup_s_loss_is_the_mixture_of_two_cross_entropies():
    views, labels, logits = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 3)
    torch.manual_seed(3)
    mixed, target = mixup(views, labels, 3, alpha=1.0)
    torch.manual_seed(3)
    share, partner = torch.distributions.Beta(1.0, 1.0).sample(), torch.randperm(6)
    assert 0.05 < share < 0.95 and (labels != labels[partner]).any()
    torch.testing.assert_close(mixed, share * views + (1 - share) * views[partner])
    both = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[partner])
    torch.testing.assert_close(F.cross_entropy(logits, target), both)


def test_fine_tuning_with_mixup_learns_and_without_it_mixes_nothing(monkeypatch):
    labels = torch.arange(64) % 2
    pixels = (60 + 130 * labels[:, None, None, None] + torch.randint(0, 60, (64, 3, 16, 16))).to(torch.uint8)
    images = Images(pixels, labels=labels, side=16)
    dataset, encoder, calls = (
        Dataset(images, images, images, ("dark", "bright")),
        Encoder("resnet10", 16, 8, 16, 2, 16),
        [],
    )
    monkeypatch.setattr(probes, "mixup", lambda *given: (calls.append(given[3]), mixup(*given))[1])
    train_head(encoder, dataset, 16, CPU, epochs=1, finetune=True)
    assert not calls
    accuracy = train_head(encoder, dataset, 16, CPU, epochs=20, finetune=True, alpha=1.0)
    assert calls == [1.0] * 20 and accuracy > 0.9


# ----------------------------------------------------------------------------------------------------------------- figure


def base(scale):
    return Config(**(sweeper.SCALES[scale] | {"knn_every": 0}))


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


def test_the_two_stages_of_a_point_are_run_one_after_the_other_and_measured_together(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(s3l.SCALES, "demo", (16, 64, 2, 1, 1, 1))
    base = tiny(warmup=0.0)
    arms = s3l.points(base, "demo")
    names, measure = ("small -> full, bank carried", "all three", s3l.FULL), s3l.Measure(base, "demo")
    runs = {}
    for name in names:
        config = replace(arms[name], width=8, dim=16, hidden=16, batch_size=16)
        runs[name] = sweeper.run_one(name, config, 1, 0, False, str(tmp_path), False, measure)
    two, three, full = runs.values()
    assert two["config"]["init_from"] == arms[names[0]].init_from, "settings, and no place on this machine"
    (second,) = tmp_path.glob("*-before")
    first, after = read_checkpoint(str(second)), read_checkpoint(str(second).removesuffix("-before"))
    assert first["config"]["size"] == 8 and first["step"] == 8 and after["step"] == 4 and after["config"]["size"] == 16
    stages = (first, after)
    assert two["final"]["seconds"] == pytest.approx(sum(stage["history"][-1]["seconds"] for stage in stages))
    assert two["final"]["tflop"] == pytest.approx(sum(s3l.pretraining_flop(stage["config"]) for stage in stages) / 1e12)
    assert three["final"]["finetune_tflop"] > full["final"]["finetune_tflop"], "the warm-up of the missing stage"
    assert three["final"]["tflop"] < two["final"]["tflop"] < full["final"]["tflop"]
    assert {"from scratch: finetune", "full, last stage anew: finetune", "linear", "knn"} <= full["final"].keys()
    assert full["final"]["full, last stage anew: finetune_tflop"] == three["final"]["finetune_tflop"]
    assert not any("scratch" in key or "anew" in key for key in two["final"])


def test_arithmetic_is_counted():
    encoder = Encoder("resnet10", 16, 8, layers=0)
    first = 16 * 16 * 8 * 3 * 9 * 2  # positions, channels out and in, a kernel of 3 x 3, multiply and add
    assert s3l.forward_flop(encoder.backbone.conv1, 16) == first
    config = asdict(Config(arch="resnet10", width=8, size=16, subset=100, batch_size=32, epochs=2, dim=8, hidden=8))
    one = s3l.forward_flop(new_encoder(config).eval(), 16)
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
        plots, "finish", lambda figure, title, *rest: (titles.append(title), finish(figure, title, *rest))
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
