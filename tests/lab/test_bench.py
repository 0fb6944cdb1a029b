"""Benchmarks at a fraction of their size: that they measure and report, not what."""

import contextlib
import io
import json
import sys

import pytest
import torch

from lab import bench, measure
from lab.studies import speed


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A function that runs a benchmark once, and gives its file and what it printed."""
    folder, printed = tmp_path_factory.mktemp("bench"), {}

    def run(name):
        file = folder / f"{name}-cpu.json"
        if name not in printed:
            if name == "field":
                pytest.importorskip("lightly")
            line = [name, "--scale", "0.01", "--repeats", "2", "--json", "--device", "cpu", "--results", str(file)]
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert bench.main(line) == 0
            printed[name] = out.getvalue()
        return file, printed[name]

    return run


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_every_benchmark_runs_and_writes_what_it_measured(name, measured):
    file, printed = measured(name)
    result = json.loads(printed.splitlines()[-1])
    assert result == json.loads(file.read_text())
    assert result["ratio"] > 0 and result["part"] == name and result["hardware"] and result["repeats"] == 2
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in result["rows"].values())


def test_the_picture_of_speed_is_drawn_from_what_bench_writes(measured, tmp_path, capsys):
    for name in speed.BENCHMARKS:
        file, _ = measured(name)
        (tmp_path / file.name).write_bytes(file.read_bytes())
    picture = tmp_path / "x.png"
    assert speed.main(["--results", str(tmp_path), "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000

    (tmp_path / "field-cpu.json").write_text("{")
    (tmp_path / "bank-cpu.json").unlink()
    for name, word in (("field", "damaged"), ("bank", "missing")):
        assert speed.main(["--results", str(tmp_path), "--picture", str(tmp_path / "y.png")]) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1
        assert f"python -m lab.bench {name} --device cpu --results" in error
        (tmp_path / f"{name}-cpu.json").write_text((tmp_path / "overhead-cpu.json").read_text())
    assert not (tmp_path / "y.png").exists()


def test_nothing_is_written_unless_a_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "BENCHMARKS", {"bank": lambda *_: {"ratio": 1.0, "rows": {"N = 1": {"ratio": 1.0}}}})
    monkeypatch.setattr(bench, "save_text", None)
    monkeypatch.chdir(tmp_path)
    assert bench.main(["bank", "--device", "cpu"]) == 0 and not list(tmp_path.iterdir())


def test_the_bank_at_a_small_scale_has_few_rows(monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 1.0)
    rows = bench.bank(torch.device("cpu"), 1, 0.001, dim=4, batch=4)["rows"]
    assert list(rows) == ["N = 1000", "N = 1281"]


def test_the_bank_is_measured_with_all_of_its_rows_held_and_streamed():
    calls = bench.bank_calls(60_000, 4, 16, torch.device("cpu"))
    held, streamed = (measure.peak_memory(call, torch.device("cpu")) for call in calls)
    assert held > 16 * 60_000 * 4 / 2**20 and streamed < held / 2, "similarities (B, N) in float32"


def test_what_is_timed_is_timed_in_turn():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in ("a", "b")}
    seconds = measure.in_turn(calls, torch.device("cpu"), repeats=3, warm=1)
    assert seen == ["a", "b"] * 4 and {len(s) for s in seconds.values()} == {3}
    assert measure.ratio({"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b")["ratio"] == 2.0


def test_peak_memory_is_that_of_the_call_and_not_of_what_was_held_before():
    before = torch.ones(10 * 2**18)

    def call():
        nonlocal before
        before = None  # 10 MiB given back
        first = torch.ones(50 * 2**18)  # 50 MiB
        second = first * 2
        del first
        return second + 1

    assert measure.peak_memory(call, torch.device("cpu")) == pytest.approx(100, abs=0.1)


def test_two_views_leave_twice_the_activations_of_one():
    convolve = torch.nn.Conv2d(3, 32, 3)
    one, two = torch.ones(8, 3, 64, 64), torch.ones(16, 3, 64, 64)
    taken = [measure.peak_memory(lambda x=x: convolve(x).relu(), torch.device("cpu")) for x in (one, two)]
    assert taken[1] == pytest.approx(2 * taken[0], rel=0.1) and taken[0] > 3


def test_without_lightly_field_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    monkeypatch.delitem(sys.modules, "lab.baselines", raising=False)
    monkeypatch.delattr("lab.baselines", raising=False)
    assert bench.main(["field", "--scale", "0.01"]) == 2
    error = capsys.readouterr().err
    assert "pip install -r requirements-bench.txt" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        ["speed"],
        ["bank", "--repeats", "0"],
        ["bank", "--scale", "2"],
        ["bank", "--device", "x"],
        ["bank", "--results", "."],
    ],
)
def test_bad_options_are_one_line(line, capsys):
    assert bench.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.py: ") and error.count("\n") == 1
