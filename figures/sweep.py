"""Run a set of configurations over seeds, a process each, keep their figures in one small JSON file, and draw from it.

Each script beside this one names its `points` (configurations) and a `draw`, and ends in `figure`, which gives it the
same command line:

    --scale demo     the embedded shapes and a small network: a few minutes, for a classroom
    --scale cpu      5 000 images of CIFAR-10 and a small network: an hour or two on two cores
    --scale paper    CIFAR-10, ResNet-18 and 200 epochs: one GPU

figures/results/<figure>-<scale>.json holds {"runs": [...]}, one entry a finished run with its configuration, seed,
hardware, date, figures of every epoch and final accuracies. A run that is in there, or in another figure's file beside
it, is not repeated; one that was stopped goes on at its last epoch. So a sweep can be interrupted at any point.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from functools import lru_cache
from multiprocessing import active_children, get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results"

import torch
from observe import Watch
from tqdm import tqdm

import data
from config import FREE_ON_RESUME, RECIPES, Config, Parser, command
from eval_linear import evaluate
from images import Dataset, UserError
from measure import hardware, peak_memory
from models import pick_device, pick_precision
from runs import read_checkpoint, replacing, save_text
from train import learner as learner_of
from train import load_dataset, train

SCALES = {
    "demo": dict(
        dataset="shapes", subset=1000, width=8, size=16, dim=64, hidden=128, negatives=0, batch_size=64, momentum=0.9,
        epochs=4, warmup=1.0,
    ),
    "cpu": dict(dataset="folder", subset=5000, width=16, size=24, dim=512, hidden=1024, negatives=0, epochs=6),
    # The released script's settings with the paper's update rule, and neither SqrtKL nor CutMix unless a figure says so.
    "paper": RECIPES["released"] | dict(dataset="cifar10", bank_update="corrected", lam=0.0, cutmix=0.0, save_every=10, compile=True),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------- running points


def identity(config: dict, seed: int) -> str:
    """What makes two runs the same: every setting but where things are and how fast they run.

    A setting that was added after a run was made counts with its default.
    """
    settings = asdict(Config(**(config | {"seed": seed})))
    return json.dumps({k: v for k, v in settings.items() if k not in FREE_ON_RESUME}, sort_keys=True)


@lru_cache
def fingerprint(dataset: str, data_dir: str) -> str:
    """A short hash of a folder of images, by names and sizes of files; empty if they are not here, or not a folder."""
    root = Path(data_dir)
    if dataset != "folder" or not root.is_dir():
        return ""
    files = sorted((str(p.relative_to(root)), p.stat().st_size) for p in root.rglob("*") if p.is_file())
    return hashlib.blake2s(repr(files).encode(), digest_size=8).hexdigest()


def read(file: Path) -> list[dict]:
    """The finished runs of a results file, none if it does not exist. Raises UserError if it is damaged."""
    if not file.exists():
        return []
    try:
        runs = json.loads(file.read_text())["runs"]
        for run in runs:
            identity(run["config"], run["seed"])
            assert {"name", "data", "epochs", "final", "hardware"} <= run.keys(), "an entry is not whole"
        return runs
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it and run the script again to make it anew") from error


@lru_cache(maxsize=1)
def images(**fields) -> Dataset:
    """Decoded once in a process; fields of a configuration that say which images."""
    return load_dataset(Config(**fields))


def run_one(name: str, config: Config, threads: int, looks: int, controls: bool, keep: str, memory: bool, measure):
    """Train and evaluate; returns the run's entry in the results.

    measure(checkpoint, dataset), if given, makes the final figures instead of `evaluate`: knn and linear among them.
    A point's init_from names no place: it is JSON, the settings that the run to start from has instead of the point's (and
    of its bank_init, the default's). That run is made first, with the same seed, for this one alone.

    Its folder lies in `keep` or, until the run is in the results, in runs/figures; a run that stopped goes on from there.
    """
    torch.set_num_threads(threads)
    known = hashlib.blake2s(identity(asdict(config), config.seed).encode(), digest_size=6).hexdigest()
    folder = Path(keep or ROOT / "runs" / "figures") / known
    begun = replace(config, out=str(folder))
    if config.init_from:
        begun.init_from = f"{folder}-before"
        before = {"init_from": "", "bank_init": Config.bank_init, "out": begun.init_from} | json.loads(config.init_from)
        trained(replace(config, **before), 0)
    checkpoint, dataset = trained(begun, looks)
    precision = pick_precision(config.precision, pick_device(config.device))
    if measure:
        final = {"trained": measure(checkpoint, dataset)}
    else:
        final = evaluate(checkpoint, dataset, device=config.device, controls=controls, quiet=True)
    if not keep:
        shutil.rmtree(folder)
        shutil.rmtree(f"{folder}-before", ignore_errors=True)
    return {
        "name": name, "method": config.method, "seed": config.seed, "config": asdict(replace(config, out="", data_dir="")),
        "data": fingerprint(config.dataset, config.data_dir),
        "hardware": f"{hardware(config.device)}, {precision}, {threads} thread{'s' * (threads > 1)}", "date": time.strftime("%Y-%m-%d"),
        "epochs": checkpoint["history"], "final": final["trained"],
        "controls": {k: v for k, v in final.items() if k != "trained"},
    } | ({"step_mib": step_memory(config, dataset)} if memory else {})  # fmt: skip


def trained(config: Config, looks: int) -> tuple[dict, Dataset]:
    """The checkpoint of a run, made or gone on with in its folder, and its images."""
    folder = config.folder()
    resume = read_checkpoint(str(folder)) if (folder / "last.pt").exists() else None
    where = "dataset data_dir subset holdout size batch_size negatives cache_gb workers cache_dir".split()
    dataset = images(**{field: getattr(config, field) for field in where})
    train(config, resume, dataset, Watch(looks))
    return read_checkpoint(str(folder)), dataset


def step_memory(config: Config, dataset: Dataset) -> int:
    """MiB that a step takes at its peak beyond the images, the network and the bank: activations, gradients, momenta."""
    device = pick_device(config.device)
    learner = learner_of(config)(config, len(dataset.train), device)
    learner.encoder.train()
    pixels, index = next(dataset.to(device).train.batches(torch.arange(config.batch_size), config.batch_size, device))
    return round(peak_memory(lambda: learner.step(pixels, index, config.lr), device))


def sweep(
    file: Path, points: dict[str, Config], seeds=(0, 1, 2), jobs=2, looks=0, controls=False, keep="", needs=(),
    memory=False, measure=None,
) -> list[dict]:  # fmt: skip
    """All runs of points x seeds, from the file or made now, `jobs` at a time; returned in the order of the points.

    A run that is there counts if its epochs or its final figures have those named by needs; so do those in the files
    beside this one.
    """
    runs = [run for run in read(file) if whole(run, needs)]
    here = {fingerprint(config.dataset, config.data_dir) for config in points.values()}
    folders = {run["data"] for run in runs if run["config"]["dataset"] == "folder"}
    if folders - here and here != {""}:
        raise UserError(f"{file}: measured on other images than those in --data-dir; name another file with --results")
    wanted = [(name, replace(config, seed=seed)) for seed in seeds for name, config in points.items()]
    need = {identity(asdict(c), c.seed) for _, c in wanted} - {identity(run["config"], run["seed"]) for run in runs}
    for other in sorted(file.parent.glob("*.json")) if need and not controls else ():
        for run in neighbour(other):
            known = identity(run["config"], run["seed"])
            if known in need and whole(run, needs) and (run["data"] in here or here == {""}):
                need.remove(known)
                runs.append(run)
    missing = [(name, c) for name, c in wanted if identity(asdict(c), c.seed) in need]
    if missing:
        file.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=file.stem, unit="run", smoothing=0)
        with bar:
            try:
                for run in side_by_side(missing, jobs, looks, controls, keep, memory, measure):
                    runs.append(run)
                    lines = ",\n".join(json.dumps(run) for run in runs)
                    save_text(f'{{"runs": [\n{lines}\n]}}\n', file, "the results")
                    bar.update()
            except UserError as error:
                raise UserError(f"{file} lacks {len(wanted) - bar.n} of {len(wanted)} runs: {error}") from error
    found = {identity(run["config"], run["seed"]): run for run in runs}
    order = sorted(wanted, key=lambda w: list(points).index(w[0]))
    return [found[identity(asdict(c), c.seed)] | {"name": name} for name, c in order]


def whole(run: dict, needs) -> bool:
    return set(needs) <= run["epochs"][-1].keys() | run["final"].keys()


def neighbour(file: Path) -> list[dict]:
    """The runs of another figure's file, none if it is damaged."""
    try:
        return read(file)
    except UserError as error:
        print(f"{error}; passed over", file=sys.stderr)
        return []


def side_by_side(missing: list[tuple[str, Config]], jobs: int, *options):
    """Yields the entries of the missing runs as they finish. On an interruption the processes save what they have."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: the processes show no bars, this one does
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=silence) as pool:
        left, running = list(missing), set()
        try:
            while left or running:
                while left and len(running) < jobs:  # no more than that: a run in the pool's queue cannot be recalled
                    name, config = left.pop(0)
                    running.add(pool.submit(run_one, name, config, threads, *options))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BaseException:
            for process in active_children():
                os.kill(process.pid, signal.SIGTERM)  # caught in training: saves, and stops
            raise


def silence() -> None:
    sys.stdout = open(os.devnull, "w")


# ------------------------------------------------------------------------------------------- one command line for all


def spread(runs: list[dict], name: str, figure: str) -> str:
    """A point's mean ± standard deviation over its seeds, in percent; the mean alone for one seed."""
    values = torch.tensor([100 * run["final"][figure] for run in runs if run["name"] == name], dtype=torch.float64)
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def table(runs: list[dict]) -> str:
    """The results as a Markdown table: mean ± standard deviation over the seeds, in percent."""
    lines = ["| setting | linear | kNN (k = 200) | seeds |", "|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        seeds = sum(run["name"] == name for run in runs)
        lines.append(f"| {name} | {spread(runs, name, 'linear')} | {spread(runs, name, 'knn')} | {seeds} |")
    return "\n".join(lines)


def arguments(name: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=description)
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="[cpu]")
    parser.add_argument("--dataset", choices=data.DATASETS, help="as in train.py [shapes, folder or cifar10, by scale]")
    parser.add_argument("--data-dir", default="data", help="as in train.py [data]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--jobs", type=int, help="runs side by side, sharing the cores [2; 1 for --scale paper]")
    parser.add_argument("--device", default="auto", help="as in train.py [auto]")
    parser.add_argument("--keep", default="", metavar="DIR", help="keep the runs' folders in there")
    parser.add_argument("--results", type=Path, help=f"the file of results [figures/results/{name}-SCALE.json]")
    parser.add_argument("--picture", type=Path, help=f"the picture [figures/results/{name}-SCALE.png]")
    args = parser.parse_args(argv)
    if args.jobs is None:
        args.jobs = 1 if args.scale == "paper" else 2
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    args.results = args.results or RESULTS / f"{name}-{args.scale}.json"
    args.picture = args.picture or args.results.with_suffix(".png")
    return args


def figure(name: str, description: str, points, draw=None, argv=None, show=table, measure=None, **options) -> int:
    """The main() of a figure's script: run what is missing, draw, print the table. Returns the exit status.

    points(base, scale) gives the configurations by name, from the scale's base; draw(runs, path) writes the picture; show
    makes the table. options are `sweep`'s: looks, the epochs between looks at the kNN accuracy on all test images,
    controls, needs and memory, whether a step's is measured; measure(base, scale) gives that of `run_one`.
    """

    def stop(*_):
        raise KeyboardInterrupt

    def main(argv: list[str] | None) -> None:
        signal.signal(signal.SIGTERM, stop)
        args = arguments(name, description, argv)
        base = Config(**(SCALES[args.scale] | {"data_dir": args.data_dir, "device": args.device, "knn_every": 0}))
        base = replace(base, dataset=args.dataset or base.dataset)
        options["measure"] = measure and measure(base, args.scale)
        runs = sweep(args.results, points(base, args.scale), args.seeds, args.jobs, keep=args.keep, **options)
        if draw:
            with replacing(args.picture, "the picture") as part:
                draw(runs, part)
            print(args.picture)
        print(show(runs))

    return command(main, f"{name}.py", "stopped; the finished runs are kept, the same command goes on")(argv)
