"""The command line of lab.train: what goes together, what is refused, growing views."""

import os
import signal

import pytest
import torch

import train as core
from lab import train as program
from lab.train import build, train
from plumbing.command_line import UserError, python
from plumbing.runs import Interrupted, read_checkpoint


def assert_one_line(capsys, message):
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line and "images/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("lab.train: ") and message in lines[0], printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "not/there"}, "--data-dir not/there: no such folder"),
        ({"batch_size": 97}, "--batch-size 97 is larger than the dataset, which has 96 training images"),
        ({"arch": "resnet9"}, "choose from resnet10, resnet18, resnet34, resnet50, mobilenet_v2"),
        ({"bank_init": "zero"}, "--bank-init: unknown 'zero', choose from forward, random, carry"),
        ({"method": "best"}, "--method: unknown 'best', choose from ours, simclr"),
        ({"arch": "mobilenet_v2", "width": 8}, "--width is an option of"),
        ({"arch": "vit_tiny", "width": 0, "size": 17}, "--arch vit_tiny --size 17"),
        ({"arch": "vit_tiny", "width": 0, "eval_size": 32}, "--eval-size: vit_tiny knows one side only, its --size 16"),
        ({"init_from": "not/there"}, "not/there: no checkpoint there"),
        ({"views": "twice", "cutmix": 0.5}, "--cutmix mixes single views"),
        ({"similarity_gb": 0}, "--similarity-gb must be greater than 0"),
        ({"size_start": 24}, "--size-start: at most --size 16"),
        ({"size_start": 8, "views": "sslight"}, "--size-start: at most --size 16, with --views single or twice"),
        ({"size_start": 8, "arch": "vit_tiny", "width": 0}, "--size-start: vit_tiny cuts images of one size"),
        ({"method": "swav", "branch_setting": 0.3}, "--branch-setting 0.3: --method swav takes 1 or more"),
        ({"method": "byol", "branch_setting": 5}, "--branch-setting 5: --method byol takes m, at most 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, tmp_path, capsys, options, message):
    assert program.main(flags(**options)) == 2
    assert_one_line(capsys, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"bank_dtype": "bf16"}, {"similarity_gb": 1e-9}, {"shard_bank": True}])
def test_a_bank_or_loss_of_ones_own_is_not_passed_over_in_silence(lab_config, tmp_path, option):
    for name in ("bank", "loss"):
        file = tmp_path / f"my_{name}.py"
        file.write_text("from bank import MemoryBank" if name == "bank" else "from loss import nce")
        config = lab_config(window=0, **{name: str(file)} | option)
        if name == "loss" and "bank_dtype" in option:
            build(config, 96, torch.device("cpu"))
            continue
        with pytest.raises(UserError, match=f"^--{name} "):
            build(config, 96, torch.device("cpu"))
    assert {"bank", "loss"} <= lab_config(method="simclr").ignored().keys()


def test_a_window_means_nothing_to_a_method_without_one(lab_config):
    lab_config(method="simclr", batch_size=40, window=32).check_for(96)
    with pytest.raises(UserError, match="--window 32 is smaller than a batch of 40"):
        lab_config(batch_size=40, window=32).check_for(96)


def test_a_run_goes_through_the_command_line_and_is_not_overwritten_by_accident(flags, tmp_path, capsys):
    assert program.main([*flags(epochs=1), "--views", "twice", "--recipe", "laptop"]) == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out.splitlines()[-1] == f"evaluate it with: {python()} -m lab.evaluate {run}"
    assert program.main(flags()) == 2
    assert_one_line(capsys, "holds a run: --resume")
    assert program.main(["--resume", str(run), "--views", "single"]) == 2
    assert_one_line(capsys, "the run has --views twice, it cannot go on with single")
    assert core.main(["--resume", str(run)]) == 2, "the core does not know the settings"


def interrupt(config, monkeypatch):
    """Train until a signal comes in the second epoch."""
    rate = core.learning_rate

    def interrupted(config, step, per_epoch):
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(config, step, per_epoch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="go on with: .*python -m lab.train --resume"):
        patch.setattr(core, "learning_rate", interrupted)
        train(config)
    assert read_checkpoint(config.out)["step"] == 9


def assert_ends_alike(one, other):
    one, other = read_checkpoint(one), read_checkpoint(other)
    assert one["step"] == other["step"] == 12 and torch.equal(one["bank"]["weight"], other["bank"]["weight"])
    assert all(torch.equal(one["encoder"][name], weight) for name, weight in other["encoder"].items())


@pytest.mark.parametrize("options", [{"views": "sslight"}, {"size_start": 8}, {"bank_dtype": "bf16"}], ids=str)
def test_an_interrupted_run_goes_on_to_the_same_end(lab_config, tmp_path, monkeypatch, options):
    whole = train(lab_config(out=str(tmp_path / "whole"), **options))["out"]
    interrupt(lab_config(**options), monkeypatch)
    assert program.main(["--resume", lab_config().out]) == 0
    assert_ends_alike(lab_config().out, whole)


def test_views_grow_from_their_first_side_to_their_last_over_three_quarters_of_a_run(lab_config, monkeypatch):
    config = lab_config(size=16, size_start=8, epochs=4)
    assert [program.view_side(config, k / 8) for k in range(9)] == [8, 10, 10, 12, 14, 14, 16, 16, 16]
    assert program.view_side(lab_config(size=16), 0.0) == 16
    seen, step = [], core.Pretraining.step

    def look(run, pixels, index, lr):
        views = run.look(pixels, index).views
        seen.extend({view.shape[-1] for view in (views if isinstance(views, list) else [views])})
        return step(run, pixels, index, lr)

    monkeypatch.setattr(core.Pretraining, "step", look)
    for views in ("single", "twice"):
        seen.clear()
        train(lab_config(size=16, size_start=8, epochs=4, views=views))
        assert seen == [program.view_side(config, k / 24) for k in range(24)] and (seen[0], seen[-1]) == (8, 16)


def test_compile_compiles_the_encoder_and_changes_no_result(lab_config, tmp_path, monkeypatch):
    compiled, asked = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module: asked.append(module) or compiled(module, backend="eager"))
    options = {"epochs": 1, "views": "sslight"}
    results = [train(lab_config(out=str(tmp_path / str(on)), compile=on, **options)) for on in (False, True)]
    assert len(asked) == 1 and results[0]["nce"] == pytest.approx(results[1]["nce"], rel=1e-4)


def test_defaults_are_those_of_the_core(lab_config):
    core_settings, settings = vars(core.Config()), vars(program.LabConfig())
    assert {name: settings[name] for name in core_settings} == core_settings
    assert type(build(program.LabConfig(device="cpu"), 10_000, torch.device("cpu"))).__mro__[1] is core.Pretraining


@pytest.mark.parametrize("option", ["--shard-bank", "--bank-dtype bf16", "--bank-init carry"])
def test_a_bank_of_one_window_is_not_a_large_one(option, lab_config):
    options = {"--shard-bank": {"shard_bank": True}, "--bank-dtype bf16": {"bank_dtype": "bf16"}}
    options["--bank-init carry"] = {"bank_init": "carry", "init_from": "x"}
    lab_config(**options[option]).check()
    with pytest.raises(UserError, match=f"{option} is for a bank of all images: add --window 0"):
        lab_config(**options[option], window=32).check()
