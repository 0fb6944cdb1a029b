"""The README names files, functions, flags and make targets: each of them exists."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

import eval_detection
import eval_linear
from config import Config, flag

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
MODULES = {path.stem for path in ROOT.glob("*.py")}
EVALUATIONS = "".join(Path(module.__file__).read_text() for module in (eval_linear, eval_detection))
EVAL_FLAGS = set(re.findall(r'"(--[a-z-]+)"', EVALUATIONS))
SWEEP_FLAGS = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "figures" / "sweep.py").read_text()))
SCRIPT_FLAGS = SWEEP_FLAGS | {
    "--recipe",
    "--resume",
    "--overwrite",
    "--help",
    "--nproc-per-node",  # torchrun's
    "--bank",
    "--loss",
}  # the last two are those of tests/conftest.py


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", TEXT))))
def test_every_function_named_exists(name):
    module, *attributes = name.split(".")
    if attributes[-1] in ("json", "jsonl", "png", "pt"):
        return  # what a run writes
    if module not in MODULES or attributes == ["py"]:
        assert (ROOT / name).exists()
        return
    found = importlib.import_module(module)
    for attribute in attributes:
        # a buffer or a dataclass field without a default is annotated, not an attribute of the class
        found = getattr(found, attribute, None) or found.__annotations__[attribute]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))))
def test_every_flag_named_exists(name):
    assert name in {flag(f.name) for f in fields(Config)} | EVAL_FLAGS | SCRIPT_FLAGS


def test_every_file_and_target_named_exists():
    for path in re.findall(r"(?:figures|tests|docs)/[\w./-]+\.(?:py|md|png|json)", TEXT):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z]+)", TEXT)) <= targets


@pytest.mark.parametrize("number", range(1, 6))
def test_every_figure_of_the_paper_has_its_script_in_the_map(number):
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| Figure {number}, "))
    assert re.search(rf"`figures/fig{number}_\w+\.py`", row)
