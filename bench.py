"""What a step costs beside what it has to cost: every figure is a ratio of two things timed in turn in one process.

    python bench.py overhead        a whole step against its backbone and projector alone, on a batch that lies ready
    python bench.py input           the batched augmentation against torchvision's transforms in a DataLoader
    python bench.py bank            losses and bank update alone, plain and streamed, time and memory against N
    python bench.py field           a whole step against SimCLR, SimSiam, BYOL and MoCo (needs requirements-bench.txt)
    python bench.py overhead --device cuda      on a GPU
    python figures/speed.py                     draws what they wrote

Medians over --repeats rounds, after warming up, with the range that holds the middle half. Run it on a machine that does
nothing else. Each part writes figures/results/bench/<part>-<cpu or cuda>.json, which the picture is drawn from.
"""

import argparse
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
from config import Config, Parser, check_device, command
from images import Images, UserError
from loss import nce, streaming_losses
from measure import hardware, in_turn, median, peak_memory, ratio
from models import keep_freed_memory, pick_device, pick_precision
from pretraining import Pretraining
from runs import save_text

RESULTS = Path(__file__).parent / "figures" / "results" / "bench"


def noise(count: int, side: int = 32) -> Images:
    """Images that cost what real ones cost."""
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    return Images(pixels, labels=torch.zeros(count, dtype=torch.long), side=side)


def rows_for(images: Images, count: int) -> torch.Tensor:
    """Rows of a bank of `count`, for images that stand for that many: distinct, unless there are fewer rows than images."""
    return torch.randperm(max(count, len(images)))[: len(images)] % count


# -------------------------------------------------------------------------------------------------------------- overhead

CASES = {  # what is asked of the step, then the goal on a CPU and on a GPU
    "resnet18, D = 128, N = 50 000": (
        Config(arch="resnet18", size=32, dim=128, batch_size=256, negatives=0), 50_000, 1.10, 1.15,
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
    places = rows_for(images, count)
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
    bank.checks = device.type != "cuda"  # as `Pretraining` has it
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
        rows[f"N = {count}"] |= {k: round(v) for k, v in memory.items()}
    return {"ratio": max(row["ratio"] for row in rows.values()), "rows": rows}


# ----------------------------------------------------------------------------------------------------------------- field


def field(device: torch.device, repeats: int, scale: float) -> dict:
    """images/s and memory of whole steps on one backbone; ratio is the smallest lead over a two-branch method.

    "activations" is what the forward pass leaves for the backward pass, "step" the peak of a whole step.
    """
    from baselines import METHODS, TwoBranches

    batch = 64 if device.type == "cpu" else 256
    config = Config(arch="resnet18", size=32, dim=128, hidden=512, batch_size=batch, device=device.type)
    config = shrink(config, scale)
    count, batch = max(2 * config.batch_size, int(50_000 * scale)), config.batch_size
    images = noise(max(1024, batch)).to(device)
    calls = {"ours": calls_of(Pretraining(config, count, device), images, count)}
    for name, method in METHODS.items():
        calls[method.__name__] = calls_of(TwoBranches(replace(config, method=name), count, device), images, count)
    seconds = in_turn({name: step for name, (step, _) in calls.items()}, device, repeats, warm=1)
    memory = {name: [peak_memory(call, device) for call in both] for name, both in calls.items()}
    rows = {}
    for name, each in seconds.items():
        rows[name] = ratio(seconds, name, "ours") | {"images/s": round(batch / statistics.median(each), 1)}
        rows[name] |= {"activations, MiB": round(memory[name][1]), "step, MiB": round(memory[name][0])}
        rows[name]["ours / its activations"] = round(memory["ours"][1] / memory[name][1], 2)
    goal = {"goal": {"ratio": 1.9, "ours / its activations": 0.55}}
    return {"ratio": min(row["ratio"] for name, row in rows.items() if name != "ours"), "rows": rows} | goal


def calls_of(run, images: Images, count: int):
    """Two calls: a whole step, and its forward pass alone."""
    c, places = run.config, rows_for(images, count).to(run.device)
    run.encoder.train()

    def fetch():
        return next(images.batches(torch.randperm(len(images))[: c.batch_size], c.batch_size, run.device))

    def step():
        pixels, index = fetch()
        run.step(pixels, places[index], c.lr)

    def forward():
        pixels, index = fetch()
        if c.method != "ours":
            return run.loss(pixels)
        columns = run.bank.sample(places[index], run.negatives) if run.negatives else None
        z = run.forward(run.augment(pixels))
        with run.encoder.autocast(z):
            similarity = run.bank.similarity(z, columns).float()
        return nce(similarity, run.bank.locate(places[index], columns), c.temperature)

    return step, forward


# ---------------------------------------------------------------------------------------------------------- command line

PARTS = {"overhead": overhead, "input": pipeline, "bank": bank, "field": field}


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
    parser.add_argument(
        "--results", type=Path, help="the file [figures/results/bench/PART-DEVICE.json, if --scale is 1]"
    )
    args = parser.parse_args(argv)
    check_device(args.device)
    if args.repeats < 1 or not 0 < args.scale <= 1:
        raise UserError("--repeats must be at least 1 and --scale lie in (0, 1]")
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(0)
    keep_freed_memory()
    device = pick_device(args.device)
    result = PARTS[args.part](device, args.repeats, args.scale)
    result |= {"part": args.part, "hardware": hardware(args.device), "threads": torch.get_num_threads()}
    result |= {"precision": pick_precision("auto", device), "repeats": args.repeats, "scale": args.scale}
    result["date"] = time.strftime("%Y-%m-%d")
    if args.results or args.scale == 1:
        file = args.results or RESULTS / f"{args.part}-{device.type}.json"
        save_text(json.dumps(result, indent=1) + "\n", file, "the results")
    print(f"{args.part} on {result['hardware']}, {result['precision']}")
    print(table(result))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
