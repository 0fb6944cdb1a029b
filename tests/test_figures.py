"""The scripts under figures/: what is cached is not run again, what is damaged is named, pictures are drawn."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "figures"))

import ingredients
import neighbours
import sweep as sweeper

from data import UserError
from train import train


def test_a_sweep_runs_what_is_missing_and_only_that(tiny, tmp_path, monkeypatch):
    file, points = tmp_path / "results" / "x.json", {"a": tiny(epochs=1), "b": tiny(epochs=1, lam=1.0)}
    runs = sweeper.sweep(file, {"a": points["a"]}, seeds=(0,), jobs=1, controls=True)
    assert len(runs) == 1 and runs[0]["name"] == "a" and 0 <= runs[0]["final"]["linear"] <= 1
    assert set(runs[0]["controls"]) == {"untrained", "raw"} and len(runs[0]["epochs"]) == 1
    assert runs[0]["config"]["data_dir"] == "", "results name no place on the machine that made them"

    monkeypatch.setattr(sweeper, "ProcessPoolExecutor", None)  # nothing may be run now
    other = {"a": replace(points["a"], data_dir=str(tmp_path))}
    with pytest.raises(UserError, match="measured on other images .* --results"):
        sweeper.sweep(file, other, seeds=(0,))
    moved = {"a, by another name": replace(points["a"], data_dir="elsewhere", out="elsewhere")}
    again = sweeper.sweep(file, moved, seeds=(0,))
    assert again[0]["final"] == runs[0]["final"] and again[0]["name"] == "a, by another name"
    with pytest.raises(TypeError):
        sweeper.sweep(file, points, seeds=(0,))


def test_a_damaged_results_file_is_named_with_what_to_do(tmp_path):
    (tmp_path / "x.json").write_text('{"runs": [')
    with pytest.raises(UserError, match=r"x\.json: damaged .*; delete it and run the script again"):
        sweeper.read(tmp_path / "x.json")
    assert sweeper.read(tmp_path / "none.json") == []


def test_every_row_of_the_ingredients_differs_from_the_others():
    rows = ingredients.points()
    for config in rows.values():
        config.check()
    assert len({sweeper.identity(asdict(config), 0) for config in rows.values()}) == len(rows) >= 5


def test_the_table_shows_mean_and_spread_over_seeds():
    runs = [{"name": "x", "final": {"linear": v, "knn": 0.5}} for v in (0.40, 0.42, 0.44)]
    runs += [{"name": "y", "final": {"linear": 0.3, "knn": 0.2}}]
    lines = ingredients.table(runs).splitlines()
    assert lines[2:] == ["| x | 42.0 ± 2.0 | 50.0 ± 0.0 | 3 |", "| y | 30.0 | 20.0 | 1 |"]


def test_nearest_neighbours_are_drawn(tiny, capsys):
    train(tiny(epochs=1))
    assert neighbours.main([tiny().out]) == 0
    picture = Path(tiny().out) / "neighbours.png"
    assert capsys.readouterr().out.splitlines()[-1] == str(picture) and picture.stat().st_size > 10_000
    assert neighbours.main(["nowhere"]) == 2
    assert capsys.readouterr().err.startswith("neighbours.py: nowhere: no checkpoint there")


def test_committed_results_are_whole():
    for file in sweeper.RESULTS.glob("*.json"):
        for run in json.loads(file.read_text())["runs"]:
            assert run["hardware"] and run["date"] and run["epochs"] and 0 < run["final"]["linear"] < 1, file
            assert run["data"] and not run["config"]["data_dir"] and not run["config"]["out"]
