"""What needs a GPU, with toy sizes on a CPU: it runs, stops in time and goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from figures import sweep
from lab.studies import paper_scale, throughput
from lab.train import LabConfig
from train import RECIPES

SCRIPT = sweep.ROOT / "lab" / "studies" / "paper_scale.sh"


def start(*parts, **variables):
    return subprocess.Popen(
        [SCRIPT, *parts], env=os.environ | {k: str(v) for k, v in variables.items()}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def images(tmp_path):
    """As many images as --scale demo takes, of noise."""
    for split, count in (("train", 1000), ("test", 40)):
        for i, pixels in enumerate(np.random.default_rng(0).integers(256, size=(count, 16, 16, 3), dtype=np.uint8)):
            folder = tmp_path / "images" / split / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_a_part_that_is_stopped_goes_on_at_its_last_epoch(tmp_path, images, capsys, forked_sweep):
    """Its command goes on, without a shell: those that follow show which command a part is."""
    kept, results = tmp_path / "kept", tmp_path / "results" / "paper_scale-demo.json"
    variables = {"TOY": 1, "PYTHON": sys.executable, "KEEP": kept, "RESULTS": results.parent, "DATA": images}
    variables["OMP_NUM_THREADS"] = 1

    def epochs():
        return [json.loads(row) for file in kept.glob("*/metrics.jsonl") for row in file.read_text().splitlines()]

    process = start("a", **variables)
    while not epochs() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=600)[1]
    before = epochs()
    if process.returncode != 0:  # it may just have finished
        assert process.returncode == 75 and "stopped; the same command goes on" in error and "Traceback" not in error
        assert 1 <= len(before) < 4 and not results.exists()

    line = next(line for line in error.splitlines() if " -m lab.studies.paper_scale " in line)
    assert paper_scale.main(shlex.split(line.partition(" -m lab.studies.paper_scale ")[2])) == 0
    out = capsys.readouterr().out
    (run,) = sweep.read(results)
    clock = [row["seconds"] for row in run["epochs"]]
    assert run["name"] == "gpu" and len(clock) == 4 and clock == sorted(clock)
    assert run["epochs"][: len(before)] == before, "no epoch is made again"
    assert out.splitlines()[-1].startswith("| gpu | 4 | ")


STUB = """#!/usr/bin/env bash
echo "$*" >> {log}
if [ -e {slow} ]; then exec sleep 20; fi
exit $(cat {status})
"""


@pytest.fixture
def stub(tmp_path):
    """Stands in for Python: notes its arguments. Returns the script's variables and the notes."""
    log, slow, status = (tmp_path / name for name in ("log", "slow", "status"))
    status.write_text("0")
    program = tmp_path / "python"
    program.write_text(STUB.format(log=log, slow=slow, status=status))
    program.chmod(0o755)
    variables = {"PYTHON": program, "RESULTS": tmp_path / "results", "DATA": tmp_path}
    return variables, lambda: [line for line in log.read_text().splitlines() if line.startswith("-m ")]


def finish(process):
    out, error = process.communicate(timeout=60)
    return process.returncode, error


def test_parts_run_most_valuable_first_at_paper_scale(stub, tmp_path):
    variables, noted = stub
    assert finish(start(**variables, SEEDS="0 1", JOBS=3))[0] == 0
    assert [line.split(" --")[0].removeprefix("-m ") for line in noted()] == [
        "lab.studies.paper_scale gpu", "lab.studies.paper_scale released", "figures.fig3_convergence",
        "figures.fig5_lambda", "figures.fig4_momentum", "lab.studies.throughput", "lab.studies.paper_scale field",
        "lab.bench overhead", "lab.bench input", "lab.bench bank", "lab.bench field", "lab.studies.throughput",
        "lab.studies.speed",
    ]  # fmt: skip
    for line in noted()[:5]:
        assert f"--scale paper --device cuda --seeds 0 1 --jobs 3 --results {tmp_path}/results/" in line
        assert line.endswith(f"-paper.json --dataset folder --data-dir {tmp_path}")
    assert all("--device cuda" in line for line in noted())


def test_what_bench_wrote_is_not_measured_again(stub, tmp_path):
    variables, noted = stub
    (tmp_path / "results" / "bench").mkdir(parents=True)
    for name in ("overhead", "throughput"):
        (tmp_path / "results" / "bench" / f"{name}-cuda.json").touch()
    assert finish(start("g", **variables))[0] == 0
    assert [line.split()[1] for line in noted()] == ["lab.bench"] * 3 + ["lab.studies.speed"]


def test_time_that_is_up_stops_what_runs_and_starts_nothing_more(stub, tmp_path):
    variables, noted = stub
    (tmp_path / "slow").touch()
    began = time.monotonic()
    status, error = finish(start("a", "b", **variables, TOY=1, MINUTES=0.07))
    assert status == 75 and "time is up; the same command goes on" in error and time.monotonic() - began < 15
    assert len(noted()) == 1
    (tmp_path / "slow").unlink()
    status, error = finish(start("a", "b", **variables, TOY=1))
    assert status == 0 and error.splitlines()[-1] == "all done: a b"
    assert noted()[0] == noted()[1] and len(noted()) == 3


def test_a_part_that_fails_ends_it_with_its_status(stub, tmp_path):
    variables, noted = stub
    (tmp_path / "status").write_text("2")
    assert finish(start("c", "d", **variables, TOY=1))[0] == 2 and len(noted()) == 1
    (tmp_path / "status").write_text("0")
    status, error = finish(start("x", **variables, TOY=1))
    assert status == 2 and error == "paper_scale.sh: no part x, choose from a b c d e f g\n"


def test_an_archive_is_unpacked_once(stub, tmp_path):
    """In a copy of the project's place, where nothing was unpacked before."""
    variables, noted = stub
    copy = tmp_path / "copy" / "lab" / "studies" / SCRIPT.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(SCRIPT.read_bytes())
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "train" / "cat" / "0.jpg").touch()
    subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", tmp_path / "images", "train"], check=True)
    for _ in range(2):
        line = ["bash", str(copy), "a"]
        variables["DATA"] = tmp_path / "x.tar"
        done = subprocess.run(
            line, env=os.environ | {k: str(v) for k, v in variables.items()}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "copy" / "runs" / "unpacked" / "train" / "cat" / "0.jpg").exists()
        assert noted()[-1].endswith("--dataset folder --data-dir runs/unpacked")
    assert "tar" not in done.stderr


# ------------------------------------------------------------------------------------- its scripts


def test_the_recipes_are_run_as_they_are_at_paper_scale():
    base = LabConfig(**(sweep.SCALES["paper"] | dict(dataset="folder", data_dir="x", device="cpu", knn_every=0)))
    rows = paper_scale.points(base, "paper", rates={"gpu": 1000, "simclr": 500, "byol": 400})
    for name in ("gpu", "released"):
        own = {k: v for k, v in RECIPES[name].items() if k != "dataset"}
        assert own.items() <= asdict(rows[name]).items() and rows[name].dataset == "folder" and rows[name].epochs == 200
    simclr, byol = rows["SimCLR, the same time"], rows["BYOL, the same time"]
    assert (simclr.method, simclr.epochs, byol.method, byol.epochs) == ("simclr", 100, "byol", 80)
    chosen = throughput.cases("gpu", "cpu", 1)["simclr"]  # what is measured is what runs
    assert simclr.lr == chosen.lr and simclr.weight_decay == chosen.weight_decay and simclr.arch == "resnet18"
    assert simclr.optimizer == chosen.optimizer and simclr.batch_size == chosen.batch_size
    gpu = replace(rows["gpu"], device="cpu")
    gpu.check()
    assert list(paper_scale.points(base, "paper", group="released")) == ["released"]


def test_the_field_needs_rates_and_says_how_to_measure_them(tmp_path, capsys):
    file = tmp_path / "rates.json"
    for damage in (None, "{", '{"rows": {"gpu": {"images/s": 0}}}'):
        if damage:
            file.write_text(damage)
        assert paper_scale.main(["field", "--scale", "demo", "--rates", str(file)]) == 2
        error = capsys.readouterr().err
        assert f"make it with: python -m lab.studies.throughput --results {file}" in error and error.count("\n") == 1


def test_throughput_is_measured_and_feeds_the_field(tmp_path, capsys):
    file = tmp_path / "x.json"
    line = ["--device", "cpu", "--scale", "0.01", "--steps", "2", "--repeats", "2", "--peak-tflops", "0.5"]
    assert throughput.main([*line, "--results", str(file)]) == 0
    result = json.loads(file.read_text())
    assert (
        list(result["rows"]) == ["gpu", "released", "simclr", "byol"] and result["hardware"] and result["scale"] == 0.01
    )
    for row in result["rows"].values():
        assert row["slowest"] <= row["images/s"] <= row["fastest"] and row["busy"] is None
        assert row["share of peak"] == pytest.approx(row["TFLOP/s"] / 0.5, abs=2e-3) and row["TFLOP/s"] > 0
        assert 0 < sum(row["bound by"].values()) <= 1.01 and len(row["bound by"]) == 8
    assert "gpu is bound by" in capsys.readouterr().out
    assert set(paper_scale.read(file)) == {"gpu", "released", "simclr", "byol"}


def test_two_views_cost_twice_the_operations_of_one():
    device = torch.device("cpu")
    counted = {name: throughput.step_flops(c, device, 0.01) for name, c in throughput.cases("gpu", "cpu", 0.01).items()}
    assert counted["simclr"] > 1.8 * counted["gpu"] and counted["byol"] > counted["simclr"]


def test_a_peak_is_known_given_or_null(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert throughput.peak(cpu, None) is None and throughput.peak(cpu, 2.5) == 2.5
    monkeypatch.setattr(throughput, "pick_precision", lambda *_: "bf16")
    for name, value in {
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H200": 989,
        "Radeon": None,
    }.items():
        monkeypatch.setattr(throughput, "hardware", lambda _, name=name: name)
        assert throughput.peak(gpu, None) == value
    assert throughput.main(["--steps", "0"]) == 2 and throughput.main(["--device", "x"]) == 2
