"""A student's own bank and losses train in place of ours; hints print commands that work."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval_linear import main as evaluate
from plumbing import shapes
from plumbing.command_line import python
from plumbing.image_ops import MEAN, STD
from train import main

BANK = """
import torch
import torch.nn.functional as F
from bank import MemoryBank as Ours

class MemoryBank(Ours):
    @torch.no_grad()
    def update(self, z, index, similarity=None, columns=None, target=None, **seen):
        rows = self.weight if columns is None else self.weight[columns]
        target = self.locate(index) if target is None else target
        pull = F.one_hot(target, len(rows)) - (similarity / self.temperature).softmax(1)
        rows = F.normalize(self.momentum * rows + (1 - self.momentum) * pull.T @ z, dim=1)
        self.weight[slice(None) if columns is None else columns] = rows
"""
SGD = dict(optimizer="sgd", lr=0.1, weight_decay=1e-4)  # rounding grows more slowly than with Muon
LOSS = """
def nce(similarity, target, temperature):
    logits = similarity / temperature
    return (logits.logsumexp(1) - logits.gather(1, target[:, None])[:, 0]).mean()
"""


@pytest.fixture
def own(tmp_path):
    """The flags of a bank and a loss of one's own."""
    (tmp_path / "my_bank.py").write_text(BANK)
    (tmp_path / "my_loss.py").write_text(LOSS)
    return ["--bank", str(tmp_path / "my_bank.py"), "--loss", str(tmp_path / "my_loss.py")]


@pytest.mark.parametrize("settings", [dict(negatives=0), dict(negatives=40), dict(window=48, visits=4, negatives=0)])
def test_a_bank_and_a_loss_of_ones_own_reach_our_loss_to_the_printed_digits(flags, own, capsys, tmp_path, settings):
    said = []
    for name, extra in (("ours", []), ("own", own)):
        assert main([*flags(**settings, **SGD, epochs=1, out=tmp_path / name), *extra]) == 0
        said.append(capsys.readouterr().out.split("loss ")[1].split(",")[0])
    assert said[0] == said[1] and float(said[0]) > 1


def test_the_own_bank_is_the_one_that_moves(flags, own, tmp_path):
    Path(own[1]).write_text(BANK.replace("rows = F.normalize", "raise ZeroDivisionError  #"))
    with pytest.raises(ZeroDivisionError):
        main([*flags(negatives=0), *own])


@pytest.mark.parametrize(
    ("flag", "text", "words"),
    [
        ("--bank", None, "no such file"),
        ("--bank", "x = 1", "has no MemoryBank"),
        ("--loss", "def loss(): pass", "has no nce"),
        ("--loss", "def nce(:", "cannot be imported .SyntaxError"),
    ],
)
def test_a_file_that_will_not_do_is_told_in_one_line(flag, text, words, flags, tmp_path, capsys):
    file = tmp_path / "my.py"
    if text is not None:
        file.write_text(text)
    assert main([*flags(), flag, str(file)]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{flag} {file}: " in said and "Traceback" not in said and "\n" not in said
    assert words.split(" .")[0] in said


def test_the_hints_name_a_python_that_has_the_environment(monkeypatch):
    torch_lies_there = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    for path in (os.environ["PATH"], f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "/nowhere"):
        monkeypatch.setenv("PATH", path)
        assert subprocess.run([python(), "-c", torch_lies_there]).returncode == 0
    assert Path(python()).exists() and python() != "python"


@pytest.mark.parametrize("count, kept", [(64, False), (220, True)])
def test_a_run_without_labels_is_sent_to_an_evaluation_that_works_or_to_none(count, kept, flags, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(shapes.draw(count, 0, size=16)[0]):
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(flat / f"{i}.png")
    assert main(flags(data_dir=flat, epochs=1)) == 0
    said = capsys.readouterr().out
    found = re.findall(r"evaluate it with: \S+ eval_linear\.py (\S+)", said)
    assert len(found) == kept and kept != ("figures/page.py" in said)
    for run in found:
        assert evaluate([run, "--device", "cpu"]) == 0 and "recovered" in capsys.readouterr().out.lower()


def test_an_exported_backbone_says_how_its_images_are_prepared(flags, tmp_path, capsys):
    assert main(flags()) == 0
    capsys.readouterr()
    assert evaluate([str(tmp_path / "run"), "--export", str(tmp_path / "b.pt")]) == 0
    said = capsys.readouterr().out
    assert evaluate([str(tmp_path / "run"), "--features", str(tmp_path / "b.npz")]) == 0
    side = re.search(r"images of (\d+) px", capsys.readouterr().out)[1]
    assert str(MEAN) in said and str(STD) in said
    assert side == "16" and f"(1, 3, {side}, {side}), the central square of a picture" in said


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_exported_lines_prepare_a_photograph_as_an_evaluation_does(flags, tmp_path, monkeypatch, fit):
    """They give the features of --features; a picture pressed into a square has others."""
    monkeypatch.setattr("plumbing.features.pick_precision", lambda *_: "fp32")
    (tmp_path / "photos").mkdir()
    for i, noise in enumerate(np.random.default_rng(0).integers(0, 256, (32, 6, 12, 3), dtype=np.uint8)):
        Image.fromarray(noise).resize((240, 120), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{i}.png")
    assert main(flags(data_dir=tmp_path / "photos", fit=fit, epochs=2, size=32, eval_size=64)) == 0
    monkeypatch.chdir(tmp_path)
    for option in (["--export", "b.pt"], ["--features", "f.npz"]):
        assert evaluate(["run", *option]) == 0
    exec("\n".join(json.loads(Path("b.json").read_text())["lines"]), names := {})
    expected = np.load("f.npz")
    pressed = names["normalize"](torch.stack([pressed_picture(path) for path in expected["paths"]]))
    with torch.no_grad():
        exported = torch.cat([names["model"](names["prepared"](f"photos/{path}")) for path in expected["paths"]])
        other = names["model"](pressed)
    rows = torch.from_numpy(expected["features"])
    assert len(rows) == 32
    assert (exported - rows).norm() < 0.05 * (other - rows).norm()


def pressed_picture(name):
    image = Image.open(Path("photos") / str(name)).resize((64, 64), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1) / 255).float()


def test_resuming_runs_no_code_that_only_the_checkpoint_names(flags, tmp_path, capsys):
    file = tmp_path / "my_bank.py"
    file.write_text("from bank import MemoryBank as Ours\n\nclass MemoryBank(Ours):\n    pass\n")
    assert main([*flags(), "--bank", str(file)]) == 0
    capsys.readouterr()
    run = str(tmp_path / "run")
    assert main(["--resume", run]) == 2
    assert f"the run was trained with --bank {file}: name the file again" in capsys.readouterr().err
    assert main(["--resume", run, "--bank", str(file)]) == 0
