"""Two processes make the run of one, and a process that dies ends it with a message."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import Forked, group

from lab import ranks
from lab.backbones import encoder_of
from lab.train import main, train
from plumbing.runs import read_checkpoint

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
OPTIONS = {
    "plain": {},
    "sampled": {"negatives": 10, "cutmix": 0.5, "lam": 5.0},
    "streamed": {"similarity_gb": 1e-9, "lam": 1.0, "kl_temperature": 0.1},
    "sharded": {"shard_bank": True, "lam": 1.0, "kl_temperature": 0.1},
    "sharded npid": {"shard_bank": True, "bank_update": "npid"},
    "bf16": {"precision": "bf16"},
    "crops": {"views": "sslight"},
    "crops streamed": {"views": "multicrop", "similarity_gb": 1e-9},
    "crops sampled": {"views": "twice", "negatives": 10},
    "crops sharded": {"views": "sslight", "shard_bank": True},
    "random": {"bank_init": "random", "shard_bank": True},
}


@pytest.fixture
def one_thread():
    """As the processes have it: rounding depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_make_the_run_of_one(lab_config, tmp_path, one_thread):
    calm = {"lr": 0.01, "epochs": 1, "warmup": 0.0, "subset": 31, "knn_every": 0}  # one step: rounding grows with each
    single = {
        name: train(lab_config(**(calm | options), out=str(tmp_path / name))) for name, options in OPTIONS.items()
    }

    def pairs(_):
        for name, options in OPTIONS.items():
            train(lab_config(**(calm | options), out=str(tmp_path / f"two {name}")))
        ranks.stop()

    with group(pairs) as processes:
        (status, printed, error), (other, *_) = (process.ended() for process in processes)
    assert status == other == 0, error
    assert printed.count("2 processes") == len(OPTIONS)
    for name, alone in single.items():
        history = [json.loads(line) for line in (tmp_path / f"two {name}" / "metrics.jsonl").read_text().splitlines()]
        coarse = OPTIONS[name].get("precision") == "bf16"
        assert history[-1]["nce"] == pytest.approx(alone["nce"], rel=1e-2 if coarse else 1e-4), name
        if coarse:
            continue
        assert history[-1]["sqrt_kl"] == pytest.approx(alone["sqrt_kl"], rel=1e-3), name
        one, two = (read_checkpoint(str(tmp_path / place)) for place in (name, f"two {name}"))
        torch.testing.assert_close(two["bank"]["weight"], one["bank"]["weight"], rtol=0, atol=2e-3)
        assert one["encoder"].keys() == two["encoder"].keys()
        assert one["step"] == two["step"] == one["config"]["subset"] // 16
        start = encoder_of(one["config"]).state_dict()
        for key, value in one["encoder"].items():
            moved = (value - start[key]).float().norm()
            assert (two["encoder"][key] - value).float().norm() <= 0.01 * moved + 1e-6, (name, key)


def workers(parent: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes by Linux's /proc")
def test_a_process_that_dies_ends_the_run_and_another_number_of_them_goes_on(flags, tmp_path):
    line = ["-m", "lab.train", *flags(epochs=500, knn_every=0, subset=32, window=0), "--shard-bank"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen([*TORCHRUN, *line], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        started = time.monotonic()
        while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < started + 100:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        error = process.communicate(timeout=100)[1]
    assert process.returncode != 0 and ("is gone" in error or "stopped after step" in error)
    step = read_checkpoint(str(tmp_path / "run"))["step"]
    assert step > 0
    with Forked(main, ["--resume", tmp_path / "run"]) as process:
        process.wait_for(lambda: read_checkpoint(str(tmp_path / "run"))["step"] > step)
        os.kill(process.pid, signal.SIGINT)
        status, _, error = process.ended()
    assert status == 130 and "stopped after step" in error


def test_a_batch_that_cannot_be_shared_out_is_one_line(flags):
    with group(main, flags(batch_size=15)) as processes:
        (first, _, said), (second, _, more) = (process.ended() for process in processes)
    assert first == second == 2, more
    said = [line for line in (said + more).splitlines() if line.startswith("lab.train:")]
    assert said == ["lab.train: --batch-size 15 cannot be shared out evenly among 2 processes"]


def test_ctrl_c_at_one_process_stops_and_saves_all_of_them(flags, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    with group(main, [*flags(epochs=500, knn_every=0, subset=32), "--views", "twice"]) as processes:
        processes[0].wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
        os.kill(processes[1].pid, signal.SIGINT)
        (first, _, error), (second, _, more) = (process.ended() for process in processes)
    said = [line for line in (error + more).splitlines() if line.startswith("stopped after step")]
    assert len(said) == 1 and said[0].endswith(f"python -m lab.train --resume {tmp_path / 'run'}"), error
    assert first == second == 130 and read_checkpoint(str(tmp_path / "run"))["config"]["device"] == "cpu"
