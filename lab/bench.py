"""Benchmarks of one training step: ratios of two things that are timed in turn in one process.

    python -m lab.bench overhead    a whole step, and its backbone and projector alone
    python -m lab.bench input       the batched augmentation, and torchvision in a DataLoader
    python -m lab.bench bank        losses and update against N, whole and streamed: time, memory
    python -m lab.bench window      a pass over a window of images against N: time, memory
    python -m lab.bench disk        photographs read ahead, read at every visit, and in memory
    python -m lab.bench field       a whole step, and a step of SimCLR, SimSiam, BYOL and MoCo
                                    (needs requirements-bench.txt)
    python -m lab.bench overhead --device cuda --results overhead.json

Medians over --repeats rounds after a warm-up, with the range that holds the middle half. Run it on
a machine that does nothing else. Results: docs/speed.md, from figures/results/bench/.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from data import Augment, Batch, shuffled, windows
from lab.measure import in_turn, median, peak_memory, ratio
from lab.train import LabConfig, build
from plumbing import automatic
from plumbing.command_line import Parser, UserError, check_device, command
from plumbing.devices import hardware, keep_freed_memory, pick_device, pick_precision
from plumbing.files import Images, common_side, decode
from plumbing.image_ops import whole_image
from plumbing.outputs import output, save_text
from train import Config, Pretraining


def noise(count: int, side: int = 32) -> Images:
    """Images that cost what real ones cost."""
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    return Images(pixels, labels=torch.zeros(count, dtype=torch.long), side=side)


def rows_for(run, images: Images, count: int) -> torch.Tensor:
    """What the images stand for among `count`: distinct, unless the bank has fewer rows."""
    if isinstance(run, Pretraining):
        count = run.bank.size
        run.bank.enter(torch.arange(count))
    return torch.randperm(max(count, len(images)))[: len(images)] % count


# ----------------------------------------------------------------------------------------- overhead

PAPER = dict(arch="resnet18", size=32, hidden=2048, batch_size=256, optimizer="sgd", window=0)
CASES = {  # settings, N, then the goal on a CPU and on a GPU
    "resnet18, D = 128, N = 50 000": (PAPER | dict(dim=128, negatives=0), 50_000, 1.10, 1.15),
    "resnet18, D = 2048, N = 50 000, K = 10 000": (PAPER | dict(dim=2048, negatives=10_000), 50_000, 1.25, 1.25),
    "the default recipe, N = 5 000": ({}, 5_000, 1.15, 1.15),
}


def whole_and_bare(config: Config, count: int, device: torch.device):
    """Two calls: a whole step, and forward, backward and optimiser of the same network alone."""
    run = Pretraining(config, count, device)
    bare = Pretraining(config, 1, device)
    images = noise(max(1024, config.batch_size)).to(device)
    rows = rows_for(run, images, count).to(device)
    run.encoder.train(), bare.encoder.train()
    ready = whole_image(images.pixels[: config.batch_size].to(device), config.size)
    direction = F.normalize(torch.randn(config.batch_size, config.dim, device=device), dim=1)

    def whole_step():
        order = torch.randperm(len(images))[: config.batch_size]
        for pixels, index in images.batches(order, config.batch_size, device):
            run.step(pixels, rows[index], config.lr)

    def bare_step():
        bare.optimizer.zero_grad()
        (bare.network(ready) * direction).sum().backward()
        bare.optimizer.step()

    return whole_step, bare_step


def overhead(device: torch.device, repeats: int, scale: float) -> dict:
    rows = {}
    for name, (settings, count, on_cpu, on_gpu) in CASES.items():
        config = shrink(Config(**settings, device=device.type), scale)
        count = max(2 * config.batch_size + config.negatives, int(count * scale))
        whole_step, bare_step = whole_and_bare(config, count, device)
        seconds = in_turn({"whole": whole_step, "bare": bare_step}, device, repeats)
        rows[name] = ratio(seconds, "whole", "bare") | {k: median(v) for k, v in seconds.items()}
        rows[name]["goal"] = on_cpu if device.type == "cpu" else on_gpu
    return {"ratio": max(row["ratio"] / row["goal"] for row in rows.values()), "rows": rows}


def shrink(config: Config, scale: float) -> Config:
    """The same step on a smaller network, to see that it runs."""
    if scale == 1:
        return config
    small = {"arch": "resnet10", "width": 8, "size": 16, "hidden": 32, "dim": 16, "batch_size": 16}
    return replace(config, **small, negatives=min(config.negatives, 32), window=min(config.window, 64))


# -------------------------------------------------------------------------------------------- input


class _PerImage(torch.utils.data.Dataset):
    """torchvision's transforms of the same strength, image by image, as in most other code."""

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


def input_pipeline(device: torch.device, repeats: int, scale: float) -> dict:
    """An epoch of views of 32 pixels, both ways; the DataLoader's workers have started before."""
    count, batch = max(256, int(8192 * scale)), 256
    images, augment = noise(count), Augment(32)
    on_device = images.to(device)
    loader = torch.utils.data.DataLoader(_PerImage(images, augment), batch, num_workers=2, persistent_workers=True)

    def batched():
        for pixels, _ in on_device.batches(torch.randperm(count), batch, device):
            augment(pixels)

    def per_image():
        for views in loader:
            views.to(device)

    seconds = in_turn({"per image": per_image, "batched": batched}, device, repeats, warm=1)
    speed = {f"{name}, images/s": round(count / median(s)) for name, s in seconds.items()}
    row = ratio(seconds, "per image", "batched") | speed | {"goal": 8}
    return {"ratio": row["ratio"], "rows": {"augmentation, 32 px": row}}


# --------------------------------------------------------------------------------------------- bank


def bank_calls(count: int, dim: int, batch: int, device: torch.device):
    """Two calls on one bank: L_NCE, its gradient and the update.

    The first holds the similarities (B, N), the second streams the bank in chunks.
    """
    whole = dict(negatives=0, window=0, precision="fp32")
    config = LabConfig(width=8, size=16, hidden=32, dim=dim, batch_size=batch, **whole)
    direct, streamed = Pretraining(config, count, device), build(replace(config, similarity_gb=1e-9), count, device)
    streamed.bank.weight = direct.bank.weight
    z = F.normalize(torch.randn(batch, dim, device=device), dim=1).requires_grad_()
    index = torch.randint(count, (batch,), device=device)

    def call_of(run):
        def call():
            l_nce, _, seen = run.losses(z, Batch(z, index))
            l_nce.backward()
            run.bank.update(z, index, **seen)

        return call

    return call_of(direct), call_of(streamed)


def bank(device: torch.device, repeats: int, scale: float, dim: int = 128, batch: int = 256) -> dict:
    """Time and memory against N; ratio is the largest of the streamed time over the plain time."""
    rows = {}
    for count in (10_000, 40_000, 160_000, 640_000, 1_281_167):
        count = max(1000, int(count * scale))
        direct, streamed = bank_calls(count, dim, batch, device)
        memory = {"plain, MiB": peak_memory(direct, device), "streamed, MiB": peak_memory(streamed, device)}
        rounds = max(2, repeats if count < 1e5 else repeats // 2)
        seconds = in_turn({"plain": direct, "streamed": streamed}, device, rounds)
        rows[f"N = {count}"] = ratio(seconds, "streamed", "plain") | {k: median(v) for k, v in seconds.items()}
        rows[f"N = {count}"] |= {k: round(v) for k, v in memory.items()}
    return {"ratio": max(row["ratio"] for row in rows.values()), "rows": rows}


# ------------------------------------------------------------------------------------------- window


class Repeated(Images):
    """A few images that stand for any number: image i has the pixels of image i mod their count."""

    def batches(self, order: torch.Tensor, batch_size: int, device: torch.device):
        indices = order.tensor_split(max(1, len(order) // batch_size))  # as the pixels are
        for (pixels, _), index in zip(super().batches(order % len(self), batch_size, device), indices):
            yield pixels, index.to(device)


def window(device: torch.device, repeats: int, scale: float) -> dict:
    """A pass over a window of images, its entry and its steps, against N.

    ratio is the slowest N's time over the fastest's. "bank" and "order of visits" are what a run
    keeps in memory, "pass" the peak of what a pass makes. The order of visits is counted, not
    measured: 8 bytes per image, for which `windows` needs twice as much after the first N visits.
    """
    settings = dict(width=16, dim=512, hidden=512, negatives=0, optimizer="muon", lr=0.05, window=1024)
    config = shrink(Config(**settings, device=device.type), scale)
    images, calls, kept = Repeated(**vars(noise(1024).to(device))), {}, {}
    for count in (10**5, 10**6, 10**7):
        run, name = Pretraining(config, count, device), f"N = {count}"
        run.encoder.train()
        calls[name] = pass_of(run, images, windows(count, config.window, config.visits, 0))
        kept[name] = {"bank, MiB": run.bank.weight.nbytes, "order of visits, MiB": 8 * count}
    seconds = in_turn(calls, device, repeats)
    rows, fastest = {}, min(seconds, key=lambda name: statistics.median(seconds[name]))
    for name, call in calls.items():
        rows[name] = ratio(seconds, name, fastest) | {"s": median(seconds[name])}
        rows[name] |= {key: round(size / 2**20, 1) for key, size in kept[name].items()}
        rows[name]["pass, MiB"] = round(peak_memory(call, device))
    return {"ratio": max(row["ratio"] for row in rows.values()), "rows": rows}


def pass_of(run: Pretraining, images: Images, passes):
    """A call that trains on the next pass: the images that enter, then every step."""
    number, members, _ = next(passes)
    run.enter(images, members)

    def call():
        number, members, entering = next(passes)
        run.enter(images, entering)
        order = shuffled(members, "epoch", number)
        for pixels, index in images.batches(order, run.config.batch_size, run.device):
            run.step(pixels, index, run.config.lr)

    return call


# --------------------------------------------------------------------------------------------- disk

DISTINCT = 200  # pictures; the other files are links to them


def disk(device: torch.device, repeats: int, scale: float) -> dict:
    """Training on 20 000 photographs with the settings that train.py chooses for them.

    "in memory" decodes nothing, "read ahead" decodes a picture once while it is in the window,
    "every visit" in every pass, by a DataLoader. ratio is the time read ahead over that in memory.
    A call trains on eight passes over the window. "held" is what lies in memory, decoded.
    """
    config = shrink(Config(**automatic.settings(20_000, 160), device=device.type), scale)
    count, passes, calls = max(4 * config.window, int(20_000 * scale)), 8, {}
    with tempfile.TemporaryDirectory() as folder:
        files = Images(paths=photographs(Path(folder), count), side=common_side([(213, 160)], config.size))
        pixels = torch.stack([torch.from_numpy(decode(path, files.side)) for path in files.paths[:DISTINCT]])
        for name, images in (
            ("in memory", Repeated(pixels, side=files.side)), ("read ahead", files), ("every visit", replace(files)),
        ):  # fmt: skip
            run, order = Pretraining(config, count, device), windows(count, config.window, config.visits, 0)
            run.encoder.train()
            one = pass_of(run, images, images.read_ahead(order) if name == "read ahead" else order)
            calls[name] = lambda one=one: [one() for _ in range(passes)]
        seconds = in_turn(calls, device, repeats, warm=1)
    rows, each = {}, 3 * files.side**2 / 2**20
    trained = passes * (config.window // config.batch_size * config.batch_size)
    held = {"in memory": count, "read ahead": config.window + config.window // config.visits, "every visit": 0}
    for name, times in seconds.items():
        rows[name] = ratio(seconds, name, "in memory") | {"images/s": round(trained / median(times))}
        rows[name]["held, MiB"] = round(held[name] * each)
    return {"ratio": rows["read ahead"]["ratio"], "rows": rows, "goal": 1.1}


def photographs(folder: Path, count: int) -> list[Path]:
    """Paths of `count` JPEG files, 213 by 160 pixels; most are links to one of a few."""
    names = [folder / f"{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        if i >= DISTINCT:
            name.hardlink_to(names[i % DISTINCT])
            continue
        rough = torch.randint(256, (1, 3, 15, 20)).float()
        smooth = F.interpolate(rough, (160, 213), mode="bicubic") + 8 * torch.randn(1, 3, 160, 213)
        Image.fromarray(smooth[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(name, quality=90)
    return names


# -------------------------------------------------------------------------------------------- field


def field(device: torch.device, repeats: int, scale: float) -> dict:
    """images/s and memory of whole steps on one backbone, ours and those of two-branch methods.

    "activations" is what the forward pass leaves for the backward pass, "step" the peak of a whole
    step. ratio is the smallest lead over a two-branch method. All step with SGD, because Muon's
    share depends on how wide a method's heads are.
    """
    from lab.baselines import METHODS, TwoBranches

    batch = 64 if device.type == "cpu" else 256
    config = LabConfig(arch="resnet18", size=32, dim=128, hidden=512, batch_size=batch, device=device.type)
    config = shrink(replace(config, optimizer="sgd"), scale)
    count, batch = max(2 * config.batch_size, int(50_000 * scale)), config.batch_size
    images = noise(max(1024, batch)).to(device)
    calls = {"ours": calls_of(Pretraining(config, count, device), images, count)}
    for name, method in METHODS.items():
        calls[method.__name__] = calls_of(TwoBranches(replace(config, method=name), count, device), images, count)
    seconds = in_turn({name: step for name, (step, _) in calls.items()}, device, repeats, warm=1)
    memory = {name: [peak_memory(call, device) for call in both] for name, both in calls.items()}
    rows = {}
    for name, times in seconds.items():
        rows[name] = ratio(seconds, name, "ours") | {"images/s": round(batch / statistics.median(times), 1)}
        rows[name] |= {"activations, MiB": round(memory[name][1]), "step, MiB": round(memory[name][0])}
        rows[name]["ours / its activations"] = round(memory["ours"][1] / memory[name][1], 2)
    goal = {"goal": {"ratio": 1.9, "ours / its activations": 0.55}}
    return {"ratio": min(row["ratio"] for name, row in rows.items() if name != "ours"), "rows": rows} | goal


def calls_of(run, images: Images, count: int):
    """Two calls: a whole step, and its forward pass alone."""
    c, rows = run.config, rows_for(run, images, count).to(run.device)
    run.encoder.train()

    def batch():
        pixels, index = next(images.batches(torch.randperm(len(images))[: c.batch_size], c.batch_size, run.device))
        return pixels, rows[index]

    def step():
        run.step(*batch(), c.lr)

    def forward():
        pixels, index = batch()
        if c.method != "ours":
            return run.loss(pixels)
        views = run.look(pixels, index)
        return run.losses(run.network(views.views), views)

    return step, forward


# ------------------------------------------------------------------------------------- command line

BENCHMARKS = {
    "overhead": overhead,
    "input": input_pipeline,
    "bank": bank,
    "window": window,
    "disk": disk,
    "field": field,
}


def table(result: dict) -> str:
    """The rows as aligned text, their figures as columns."""
    columns = list(dict.fromkeys(key for row in result["rows"].values() for key in row))
    lines = [["", *columns]]
    lines += [[name, *(f"{row.get(c, '-')}" for c in columns)] for name, row in result["rows"].items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]

    def aligned(line: list[str]) -> str:
        name, *cells = line
        return "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:]))])

    return "\n".join(map(aligned, lines))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", choices=BENCHMARKS, help="what is measured")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")
    parser.add_argument("--repeats", type=int, default=10, help="rounds after the warm-up [10]")
    text = "less than 1: everything smaller, also the memory that `bank` needs, to see that it runs [1]"
    parser.add_argument("--scale", type=float, default=1.0, help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object in the last line")
    text = "write the figures there; without it nothing is written [figures/results/bench/ holds the published ones]"
    parser.add_argument("--results", type=output, metavar="FILE", help=text)
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
    result = BENCHMARKS[args.benchmark](device, args.repeats, args.scale)
    result |= {"part": args.benchmark, "hardware": hardware(args.device), "threads": torch.get_num_threads()}
    result |= {"precision": pick_precision("auto", device), "repeats": args.repeats, "scale": args.scale}
    result["date"] = time.strftime("%Y-%m-%d")
    if args.results:
        save_text(json.dumps(result, indent=1) + "\n", args.results, "the results")
    print(f"{args.benchmark} on {result['hardware']}, {result['precision']}")
    print(table(result))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
