"""What a step costs beside what it has to cost: every figure is a ratio of two things timed in turn in one process.

    python bench.py overhead        a whole step against its backbone and projector alone, on a batch that lies ready
    python bench.py input           the batched augmentation against torchvision's transforms in a DataLoader
    python bench.py bank            losses and bank update alone, plain and streamed, time and memory against N; a plot
    python bench.py overhead --json             one JSON object in the last line, with "ratio"
    python bench.py overhead --device cuda      on a GPU

Medians over --repeats rounds, after warming up, with the range that holds the middle half. Run it on a machine that does
nothing else.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from augment import Augment, plain
from bank import MemoryBank
from config import Config, Parser, check_device
from eval_linear import hardware
from images import Images, UserError
from loss import nce, streaming_losses
from models import pick_device
from train import Pretraining

PICTURE = Path(__file__).parent / "figures" / "results" / "bench-bank.png"


# ------------------------------------------------------------------------------------------------------------- measuring


def finish(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def in_turn(what: dict[str, object], device: torch.device, repeats: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, round after round: whatever else slows the machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(warm + repeats):
        for name, call in what.items():
            finish(device)
            started = time.perf_counter()
            call()
            finish(device)
            if turn >= warm:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> dict[str, float]:
    """How many times as long `name` takes: the median over rounds, and the quartiles."""
    each = [a / b for a, b in zip(seconds[name], seconds[other])]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def median(seconds: list[float]) -> float:
    return round(statistics.median(seconds), 5)


def peak_memory(call, device: torch.device) -> float | None:
    """MiB that a call takes at its peak beyond what was held before it; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # Linux: the peak is counted from here
        before = _kib(status, "VmRSS")
        call()
        return (_kib(status, "VmHWM") - before) / 1024
    except OSError:
        call()
        return None


def _kib(status: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key + ":"))


def noise(count: int, side: int = 32) -> Images:
    """Images that cost what real ones cost."""
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    return Images(pixels, labels=torch.zeros(count, dtype=torch.long), side=side)


# -------------------------------------------------------------------------------------------------------------- overhead

CASES = {  # what is asked of the step, then the goal on a CPU and on a GPU
    "resnet18, D = 128, N = 50 000": (
        Config(arch="resnet18", size=32, dim=128, batch_size=256), 50_000, 1.10, 1.15,
    ),
    "resnet18, D = 2048, N = 50 000, K = 10 000": (
        Config(arch="resnet18", size=32, dim=2048, batch_size=256, negatives=10_000), 50_000, 1.25, 1.25,
    ),
    "the default recipe, N = 5 000": (Config(), 5_000, 1.15, 1.15),
}  # fmt: skip


def whole_and_bare(config: Config, count: int, device: torch.device):
    """Two calls that each make one step: all of it, and forward, backward and SGD of the same network alone."""
    run = Pretraining(config, count, device)
    bare = Pretraining(config, 1, device)
    images = noise(max(1024, config.batch_size)).to(device)
    places = torch.randint(count, (len(images),))  # rows of the bank, for images that stand for `count` of them
    run.encoder.train(), bare.encoder.train()
    ready = plain(images.pixels[: config.batch_size].to(device), config.size)
    direction = F.normalize(torch.randn(config.batch_size, config.dim, device=device), dim=1)

    def whole():
        order = torch.randperm(len(images))[: config.batch_size]
        for pixels, index in images.batches(order, config.batch_size, device):
            run.step(pixels, places.to(device)[index], config.lr)

    def only():
        bare.optimizer.zero_grad()
        (bare.forward(ready) * direction).sum().backward()
        bare.optimizer.step()

    return whole, only


def overhead(device: torch.device, repeats: int, scale: float) -> dict:
    rows = {}
    for name, (config, count, on_cpu, on_gpu) in CASES.items():
        config = shrink(replace(config, device=device.type), scale)
        whole, only = whole_and_bare(config, max(2 * config.batch_size + config.negatives, int(count * scale)), device)
        seconds = in_turn({"whole": whole, "bare": only}, device, repeats)
        rows[name] = ratio(seconds, "whole", "bare") | {k: median(v) for k, v in seconds.items()}
        rows[name]["goal"] = on_cpu if device.type == "cpu" else on_gpu
    return {"ratio": max(row["ratio"] / row["goal"] for row in rows.values()), "rows": rows}


def shrink(config: Config, scale: float) -> Config:
    """The same step with less of everything, to see that it runs."""
    if scale == 1:
        return config
    small = {"arch": "resnet10", "width": 8, "size": 16, "hidden": 32, "dim": 16, "batch_size": 16}
    return replace(config, **small, negatives=min(config.negatives, 32))


# ----------------------------------------------------------------------------------------------------------------- input


class _PerImage(torch.utils.data.Dataset):
    """torchvision's transforms of the same strength, image by image, as most self-supervised code has them."""

    def __init__(self, images: Images, augment: Augment):
        from torchvision import transforms as tv

        jitter = tv.RandomApply([tv.ColorJitter(*augment.jitter)], p=augment.jitter_p)
        crop = tv.RandomResizedCrop(augment.size, augment.scale, augment.ratio)
        steps = [crop, jitter, tv.RandomGrayscale(augment.gray_p), tv.RandomHorizontalFlip(augment.flip_p)]
        self.transform = tv.Compose([*steps, tv.ToTensor(), tv.Normalize((0.5,) * 3, (0.25,) * 3)])
        self.pixels = [tv.functional.to_pil_image(x) for x in images.pixels]

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i: int):
        return self.transform(self.pixels[i])


def pipeline(device: torch.device, repeats: int, scale: float) -> dict:
    """An epoch of views of 32 px, both ways, workers already started and warm."""
    count, batch = max(256, int(8192 * scale)), 256
    images, augment = noise(count), Augment(32)
    there = images.to(device)
    loader = torch.utils.data.DataLoader(_PerImage(images, augment), batch, num_workers=2, persistent_workers=True)

    def batched():
        for pixels, _ in there.batches(torch.randperm(count), batch, device):
            augment(pixels)

    def per_image():
        for views in loader:
            views.to(device)

    seconds = in_turn({"per image": per_image, "batched": batched}, device, repeats, warm=1)
    speed = {f"{name}, images/s": round(count / median(s)) for name, s in seconds.items()}
    row = ratio(seconds, "per image", "batched") | speed | {"goal": 8}
    return {"ratio": row["ratio"], "rows": {"augmentation, 32 px": row}}


# ------------------------------------------------------------------------------------------------------------------ bank


def bank_calls(count: int, dim: int, batch: int, device: torch.device, chunk: int):
    bank = MemoryBank(count, dim, 0.75, "corrected", 0.07).to(device)
    z = F.normalize(torch.randn(batch, dim, device=device), dim=1).requires_grad_()
    index = torch.randint(count, (batch,), device=device)

    def plainly():
        similarity = bank.similarity(z)
        nce(similarity, index, 0.07).backward()
        bank.update(z, index, similarity)

    def streamed():
        l_nce, _, log_total = streaming_losses(z, bank.weight, index, 0.07, None, chunk)
        l_nce.backward()
        bank.update(z, index, log_total=log_total, chunk=chunk)

    return plainly, streamed


def bank(device: torch.device, repeats: int, scale: float, dim: int = 128, batch: int = 256) -> dict:
    """Time and memory of L_NCE, its gradient and the update; ratio is the streamed time over the plain one."""
    rows, chunk = {}, 8192 if device.type == "cpu" else 65_536
    for count in (10_000, 40_000, 160_000, 640_000, 1_281_167):
        count = max(1000, int(count * scale))
        plainly, streamed = bank_calls(count, dim, batch, device, chunk)
        memory = {"plain, MiB": peak_memory(plainly, device), "streamed, MiB": peak_memory(streamed, device)}
        seconds = in_turn(
            {"plain": plainly, "streamed": streamed}, device, max(2, repeats if count < 1e5 else repeats // 2)
        )
        rows[f"N = {count}"] = ratio(seconds, "streamed", "plain") | {k: median(v) for k, v in seconds.items()}
        rows[f"N = {count}"] |= {k: round(v) for k, v in memory.items() if v is not None}
    return {"ratio": max(row["ratio"] for row in rows.values()), "rows": rows}


def draw_bank(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = [int(name.split()[-1]) for name in result["rows"]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, unit, words in zip(axes, ("", ", MiB"), ("seconds a step", "memory beyond the bank, MiB")):
        for name, style in (("plain", "o-"), ("streamed", "s-")):
            drawn = [(n, row[name + unit]) for n, row in zip(count, result["rows"].values()) if name + unit in row]
            axis.plot(*zip(*drawn), style, label=name, color={"plain": "#d55e00", "streamed": "#0072b2"}[name])
        axis.set(xscale="log", yscale="log", xlabel="N, rows of the bank", ylabel=words)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.suptitle(f"Losses and bank update alone, D = 128, batch 256; {result['hardware']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------- command line

PARTS = {"overhead": overhead, "input": pipeline, "bank": bank}


def table(result: dict) -> str:
    """The rows as aligned text, their common figures as columns."""
    columns = list(dict.fromkeys(key for row in result["rows"].values() for key in row))
    cells = [["", *columns]] + [
        [name, *(f"{row.get(c, '-')}" for c in columns)] for name, row in result["rows"].items()
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    return "\n".join(
        "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths)))
        for line in cells
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("part", choices=PARTS, help="what is measured")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")
    parser.add_argument("--repeats", type=int, default=10, help="rounds, after warming up [10]")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="less than 1: smaller everything, to see that it runs [1]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in the last line")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="of bank [%(default)s]")
    args = parser.parse_args(argv)
    check_device(args.device)
    if args.repeats < 1 or not 0 < args.scale <= 1:
        raise UserError("--repeats must be at least 1 and --scale lie in (0, 1]")
    return args


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        torch.manual_seed(0)
        device = pick_device(args.device)
        result = PARTS[args.part](device, args.repeats, args.scale)
        result |= {"part": args.part, "hardware": hardware(args.device), "threads": torch.get_num_threads()}
        result |= {"date": time.strftime("%Y-%m-%d"), "repeats": args.repeats, "scale": args.scale}
        if args.part == "bank":
            draw_bank(result, args.picture)
    except UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.part} on {result['hardware']}")
    print(table(result))
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
