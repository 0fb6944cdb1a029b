"""Run a set of configurations over seeds, a process each, and keep their figures in one small JSON file.

The file under figures/results/ holds {"runs": [...]}, one entry a finished run with its configuration, seed, hardware,
date, figures of every epoch and final accuracies. A run whose configuration and seed are in it already is not repeated,
so a sweep can be interrupted at any point and called again.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results"

import torch
from tqdm import tqdm

from config import Config
from data import UserError
from eval_linear import evaluate, hardware
from runs import read_checkpoint
from train import load_dataset, train

# What does not change a result, and is therefore no part of a run's identity.
IRRELEVANT = ("out", "data_dir", "device", "compile", "workers", "cache_gb", "knn_every")


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options that every script of measured figures has."""
    parser.add_argument("--dataset", default="folder", help="as in train.py [folder]")
    parser.add_argument("--data-dir", default="data", help="as in train.py [data]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, sharing the cores [2]")
    return parser


def identity(config: dict, seed: int) -> str:
    return json.dumps({k: v for k, v in (config | {"seed": seed}).items() if k not in IRRELEVANT}, sort_keys=True)


def read(file: Path) -> list[dict]:
    """The finished runs of a results file, none if it does not exist. Raises UserError if it is damaged."""
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text())["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it and run the script again to make it anew") from error


def write(file: Path, runs: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    part.replace(file)


def run_one(name: str, config: Config, threads: int, controls: bool) -> dict:
    """Train, evaluate and throw the run's folder away: what is left is its entry in the results."""
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(threads)
    folder = tempfile.mkdtemp(prefix="sweep-")
    try:
        train(replace(config, out=folder))
        checkpoint = read_checkpoint(folder)
        final = evaluate(checkpoint, load_dataset(config), device=config.device, controls=controls, quiet=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "name": name, "method": "ours", "seed": config.seed, "config": asdict(replace(config, out="", data_dir="")),
        "hardware": f"{hardware(config.device)}, {threads} thread{'s' * (threads > 1)}", "date": time.strftime("%Y-%m-%d"),
        "epochs": checkpoint["history"], "final": final["trained"], "controls": {k: v for k, v in final.items() if k != "trained"},
    }  # fmt: skip


def sweep(file: Path, points: dict[str, Config], seeds=(0, 1, 2), jobs: int = 2, controls: bool = False) -> list[dict]:
    """All runs of points x seeds, from the file or made now, `jobs` at a time; returned in the order of the points."""
    runs = read(file)
    known = {identity(run["config"], run["seed"]) for run in runs}
    wanted = [(name, replace(config, seed=seed)) for seed in seeds for name, config in points.items()]
    missing = [(name, c) for name, c in wanted if identity(asdict(c), c.seed) not in known]
    if missing:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(run_one, name, config, threads, controls) for name, config in missing]
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc=file.stem, unit="run", smoothing=0):
                    runs.append(future.result())
                    write(file, runs)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    found = {identity(run["config"], run["seed"]): run for run in runs}
    return [
        found[identity(asdict(c), c.seed)] | {"name": name}
        for name, c in sorted(wanted, key=lambda w: list(points).index(w[0]))
    ]


def mean_and_spread(runs: list[dict], name: str, figure: str) -> tuple[float, float, int]:
    """Mean and standard deviation over the seeds of a point, in percent, and how many seeds there are."""
    values = torch.tensor([100 * run["final"][figure] for run in runs if run["name"] == name], dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else float("nan"), len(values)
