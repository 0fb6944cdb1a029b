"""Run settings over seeds, one process per run, keep the figures in a JSON file, draw from it.

A figure's script, or a study, names its `points` (settings) and a `draw`. It ends in `figure`,
which gives it this command line:

    --scale demo     the embedded shapes and a small network: a few minutes, for a classroom
    --scale cpu      5 000 images of CIFAR-10 and a small network: an hour or two on two cores
    --scale paper    CIFAR-10, ResNet-18 and 200 epochs: one GPU
    --scale laptop   50 000 images, K = 10 000, 30 to 100 epochs and a small network: hours on two
                     cores; Figures 3 to 5 and a few studies have it

figures/results/<figure>-<scale>.json holds {"runs": [...]}: per finished run its settings, seed,
hardware, date, the figures of every epoch and the final accuracies. A run in this file, or in
another figure's file in the same folder, is not repeated. A run that was stopped resumes at its
last epoch. So a sweep can be interrupted at any time; --redraw draws what is there so far.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import torch
from tqdm import tqdm

import data
from figures.observe import Watch
from lab.evaluate import evaluate
from lab.measure import flops, peak_memory
from lab.train import LabConfig, build, train
from plumbing.command_line import Parser, UserError, check_device, command
from plumbing.devices import hardware, pick_device
from plumbing.files import Dataset
from plumbing.outputs import locked, output, replacing
from plumbing.runs import read_checkpoint
from train import RECIPES, Pretraining, load_dataset

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "figures" / "results"

# The settings that the first round of measurements started from, at their values of that time:
# today's defaults may differ. A stored run that lacks one of them was made with this value.
ROUND_ONE = dict(
    arch="resnet10", width=0, size=24, eval_size=0, layers=2, hidden=2048, dim=2048, temperature=0.07,
    bank_momentum=0.75, bank_init="forward", bank_update="corrected", negatives=1000, lam=0.0, kl_temperature=1.0,
    crop_min=0.2, jitter=0.4, jitter_p=0.8, gray=0.2, blur=0.0, cutmix=0.0, epochs=36, batch_size=128, lr=0.1,
    sgd_momentum=0.9, weight_decay=1e-4, warmup=2.0, fit="crop", optimizer="sgd", muon_momentum=0.6, window=0, visits=8,
    bank="", loss="",
)  # fmt: skip
SCALES = {
    "demo": ROUND_ONE | dict(
        dataset="shapes", subset=1000, width=8, size=16, dim=64, hidden=128, negatives=0, batch_size=64,
        bank_momentum=0.9, epochs=4, warmup=1.0,
    ),
    "cpu": ROUND_ONE | dict(
        dataset="folder", subset=5000, width=16, size=24, dim=512, hidden=1024, negatives=0, epochs=6,
    ),
    # The released script's settings with the paper's update rule. SqrtKL and CutMix are off unless
    # a figure turns them on.
    "paper": ROUND_ONE | RECIPES["released"] | dict(
        dataset="cifar10", bank_update="corrected", lam=0.0, cutmix=0.0, save_every=10, compile=True,
    ),
}  # fmt: skip
# The paper's N and K and nearly its length, with a network and views that two cores can pay for.
LAPTOP = ROUND_ONE | RECIPES["released"] | dict(
    dataset="folder", arch="resnet10", width=16, size=16, hidden=256, dim=128, lam=0.0, epochs=30,
)  # fmt: skip

# ---------------------------------------------------------------------------------- running points


def identity(config: dict, seed: int) -> str:
    """What makes two runs the same: every setting but where things lie and how fast they run.

    A setting that was added after a run was made counts with its value in ROUND_ONE, or its
    default.
    """
    settings = LabConfig(**(ROUND_ONE | config | {"seed": seed}))
    return json.dumps({f.name: getattr(settings, f.name) for f in fields(settings) if not f.metadata["free"]})


@lru_cache
def fingerprint(dataset: str, data_dir: str) -> str:
    """A short hash of a folder of images, by names and sizes of files, and of how parts are chosen.

    Empty if the dataset is not a folder, or the folder does not exist.
    """
    root = Path(data_dir)
    if dataset != "folder" or not root.is_dir():
        return ""
    files = sorted((str(p.relative_to(root)), p.stat().st_size) for p in root.rglob("*") if p.is_file())
    return hashlib.blake2s(repr(("subsets by name", files)).encode(), digest_size=8).hexdigest()


def read(file: Path) -> list[dict]:
    """The finished runs of a results file, none if it does not exist.

    Raises UserError if the file is damaged.
    """
    if not file.exists():
        return []
    try:
        runs = json.loads(file.read_text())["runs"]
        for run in runs:
            identity(run["config"], run["seed"])
            assert {"name", "data", "epochs", "final", "hardware"} <= run.keys(), "an entry is not whole"
            figures = [value for value in run["final"].values() if not isinstance(value, (list, dict, str))]
            accuracies = {"knn", "linear"} & run["final"].keys()  # both, or none after a run without labels
            assert figures and len(accuracies) != 1, "its final figures are not whole"
            figures += [value for row in run["epochs"] for value in (row["epoch"], row["seconds"], row["loss"])]
            assert run["epochs"] and all(map(math.isfinite, figures)), "its figures are no numbers"
        return runs
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError, OSError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it and run the script again to make it anew") from error


@lru_cache(maxsize=1)
def images(**settings) -> Dataset:
    """The dataset of these settings, decoded once per process."""
    return load_dataset(LabConfig(**settings))


def run_one(file: Path, needs, name: str, config: LabConfig, threads: int, looks: int, controls, keep, costs, measure):
    """Train, evaluate and add the run to the results in file.

    measure(checkpoint, dataset), if given, replaces `evaluate`: it returns the final figures, "knn"
    and "linear" among them. A point's init_from is not a place but JSON: the settings in which the
    run to start from differs from the point (its bank_init is ROUND_ONE's unless named). That run
    is made first, with the same seed, for this point alone.

    The run's folder lies in `keep`, or in runs/figures until the run is in the results. A stopped
    run resumes from it. Another sweep that wants the same run waits for it.
    """
    torch.set_num_threads(threads)
    wanted = identity(asdict(config), config.seed)
    known = hashlib.blake2s(wanted.encode(), digest_size=6).hexdigest()
    folder = Path(keep or ROOT / "runs" / "figures") / known
    try:
        with locked(folder):
            runs = [] if controls else borrowed(file, {wanted}, needs, {fingerprint(config.dataset, config.data_dir)})
            if not runs:  # else it was made while this process waited
                runs = [measured(folder, name, config, threads, looks, controls, costs, measure)]
            add(file, runs)
            if not keep:
                shutil.rmtree(folder)
                shutil.rmtree(f"{folder}-before", ignore_errors=True)
    finally:
        if parent_process() and not parent_process().is_alive():
            os._exit(1)  # nobody takes the result


def add(file: Path, runs: list[dict]) -> None:
    """Add runs to a results file, to which another process may have added others meanwhile."""
    with locked(file.parent), replacing(file, "the results") as place:
        new = {identity(run["config"], run["seed"]) for run in runs}
        stored = [run for run in read(file) if identity(run["config"], run["seed"]) not in new]
        lines = ",\n".join(json.dumps(run) for run in stored + runs)
        place.write_text(f'{{"runs": [\n{lines}\n]}}\n')


def measured(folder: Path, name: str, config: LabConfig, threads: int, looks: int, controls, costs, measure) -> dict:
    """The entry of a run in the results."""
    settings = replace(config, out=str(folder))
    if config.init_from:
        settings.init_from = f"{folder}-before"
        before = {"init_from": "", "bank_init": ROUND_ONE["bank_init"], "out": settings.init_from}
        trained(replace(config, **(before | json.loads(config.init_from))), 0)
    checkpoint, dataset = trained(settings, looks)
    precision = json.loads((folder / "config.json").read_text())["precision"]  # what the run had in place of auto
    if measure:
        final = {"trained": measure(checkpoint, dataset)}
    else:
        final = evaluate(checkpoint, dataset, device=config.device, controls=controls, quiet=True)
    return {
        "name": name, "method": config.method, "seed": config.seed,
        "config": asdict(replace(config, out="", data_dir="")), "data": fingerprint(config.dataset, config.data_dir),
        "hardware": f"{hardware(config.device)}, {precision}, {threads} thread{'s' * (threads > 1)}",
        "date": time.strftime("%Y-%m-%d"), "epochs": checkpoint["history"], "final": final["trained"],
        "controls": {k: v for k, v in final.items() if k != "trained"},
    } | (step_costs(config, dataset) if costs else {})  # fmt: skip


def trained(config: LabConfig, looks: int) -> tuple[dict, Dataset]:
    """The checkpoint of a run, made or resumed in its folder, and its images."""
    folder = config.folder()
    resume = read_checkpoint(str(folder), LabConfig) if (folder / "last.pt").exists() else None
    where = "dataset data_dir subset holdout size eval_size fit batch_size cache_gb workers cache_dir".split()
    dataset = images(**{field: getattr(config, field) for field in where})
    train(config, resume, dataset, watch=Watch(looks))
    return read_checkpoint(str(folder), LabConfig), dataset


def step_costs(config: LabConfig, dataset: Dataset) -> dict[str, float]:
    """What a step takes: {"step_mib": peak memory in MiB, "gflop": GFLOP per image}.

    Memory is that of activations, gradients and momenta: images, network and bank are not counted.
    """
    device = pick_device(config.device)
    order = torch.arange(config.batch_size)
    pixels, index = next(dataset.to(device).train.batches(order, config.batch_size, device))

    def step_of(config: LabConfig):
        learner = build(config, len(dataset.train), device)
        learner.encoder.train()
        if isinstance(learner, Pretraining):
            learner.bank.enter(order)  # a window starts empty
        return lambda: learner.step(pixels, index, config.lr)

    counted = flops(step_of(replace(config, compile=False)))  # the counter cannot see into compiled code
    return {"step_mib": round(peak_memory(step_of(config), device)), "gflop": round(counted / len(index) / 1e9, 4)}


def sweep(
    file: Path, points: dict[str, LabConfig], seeds=(0, 1, 2), jobs=2, looks=0, controls=False, keep="", needs=(),
    costs=False, measure=None, make=True,
) -> list[dict]:  # fmt: skip
    """All runs of points x seeds, from the file or made now, `jobs` at a time.

    make=False makes none: what is not there is left out. Returns them in the order of the points. A
    stored run counts if its epochs or its final figures have everything in needs. Runs in the other
    files of the folder count too.
    """
    runs = [run for run in read(file) if whole(run, needs)]
    data_now = {fingerprint(config.dataset, config.data_dir) for config in points.values()}
    folders = {run["data"] for run in runs if run["config"]["dataset"] == "folder"}
    if folders - data_now and data_now != {""}:
        raise UserError(f"{file}: measured on other images than those in --data-dir; name another file with --results")
    wanted = [(name, replace(config, seed=seed)) for seed in seeds for name, config in points.items()]
    need = {identity(asdict(c), c.seed) for _, c in wanted} - {identity(run["config"], run["seed"]) for run in runs}
    others = borrowed(file, need, needs, data_now) if need and not controls else []
    need -= {identity(run["config"], run["seed"]) for run in others}
    missing = [(name, c) for name, c in wanted if identity(asdict(c), c.seed) in need]
    if missing and not make and len(missing) == len(wanted):
        raise UserError(f"{file}: has none of the runs yet; leave out --redraw to make them")
    if missing and make:
        file.parent.mkdir(parents=True, exist_ok=True)
        if others:
            add(file, others)
        bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=file.stem, unit="run", smoothing=0)
        with bar:
            try:
                for _, config in missing:  # now, not in a process of the pool
                    config.check()
                    if config.dataset == "folder" and not Path(config.data_dir).is_dir():
                        raise UserError(f"--data-dir {config.data_dir}: no such folder; name that of your images")
                for _ in side_by_side(missing, jobs, (file, needs), looks, controls, keep, costs, measure):
                    bar.update()
            except UserError as error:
                raise UserError(f"{file} lacks {len(wanted) - bar.n} of {len(wanted)} runs: {error}") from error
        runs = [run for run in read(file) if whole(run, needs)]
    by_identity = {identity(run["config"], run["seed"]): run for run in runs + others}
    order = [(name, identity(asdict(c), c.seed)) for name, c in sorted(wanted, key=lambda w: list(points).index(w[0]))]
    return [by_identity[known] | {"name": name} for name, known in order if known in by_identity]


def whole(run: dict, needs) -> bool:
    """Whether a run has what is needed, and accuracies on the images that are meant.

    Every run ends with "knn" and "linear", so these are needed of its epochs. "folds" says that a
    run was measured by cross-validation, not on test images.
    """
    final = run["final"].keys() - {"knn", "linear"}
    return set(needs) <= run["epochs"][-1].keys() | final and ("folds" in final) == ("folds" in needs)


def borrowed(file: Path, wanted: set[str], needs, data_now: set[str]) -> list[dict]:
    """Runs with a wanted identity in the other files of the folder, one per identity."""
    runs = {}
    for other in sorted(file.parent.glob("*.json")):
        for run in neighbour(other):
            known = identity(run["config"], run["seed"])
            if known in wanted - runs.keys() and whole(run, needs) and (run["data"] in data_now or data_now == {""}):
                runs[known] = run
    return list(runs.values())


def neighbour(file: Path) -> list[dict]:
    """The runs of another results file; none of a damaged one, which is said, and of other JSON."""
    try:
        return read(file)
    except UserError as error:
        with suppress(ValueError, TypeError, OSError):
            if "runs" not in json.loads(file.read_text()):
                return []
        print(f"{error}; passed over", file=sys.stderr)
        return []


def side_by_side(missing: list[tuple[str, LabConfig]], jobs: int, place: tuple, *options):
    """Makes the missing runs; yields as they finish. place is the file and the needs of `run_one`.

    On an interruption the processes save what they have.
    """
    threads = max(1, torch.get_num_threads() // jobs)  # as many as there are cores, or OMP_NUM_THREADS
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when imported: no bars in the processes, only this one's
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=silence) as pool:
        waiting, running = list(missing), set()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:  # no more: a run in the pool's queue cannot be recalled
                    name, config = waiting.pop(0)
                    with interrupts_ignored():  # a process inherits it: the parent stops it with SIGTERM
                        running.add(pool.submit(run_one, *place, name, config, threads, *options))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BaseException as error:
            for process in active_children():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)  # training catches it, saves and stops
            if isinstance(error, BrokenExecutor):
                words = "was killed, perhaps because memory ran out: take fewer --jobs"
                raise UserError(f"one of its processes {words}; the same command goes on") from error
            raise


@contextmanager
def interrupts_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def silence() -> None:
    """A process of the pool prints nothing, and ends when its parent dies: training saves first."""
    sys.stdout = open(os.devnull, "w")

    def follow():
        parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


# -------------------------------------------------------------------- one command line for all


def training_seconds(*histories: list[dict]) -> float:
    """Seconds of training, for runs of equal settings: their median epoch, times the epochs of one.

    The median hides what else ran for a while, and the forward pass that starts a bank.
    """
    clocks = [[0.0, *(row["seconds"] for row in history)] for history in histories]
    return len(histories[0]) * statistics.median(b - a for clock in clocks for a, b in zip(clock, clock[1:]))


@lru_cache
def rates_of(file: Path) -> dict:
    """What lab/studies/throughput.py wrote to file; empty if it did not."""
    return json.loads(file.read_text()) if file.exists() else {}


def measured_rate(rates: dict, name: str, config: dict) -> float | None:
    """The images/s of a row of `rates_of`, if they were measured with config's network and step."""
    row = rates.get("rows", {}).get(name)
    measured = row and all(row["settings"][key] == config[key] for key in row["settings"])
    return row["images/s"] if measured else None


def spread(runs: list[dict], name: str, figure: str) -> str:
    """A point's mean ± standard deviation over seeds, in percent; for one seed the mean alone."""
    values = torch.tensor([100 * run["final"][figure] for run in runs if run["name"] == name], dtype=torch.float64)
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def table(runs: list[dict]) -> str:
    """The results as a Markdown table: mean ± standard deviation over the seeds, in percent."""
    lines = ["| setting | linear | kNN (k = 200) | seeds |", "|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        seeds = sum(run["name"] == name for run in runs)
        lines.append(f"| {name} | {spread(runs, name, 'linear')} | {spread(runs, name, 'knn')} | {seeds} |")
    return "\n".join(lines)


def arguments(name: str, description: str, argv: list[str] | None, scales=SCALES) -> argparse.Namespace:
    parser = Parser(description=description)
    parser.add_argument("--scale", choices=scales, default="cpu", help="[cpu]")
    parser.add_argument("--dataset", choices=data.DATASETS, help="as in train.py [shapes, folder or cifar10, by scale]")
    parser.add_argument("--data-dir", default="data", help="as in train.py [data]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--jobs", type=int, help="runs at the same time, sharing the cores [2; 1 for --scale paper]")
    parser.add_argument("--device", default="auto", help="as in train.py [auto]")
    parser.add_argument("--redraw", action="store_true", help="make no runs: table and picture of those there are")
    parser.add_argument("--keep", default="", metavar="DIR", help="keep the runs' folders in DIR")
    parser.add_argument("--results", type=output, help=f"the file of results [figures/results/{name}-SCALE.json]")
    parser.add_argument("--picture", type=output, help=f"the picture [figures/results/{name}-SCALE.png]")
    args = parser.parse_args(argv)
    if args.jobs is None:
        args.jobs = 1 if args.scale == "paper" else 2
    if not 1 <= args.jobs <= 256:
        raise UserError(f"--jobs must be at least 1 and at most 256, not {args.jobs}")
    if len(set(args.seeds)) < len(args.seeds) or not all(0 <= seed < 2**63 for seed in args.seeds):
        raise UserError(f"--seeds must be different and not negative, not {args.seeds}")
    check_device(args.device)
    args.results = args.results or output(RESULTS / f"{name}-{args.scale}.json")
    if args.results.suffix == ".png" and not args.picture:
        raise UserError(f"--results {args.results}: would be replaced by the picture; name another file, as x.json")
    args.picture = args.picture or output(args.results.with_suffix(".png"))
    return args


def figure(
    name: str, description: str, points, draw=None, argv=None, show=table, measure=None, laptop=False, repeated=None,
    **options,
) -> int:  # fmt: skip
    """The main() of a figure's script: run what is missing, draw, print the table.

    points(base, scale) gives the settings by name, from the scale's base. draw(runs, path) writes
    the picture, show(runs) makes the table. measure(base, scale) gives the `measure` of `run_one`.
    laptop says that there is a --scale laptop. At that scale repeated(runs of the first seed) names
    the points that get the other seeds (None: all).
    options are `sweep`'s: looks (epochs between looks at the kNN accuracy on all test images),
    controls, needs, and costs (whether a step's memory and FLOPs are measured). Returns the exit
    status.
    """

    def main(argv: list[str] | None) -> None:
        scales = SCALES | ({"laptop": LAPTOP} if laptop else {})
        args = arguments(name, description, argv, scales)
        base = LabConfig(**(scales[args.scale] | {"data_dir": args.data_dir, "device": args.device, "knn_every": 0}))
        base = replace(base, dataset=args.dataset or base.dataset)
        options["measure"] = measure and measure(base, args.scale)
        chosen, fewer = points(base, args.scale), repeated if args.scale == "laptop" else None
        run_all = partial(sweep, args.results, jobs=args.jobs, keep=args.keep, make=not args.redraw, **options)
        runs = run_all(chosen, args.seeds[:1] if fewer else args.seeds)
        if fewer and args.seeds[1:]:
            try:
                runs += run_all({name: chosen[name] for name in fewer(runs)}, args.seeds[1:])
            except UserError:
                if not args.redraw:  # else the first seed is all there is
                    raise
        if draw:
            with replacing(args.picture, "the picture") as place:
                draw(runs, place)
            print(args.picture)
        print(show(runs))

    return command(main, f"{name}.py", "stopped; the finished runs are kept, the same command goes on")(argv)
