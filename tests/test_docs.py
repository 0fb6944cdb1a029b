"""EXERCISES.md and docs/derivations.md name checks, scripts, flags and files: each of them exists, and no derivation goes unchecked."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

import eval_linear
from config import parse

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "figures"), str(ROOT / "tests")]
EXERCISES, DERIVATIONS = (ROOT / name for name in ("EXERCISES.md", "docs/derivations.md"))
COMMANDS = re.findall(r"^\.venv/bin/python (.+)$", EXERCISES.read_text(), re.M)


def checks_of(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/\w+\.py::\w+)`", DERIVATIONS.read_text()))))
def test_every_check_named_exists(name):
    file, check = name.split("::")
    assert check in checks_of(file)


def test_every_derivation_ends_in_its_check():
    sections = re.split(r"^## ", DERIVATIONS.read_text(), flags=re.M)[1:]
    assert len(sections) == 8
    for section in sections:
        assert section.rstrip().split("\n\n")[-1].startswith("Checked by `tests/"), section.splitlines()[0]


def test_every_command_picks_checks_that_exist():
    picked = [word for line in COMMANDS for words in re.findall(r'-k "?([\w ]+)', line) for word in words.split(" or ")]
    assert len(picked) > 5
    for word in picked:
        assert any(word in check for check in checks_of("tests/test_exercises.py")), word


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_every_command_can_be_typed(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no run lies yet
    script, *flags = shlex.split(line)
    if script == "-m":
        assert flags[0] == "pytest" and (ROOT / flags[1]).exists()
        assert set(re.findall(r"--\w+", line)) <= {"--bank", "--loss"}
    elif script == "train.py":
        parse(flags, "")
    elif script == "eval_linear.py":
        eval_linear.parse(flags)
    else:
        module = importlib.import_module(Path(script).stem)
        for flag in (word for word in flags if word.startswith("--")):
            assert f'"{flag}"' in Path(module.__file__).read_text()


def test_every_link_leads_somewhere():
    for file in (EXERCISES, DERIVATIONS):
        for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
            assert (file.parent / target).exists(), target
        for target in re.findall(r"`(figures/results/\w+\.png)`", file.read_text()):
            assert (ROOT / target).exists(), target
