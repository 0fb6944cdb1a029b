"""Run a set of configurations over seeds, a process each, and keep their figures in one small JSON file.

The file under figures/results/ holds {"runs": [...]}, one entry a finished run with its configuration, seed, hardware,
date, figures of every epoch and final accuracies. A run whose configuration and seed are in it already is not repeated,
so a sweep can be interrupted at any point and called again.
"""

import argparse
import hashlib
import json
import os
import re
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

from config import FREE_ON_RESUME, Config, Parser
from data import UserError
from eval_linear import evaluate, hardware
from runs import read_checkpoint, save_text
from train import load_dataset, train


def arguments(description: str, results: str, argv: list[str] | None) -> argparse.Namespace:
    """The options that every script of measured figures has."""
    parser = Parser(description=description)
    parser.add_argument("--dataset", default="folder", help="as in train.py [folder]")
    parser.add_argument("--data-dir", default="data", help="as in train.py [data]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--keep", default="", metavar="DIR", help="keep the runs' folders in there")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, sharing the cores [2]")
    parser.add_argument("--results", type=Path, default=RESULTS / results, help="the file of results [%(default)s]")
    return parser.parse_args(argv)


def identity(config: dict, seed: int) -> str:
    """What makes two runs the same: every setting but where things are and how fast they run.

    A setting that was added after a run was made counts with its default.
    """
    settings = asdict(Config(**(config | {"seed": seed})))
    return json.dumps({k: v for k, v in settings.items() if k not in FREE_ON_RESUME}, sort_keys=True)


def fingerprint(config: Config) -> str:
    """A short hash of a folder of images, by names and sizes of files; empty if they are not here, or not a folder."""
    root = Path(config.data_dir)
    if config.dataset != "folder" or not root.is_dir():
        return ""
    files = sorted((str(p.relative_to(root)), p.stat().st_size) for p in root.rglob("*") if p.is_file())
    return hashlib.blake2s(repr(files).encode(), digest_size=8).hexdigest()


def read(file: Path) -> list[dict]:
    """The finished runs of a results file, none if it does not exist. Raises UserError if it is damaged."""
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text())["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it and run the script again to make it anew") from error


def run_one(name: str, config: Config, threads: int, controls: bool, keep: str) -> dict:
    """Train and evaluate; returns the run's entry in the results. Its folder is thrown away, or kept inside `keep`."""
    torch.set_num_threads(threads)
    folder = (
        f"{keep}/{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{config.seed}"
        if keep
        else tempfile.mkdtemp(prefix="sweep-")
    )
    try:
        train(replace(config, out=folder))
        checkpoint = read_checkpoint(folder)
        final = evaluate(checkpoint, load_dataset(config), device=config.device, controls=controls, quiet=True)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "name": name, "method": "ours", "seed": config.seed, "config": asdict(replace(config, out="", data_dir="")),
        "data": fingerprint(config), "hardware": f"{hardware(config.device)}, {threads} thread{'s' * (threads > 1)}", "date": time.strftime("%Y-%m-%d"),
        "epochs": checkpoint["history"], "final": final["trained"], "controls": {k: v for k, v in final.items() if k != "trained"},
    }  # fmt: skip


def sweep(
    file: Path, points: dict[str, Config], seeds=(0, 1, 2), jobs: int = 2, controls: bool = False, keep: str = ""
) -> list[dict]:
    """All runs of points x seeds, from the file or made now, `jobs` at a time; returned in the order of the points."""
    runs = read(file)
    here = {fingerprint(config) for config in points.values()}
    if any(run["data"] not in here for run in runs) and here != {""}:
        raise UserError(f"{file}: measured on other images than those in --data-dir; name another file with --results")
    known = {identity(run["config"], run["seed"]) for run in runs}
    wanted = [(name, replace(config, seed=seed)) for seed in seeds for name, config in points.items()]
    missing = [(name, c) for name, c in wanted if identity(asdict(c), c.seed) not in known]
    if missing:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: the processes show no bars, this one does
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(run_one, name, config, threads, controls, keep) for name, config in missing]
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc=file.stem, unit="run", smoothing=0):
                    runs.append(future.result())
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_text(json.dumps({"runs": runs}, indent=1) + "\n", file, "the results")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    found = {identity(run["config"], run["seed"]): run for run in runs}
    return [
        found[identity(asdict(c), c.seed)] | {"name": name}
        for name, c in sorted(wanted, key=lambda w: list(points).index(w[0]))
    ]


def spread(runs: list[dict], name: str, figure: str) -> str:
    """A point's mean ± standard deviation over its seeds, in percent; the mean alone for one seed."""
    values = torch.tensor([100 * run["final"][figure] for run in runs if run["name"] == name], dtype=torch.float64)
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")
