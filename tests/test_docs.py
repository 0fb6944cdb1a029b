"""The docs name checks, commands and flags: each of them exists."""

import importlib
import json
import math
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import data
from plumbing.command_line import Parser
from plumbing.evaluation import evaluation_options
from plumbing.runs import configure
from train import RECIPES, Config

ROOT = Path(__file__).parent.parent
EXERCISES, DERIVATIONS = (ROOT / name for name in ("EXERCISES.md", "docs/derivations.md"))
READING, USAGE = ((ROOT / "docs" / name).read_text() for name in ("reading.md", "usage.md"))
COMMANDS = re.findall(r"^\.venv/bin/python (.+)$", EXERCISES.read_text(), re.M)
TRIES = re.findall(r"^python (.+)$", READING, re.M)


def checks_of(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", DERIVATIONS.read_text()))))
def test_every_check_named_exists(name):
    file, check = name.split("::")
    assert check in checks_of(file)


def test_every_derivation_ends_in_its_check():
    sections = re.split(r"^## ", DERIVATIONS.read_text(), flags=re.M)[1:]
    assert len(sections) == 10
    for section in sections:
        assert section.rstrip().split("\n\n")[-1].startswith("Checked by `tests/"), section.splitlines()[0]


def test_every_command_picks_checks_that_exist():
    picked = {int(number) for line in COMMANDS for number in re.findall(r"--exercise (\d+)", line)}
    marked = re.findall(r"^@exercise\((\d+)\)", (ROOT / "tests/test_exercises.py").read_text(), re.M)
    assert picked == set(map(int, marked)) and len(picked) > 5


def test_the_numbers_of_the_exercises_are_those_of_their_results_file():
    study = importlib.import_module("lab.studies.exercises")
    runs = json.loads(study.RESULTS.read_text())
    assert EXERCISES.read_text().endswith("\n" + study.table(runs) + "\n")
    for rows in runs.values():
        assert len({row["seed"] for row in rows}) == len(rows)


def test_the_demo_stands_far_above_both_controls():
    """15 points in both columns, with every seed: the demo has to convince."""
    study = importlib.import_module("lab.studies.exercises")
    rows = json.loads(study.RESULTS.read_text())["the demo"]
    assert len(rows) >= 3
    for row in rows:
        for key in ("knn", "linear"):
            assert row["trained"][key] > 15 + max(row["untrained"][key], row["raw"][key])


@pytest.mark.parametrize(
    ("better", "worse", "key", "points"),
    [
        ("2 000 images", "2 000 images, random rows", "knn", 5),
        ("2 000 images, τ = 1", "2 000 images", "linear", 3),
        ("2 000 images", "2 000 images, τ = 0.02", "linear", 10),
        ("2 000 images", "2 000 textured images", "linear", 10),
        ("2 000 textured images, grey", "2 000 textured images", "linear", 1),
        ("2 000 textured images, grey", "2 000 textured images", "knn", 6),
    ],
)
def test_a_lesson_is_larger_than_the_spread(better, worse, key, points):
    """The worst seed of the better run stands above the best seed of the worse one."""
    runs = json.loads(importlib.import_module("lab.studies.exercises").RESULTS.read_text())
    low, high = ([row["trained"][key] for row in runs[name]] for name in (better, worse))
    assert len(low) >= 3 and len(high) >= 3 and min(low) >= max(high) + points


def test_a_bank_that_forgets_too_fast_does_not_fall_below_guessing():
    runs = json.loads(importlib.import_module("lab.studies.exercises").RESULTS.read_text())
    guessing = math.log(1024)
    assert min(row["loss"] for row in runs["2 000 images, m = 0.25"]) > guessing - 0.01
    assert max(row["loss"] for row in runs["2 000 images"]) < guessing - 1.5


@pytest.mark.parametrize("line", sorted({*COMMANDS, *TRIES}))
def test_every_command_can_be_typed(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no run lies in it
    script, *flags = shlex.split(line)
    if line.startswith("-m pytest"):
        assert (ROOT / flags[1]).exists()
        assert set(re.findall(r"--\w+", line)) <= {"--bank", "--loss", "--order", "--newton", "--exercise"}
    elif line.startswith("-m lab.train"):
        lab = importlib.import_module("lab.train")
        assert {flag for flag in flags[1:] if flag.startswith("--")} <= flags_of(lab.LabConfig)
    elif script == "train.py":
        configure(Config, RECIPES, flags, "")
    elif script == "eval_linear.py":
        evaluation_options(Parser(), data.DATASETS).parse_args(flags)
    else:
        file = ROOT / (flags[0].replace(".", "/") + ".py" if script == "-m" else script)
        for flag in (word for word in flags if word.startswith("--")):
            assert f'"{flag}"' in file.read_text()


def flags_of(config) -> set[str]:
    return {"--" + f.name.replace("_", "-") for f in fields(config)}


def test_usage_lists_every_flag_of_both_training_programs():
    section = USAGE.partition("## Which program has which flags")[2].partition("\n## ")[0]
    both = section.partition("| flags of `lab.train` alone")[0]
    named = [set(re.findall(r"--[a-z][a-z-]*", text)) for text in (both, section)]
    assert flags_of(Config) <= named[0]
    assert flags_of(importlib.import_module("lab.train").LabConfig) <= named[1]
