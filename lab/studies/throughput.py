"""How fast training steps are: images/s, the share of the GPU's peak, and what bounds the step.

    python -m lab.studies.throughput                            gpu, released, SimCLR and BYOL
    python -m lab.studies.throughput field --device cpu --steps 4   the methods of Figure 1
    python -m lab.studies.throughput figure3 --device cpu --steps 3   the laptop runs of Figure 3
    python -m lab.studies.throughput --device cpu --scale 0.01   small everything: does it run?

A call is --steps steps in a row on noise that lies on the device; the figures are medians over
--repeats rounds in turn. torch.utils.flop_counter counts the FLOPs of one step: matrix products and
convolutions, forward and backward, two for a multiply-add. "busy" is the share of the time in which
the GPU computes; well below 1, the host launches too slowly. The two-branch methods need
requirements-bench.txt. Writes figures/results/bench/<throughput, methods or figure3>-<cpu or
cuda>.json.
"""

import json
import statistics
import sys
import time
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from figures import fig3_convergence
from figures.field import NAMES, base_of, contestant
from figures.sweep import LAPTOP, RESULTS
from lab.bench import noise, rows_for, shrink, table
from lab.measure import finish, flops, in_turn
from lab.train import LabConfig, build
from plumbing.command_line import Parser, UserError, check_device, command
from plumbing.devices import hardware, keep_freed_memory, pick_device, pick_precision
from plumbing.outputs import output, save_text
from train import RECIPES

# TFLOP/s in bf16 without sparsity, from NVIDIA's data sheets
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312}
COUNT = 50_000  # N
SETTINGS = ("arch", "width", "size", "batch_size", "optimizer", "lam", "bank_update")  # of a row's images/s
FILES = {"gpu": "throughput", "field": "methods", "figure3": "figure3"}


def cases(what: str, device: str, scale: float) -> dict[str, LabConfig]:
    if what == "field":
        base = replace(base_of(LabConfig(device=device)), subset=10_000)  # as many images as Figure 1 has
        return {method: shrink(contestant(base, method), scale) for method in NAMES}
    if what == "figure3":
        rows = fig3_convergence.points(LabConfig(**LAPTOP | {"device": device}), "laptop")
        return {name: shrink(config, scale) for name, config in rows.items()}
    recipes = {name: replace(LabConfig(**RECIPES[name]), device=device, compile=True) for name in ("gpu", "released")}
    two = {method: contestant(recipes["gpu"], method) for method in ("simclr", "byol")}
    return {name: replace(shrink(c, scale), compile=scale == 1) for name, c in (recipes | two).items()}


def epoch_of(config: LabConfig, device: torch.device, steps: int, scale: float):
    """A call that makes `steps` steps in a row."""
    count = max(2 * config.batch_size + config.negatives, int((config.subset or COUNT) * scale))
    run, images = build(config, count, device), noise(steps * config.batch_size).to(device)
    places = rows_for(run, images, count).to(device)
    run.encoder.train()

    def epoch():
        for pixels, index in images.batches(torch.randperm(len(images)), config.batch_size, device):
            run.step(pixels, places[index], config.lr)

    return epoch


def step_flops(config: LabConfig, device: torch.device, scale: float) -> int:
    """FLOPs of one step, not compiled: the counter cannot see into compiled code."""
    return flops(epoch_of(replace(config, compile=False), device, 1, scale))


def shares(call, device: torch.device, top: int = 8) -> tuple[dict[str, float], float | None]:
    """The operations (on a GPU: kernels) with the largest shares of the device's time.

    And how busy a GPU is (None on a CPU).
    """
    gpu = device.type == "cuda"
    finish(device)
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        call()
        finish(device)
        seconds = time.perf_counter() - started
    spent = {e.key: e.self_device_time_total if gpu else e.self_cpu_time_total for e in seen.key_averages()}  # µs
    total = sum(spent.values())
    most = sorted(spent, key=spent.get, reverse=True)[:top]
    busy = round(total / 1e6 / seconds, 3) if gpu else None
    return {name[:80]: round(spent[name] / total, 3) for name in most}, busy


def peak(device: torch.device, given: float | None) -> float | None:
    """The device's largest TFLOP/s, None if unknown."""
    if given or device.type != "cuda" or pick_precision("auto", device) != "bf16":
        return given
    return next((value for name, value in PEAKS.items() if name in hardware("cuda")), None)


def measure(what: str, device: torch.device, steps: int, repeats: int, scale: float, most: float | None) -> dict:
    configs = cases(what, device.type, scale)
    calls = {name: epoch_of(config, device, steps, scale) for name, config in configs.items()}
    rows = {}
    for name, seconds in in_turn(calls, device, repeats).items():
        config, each = configs[name], [s / steps for s in seconds]
        counted = step_flops(config, device, scale)
        tflops = counted / statistics.median(each) / 1e12
        top, busy = shares(calls[name], device)
        rows[name] = {
            "images/s": round(config.batch_size / statistics.median(each)),
            "slowest": round(config.batch_size / max(each)), "fastest": round(config.batch_size / min(each)),
            "GFLOP per image": round(counted / config.batch_size / 1e9, 4),
            "TFLOP/s": round(tflops, 3), "share of peak": most and round(tflops / most, 3), "busy": busy,
            "bound by": top, "settings": {key: getattr(config, key) for key in SETTINGS},
        }  # fmt: skip
    return rows


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=FILES, default="gpu", help="which runs [gpu]")
    parser.add_argument("--device", default="auto", help="as in train.py [auto]")
    parser.add_argument("--steps", type=int, default=20, help="steps per call [20]")
    parser.add_argument("--repeats", type=int, default=10, help="rounds, after warming up [10]")
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1: smaller everything, not compiled [1]")
    parser.add_argument("--peak-tflops", type=float, help=f"the device's peak [{', '.join(PEAKS)} are known, in bf16]")
    parser.add_argument(
        "--results", type=output, help="the file [figures/results/bench/{throughput,methods,figure3}-DEVICE.json]"
    )
    args = parser.parse_args(argv)
    check_device(args.device)
    if min(args.steps, args.repeats) < 1 or not 0 < args.scale <= 1:
        raise UserError("--steps and --repeats must be at least 1 and --scale lie in (0, 1]")
    keep_freed_memory()
    device = pick_device(args.device)
    most = peak(device, args.peak_tflops)
    result = {"rows": measure(args.what, device, args.steps, args.repeats, args.scale, most), "peak, TFLOP/s": most}
    result |= {
        "hardware": hardware(args.device),
        "precision": pick_precision("auto", device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    result |= {"scale": args.scale, "steps": args.steps, "repeats": args.repeats, "date": time.strftime("%Y-%m-%d")}
    file = args.results or RESULTS / "bench" / f"{FILES[args.what]}-{device.type}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_text(json.dumps(result, indent=1) + "\n", file, "the results")
    short = {
        NAMES.get(n, n): {k: v for k, v in row.items() if k not in ("bound by", "settings")}
        for n, row in result["rows"].items()
    }
    print(f"{result['hardware']}, {result['precision']}, peak {most} TFLOP/s\n{table({'rows': short})}")
    for name, row in result["rows"].items():
        print(f"{name} is bound by", *(f"{share:6.1%}  {what}" for what, share in row["bound by"].items()), sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
