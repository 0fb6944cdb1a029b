"""S3L (arXiv 2103.13559) on our method: small images, a small network, little data.

    python -m lab.studies.s3l --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.s3l --data-dir my_cifar10   a quarter of an hour on two cores
    python -m lab.studies.s3l --scale paper           CIFAR-10, ResNet-18, one GPU

The labelled target set is half of the images. Pretraining sees all images or, for small data, the
target set alone. Small resolution is half the side. Small architecture is a ResNet without its
last stage. small -> full adds a second, shorter stage at the full side; its bank is carried over or
started anew by a forward pass. Then every network is fine-tuned with mixup on the target set, at
the evaluation side of the full arm; a missing stage is added and trained alone first. Linear
probe and kNN use the frozen features at the side that fits the pretraining.

There are two controls: fine-tuning alone, from scratch; and the full network fine-tuned as the
small one is, with a new last stage, which costs further epochs on the labels.
"""

import copy
import json
import statistics
import sys
import time
from dataclasses import asdict, replace

import torch

from eval_linear import eval_side
from figures import plots
from figures.field import at_scale, lasting
from figures.sweep import figure, identity, spread, training_seconds
from lab.backbones import encoder_of
from lab.evaluate import FINETUNING_RATE, evaluate, finetuning_rate, train_head
from lab.measure import forward_flop
from lab.s3l import restore_last_stage
from lab.train import LabConfig
from models import Encoder
from plumbing.devices import pick_device, pick_precision
from plumbing.files import Dataset
from plumbing.runs import read_checkpoint
from train import load_dataset

# side of the full views; images; epochs of pretraining, of the second stage, of fine-tuning, and of
# the missing stage alone
SCALES = {
    "demo": (16, 1000, 4, 1, 20, 5),
    "cpu": (32, 5000, 12, 3, 20, 10),
    "paper": (32, 50_000, 200, 50, 120, 10),  # 120 and 10 are S3L's
}
FULL, SCRATCH, ANEW = "full", "from scratch", "full, last stage anew"
COSTS = {"seconds": "seconds", "tflop": "TFLOP"}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    size, count, epochs, second, _, _ = SCALES[scale]
    full = lasting(replace(at_scale(base, scale), size=size, subset=count), epochs)
    first = {"size": size // 2, "epochs": epochs, "warmup": full.warmup}
    two = replace(lasting(full, second), init_from=json.dumps(first))
    return {
        FULL: full,
        "small resolution": replace(full, size=size // 2),
        "small -> full, bank carried": replace(two, bank_init="carry"),
        "small -> full, bank anew": two,
        "small architecture": replace(full, drop_last_stage=True),
        "small data": replace(full, subset=count // 2),
        "all three": replace(full, size=size // 2, drop_last_stage=True, subset=count // 2),
    }


class Measure:
    """Accuracies of a run, and the costs of its pretraining and fine-tuning, for `sweep.run_one`.

    Seconds of fine-tuning include whatever else the processor did, and a look at the test images.
    TFLOP are counted (`forward_flop`), a backward pass as two forward passes; bank and augmentation
    are not counted.
    """

    def __init__(self, full: LabConfig, epochs: int, warmup: int):
        self.full, self.epochs, self.warmup = full, epochs, warmup  # of fine-tuning, of the missing stage alone

    def __call__(self, checkpoint: dict, dataset: Dataset) -> dict:
        config = checkpoint["config"]
        target = torch.arange(self.full.subset // 2)  # the first ones, as in a smaller --subset
        dataset = replace(dataset, labelled=dataset.labelled.take(target))
        figures = evaluate(checkpoint, dataset, device=config["device"], controls=False, quiet=True)["trained"]
        stages = [checkpoint] + ([read_checkpoint(config["init_from"], LabConfig)] if config["init_from"] else [])
        figures["seconds"] = sum(training_seconds(stage["history"]) for stage in stages)
        figures["tflop"] = sum(pretraining_flop(stage["config"]) for stage in stages) / 1e12
        encoder = encoder_of(config)
        untrained = copy.deepcopy(encoder)
        if config["size"] < self.full.size:  # large images were reduced for the smaller views
            dataset = load_dataset(LabConfig(**(config | {"size": self.full.size})))
            dataset = replace(dataset, labelled=dataset.labelled.take(target))
        encoder.load_state_dict(checkpoint["encoder"])
        after = finetuning_rate(config)
        figures |= self.finetuned(encoder, config, dataset, config["drop_last_stage"], after)
        if identity(config, 0) == identity(asdict(self.full), 0):
            for name, start, anew, rate in ((SCRATCH, untrained, False, FINETUNING_RATE), (ANEW, encoder, True, after)):
                control = self.finetuned(start, config, dataset, anew, rate)
                figures |= {f"{name}: {key}": value for key, value in control.items()}
        return figures

    def finetuned(self, encoder: Encoder, config: dict, dataset: Dataset, anew: bool, rate: float) -> dict:
        """Accuracy and costs of fine-tuning; anew: with a new last stage, trained alone first."""
        device, side = pick_device(config["device"]), eval_side(asdict(self.full), dataset.test)
        warmup, started = self.warmup * anew, time.perf_counter()
        if anew:
            encoder = restore_last_stage(encoder, config)
        encoder.precision = pick_precision(config["precision"], device)
        accuracy = train_head(
            encoder, dataset.to(device), side, device, self.epochs, True, config["seed"], alpha=1.0, warmup=warmup,
            rate=rate,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        views = len(dataset.labelled) // 128 * 128 or len(dataset.labelled)  # an epoch
        encoders = (encoder_of(config | {"drop_last_stage": dropped}) for dropped in (False, True))
        whole, frozen = (forward_flop(encoder.features, side) for encoder in encoders)
        flop = views * (self.epochs * 3 * whole + warmup * (3 * whole - 2 * frozen))  # frozen stages get no gradient
        return {"finetune": accuracy, "finetune_seconds": round(seconds, 1), "finetune_tflop": flop / 1e12}


def pretraining_flop(config: dict) -> int:
    """FLOP of a run: its steps, and the forward passes for the bank."""
    views = config["epochs"] * (config["subset"] // config["batch_size"] * config["batch_size"])
    first = config["subset"] * (config["bank_init"] == "forward")
    return forward_flop(encoder_of(config).eval(), config["size"]) * (3 * views + first)


def with_controls(runs: list[dict]) -> list[dict]:
    """The runs and, as runs of their own, the two controls that the full arm's runs contain."""
    controls = []
    for name in (SCRATCH, ANEW):
        for run in runs:
            figures = {
                key.removeprefix(f"{name}: "): v for key, v in run["final"].items() if key.startswith(f"{name}: ")
            }
            if figures:
                pretraining = {key: 0.0 if name == SCRATCH else run["final"][key] for key in COSTS}
                controls.append(run | {"name": name, "final": pretraining | figures})
    return runs + controls


def cost(runs: list[dict], name: str, *keys: str) -> float:
    """Of a point: the sum of these figures, as the median over the seeds.

    On a busy machine some runs take longer.
    """
    return statistics.median(sum(run["final"][key] for key in keys) for run in runs if run["name"] == name)


def draw(runs: list[dict], path) -> None:
    """Fine-tuned accuracy against all costs, the linear probe against the pretraining's."""
    runs, first = with_controls(runs), runs
    figure, axes = plots.plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True, sharey="row")
    colours = (
        plots.BLUE,
        plots.ORANGE,
        plots.GREEN,
        "#56b4e9",
        "#cc79a7",
        "#e69f00",
        "black",
        plots.GREY,
        "#f0e442",
        "#8c564b",
    )
    for i, name in enumerate(dict.fromkeys(run["name"] for run in runs)):
        style = dict(color=colours[i], marker="os^v<>DXPp"[i], markersize=8, capsize=3, linestyle="none", label=name)
        for column, key in enumerate(COSTS):
            for row, (figure_of, costs) in enumerate({"finetune": (key, f"finetune_{key}"), "linear": (key,)}.items()):
                if figure_of == "linear" and name in (SCRATCH, ANEW):
                    continue  # without frozen features of their own
                values, x = plots.percent(runs, name, figure_of), cost(runs, name, *costs)
                axes[row, column].errorbar(x, values.mean().item(), plots.deviation(values), **style)
                axes[row, column].plot([x] * len(values), values, ".", color=colours[i], alpha=0.4, markersize=4)
    for column, unit in enumerate(COSTS.values()):
        axes[0, column].set(xlabel=f"pretraining and fine-tuning, {unit}", xlim=(0, None))
        axes[1, column].set(xlabel=f"pretraining, {unit}", xlim=(0, None))
    axes[0, 0].set_ylabel("fine-tuned with mixup, top-1 %")
    axes[1, 0].set_ylabel("linear probe, top-1 %")
    axes[0, 1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plots.finish(figure, title(runs), first, path)


def title(runs: list[dict]) -> str:
    """Every arm's fine-tuned accuracy less the full arm's, and its share of the full arithmetic."""
    words = []
    for name in dict.fromkeys(run["name"] for run in runs if run["name"] != FULL):
        share = 100 * cost(runs, name, "tflop") / cost(runs, FULL, "tflop")
        words.append(f"{name} {plots.changed(runs, name, FULL, 'finetune')} ({share:.0f} %)")
    lines = ["; ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
    return "Fine-tuned, less full (share of the full pretraining's arithmetic):\n" + "\n".join(lines)


def table(runs: list[dict]) -> str:
    """Markdown: a line per arm; costs as medians, accuracies as mean ± deviation over the seeds."""
    heads = [f"{stage}, {unit}" for stage in ("pretraining", "fine-tuning") for unit in ("s", "TFLOP")]
    heads = ["arm", *heads, "linear", "kNN (k = 200)", "fine-tuned", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    runs = with_controls(runs)
    for name in dict.fromkeys(run["name"] for run in runs):
        cells = [f"{cost(runs, name, stage + key):.3g}" for stage in ("", "finetune_") for key in COSTS]
        cells += ["-" if name in (SCRATCH, ANEW) else spread(runs, name, key) for key in ("linear", "knn")]
        cells += [spread(runs, name, "finetune"), str(sum(run["name"] == name for run in runs))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(base: LabConfig, scale: str) -> Measure:
    return Measure(points(base, scale)[FULL], *SCALES[scale][-2:])


if __name__ == "__main__":
    sys.exit(figure("s3l", __doc__, points, draw, show=table, measure=measure, needs=("finetune_tflop",)))
