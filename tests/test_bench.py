"""bench.py at a fraction of its size: that it measures and reports, not what."""

import json

import pytest
import torch

import bench


@pytest.mark.parametrize("part", bench.PARTS)
def test_every_part_runs_and_ends_in_one_json_object(part, tmp_path, capsys):
    line = [
        part,
        "--scale",
        "0.01",
        "--repeats",
        "2",
        "--json",
        "--device",
        "cpu",
        "--picture",
        str(tmp_path / "x.png"),
    ]
    assert bench.main(line) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratio"] > 0 and result["part"] == part and result["hardware"] and result["repeats"] == 2
    assert all(row["low"] <= row["ratio"] <= row["high"] or len(row) < 3 for row in result["rows"].values())
    assert (tmp_path / "x.png").exists() == (part == "bank")


def test_what_is_timed_is_timed_in_turn():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in ("a", "b")}
    seconds = bench.in_turn(calls, torch.device("cpu"), repeats=3, warm=1)
    assert seen == ["a", "b"] * 4 and {len(s) for s in seconds.values()} == {3}
    assert bench.ratio({"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b")["ratio"] == 2.0


@pytest.mark.skipif(not bench.Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_is_that_of_the_call():
    taken = bench.peak_memory(lambda: torch.ones(50 * 2**20 // 4).sum(), torch.device("cpu"))
    assert 40 < taken < 80


@pytest.mark.parametrize(
    "line", [["speed"], ["bank", "--repeats", "0"], ["bank", "--scale", "2"], ["bank", "--device", "x"]]
)
def test_bad_options_are_one_line(line, capsys):
    assert bench.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.py: ") and error.count("\n") == 1
