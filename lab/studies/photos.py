"""Photographs of one's own: ours, SimCLR and no pretraining, with all, 10 % and 1 % of the labels.

    python -m lab.studies.photos --scale demo                 the embedded shapes, a few minutes
    python -m lab.studies.photos --data-dir my_photos         four hours on two cores
    python -m lab.studies.photos --scale paper --data-dir my_photos    ResNet-18, one GPU

The folder holds train/<class>/ and test/<class>/, about 3 000 photographs to train on. Ours trains
with the settings that train.py chooses for such a folder (plumbing/automatic.py). SimCLR has the
same network, views and batch, the settings that the search chose for it (figures/field.py), and
half the epochs, since its step has two views of an image. From scratch, the same network learns
from the labels alone: as many steps as pretraining and fine-tuning have together. With few labels
it gets 600 steps beyond those of fine-tuning, as it knows them by heart long before.

Fine-tuning trains the whole network on views of the pretraining's side. It is tested at the side of
the evaluation, as the frozen features are. With few labels it has the seed's draw of them; the
probes have the mean over five draws.
"""

import sys
from dataclasses import replace

from eval_linear import eval_side
from figures import plots
from figures.field import NAMES, contestant
from figures.sweep import figure, spread
from lab.backbones import encoder_of
from lab.evaluate import FINETUNING_RATE, draw_labels, evaluate, finetuning_rate, train_head
from lab.train import LabConfig
from models import Encoder
from plumbing import automatic
from plumbing.devices import pick_device, pick_precision
from plumbing.files import Dataset

ENOUGH = 600  # more steps from scratch, where labels are few
PICTURES, SIDE = 3068, 160  # of the folder that docs/photos.md is about
SHARES = {"": 1.0, "_10": 0.1, "_1": 0.01}  # of the labels, by the ending of a figure's name
FINETUNING = {"demo": (4, 4, 4), "cpu": (20, 100, 200), "paper": (100, 200, 400)}  # epochs, by the share of labels
WORDS = ("all labels", "10 %", "1 %")
CONTROLS = {"scratch": "from scratch", "untrained linear": "untrained, frozen", "raw linear": "raw pixels"}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    default = LabConfig(dataset=base.dataset, data_dir=base.data_dir, device=base.device, knn_every=0)
    if scale == "demo":
        ours = replace(default, subset=1000, width=8, size=16, window=256, visits=2, epochs=4, warmup=1.0)
    else:
        ours = replace(default, dataset="folder", **automatic.settings(PICTURES, SIDE))
    if scale == "paper":
        ours = replace(ours, arch="resnet18", epochs=400)
    half = replace(ours, epochs=ours.epochs // 2, warmup=ours.warmup / 2)
    return {NAMES["ours"]: ours, NAMES["simclr"]: contestant(half, "simclr")}


class Measure:
    """Accuracies of a run's frozen and fine-tuned network; with ours, those of one from scratch.

    "linear" and "finetune" have all labels, the endings "_10" and "_1" 10 % and 1 % of them.
    """

    def __init__(self, epochs: tuple[int, int, int]):
        self.epochs = dict(zip(SHARES, epochs))

    def __call__(self, checkpoint: dict, dataset: Dataset) -> dict:
        config = checkpoint["config"]
        figures = evaluate(checkpoint, dataset, device=config["device"], slow=("few_labels",), quiet=True)
        results = figures.pop("trained") | {"seconds": checkpoint["history"][-1]["seconds"]}
        results |= {f"{who} {key}": value for who, row in figures.items() for key, value in row.items()}
        encoder = encoder_of(config)
        if config["method"] == "ours":
            steps = config["epochs"] * (len(dataset.train) // config["batch_size"])
            results |= self.learned("scratch", encoder, config, dataset, FINETUNING_RATE, steps)
        encoder.load_state_dict(checkpoint["encoder"])
        return results | self.learned("finetune", encoder, config, dataset, finetuning_rate(config))

    def learned(self, name, encoder: Encoder, config: dict, dataset: Dataset, rate: float, steps: int = 0) -> dict:
        """Test accuracies of training on each share of the labels: `epochs`, then `steps` more."""
        device, figures = pick_device(config["device"]), {}
        encoder.precision = pick_precision("auto", device)
        for ending, share in SHARES.items():
            chosen = draw_labels(dataset.labelled.labels.cpu(), share, config["seed"])
            subset = replace(dataset, labelled=dataset.labelled.take(chosen)).to(device)
            more = min(steps, ENOUGH) if ending else steps
            epochs = self.epochs[ending] + more // (len(chosen) // min(128, len(chosen)))
            side = eval_side(config, dataset.test)
            figures[name + ending] = train_head(
                encoder, subset, side, device, epochs, True, config["seed"], view=config["size"], rate=rate
            )
        return figures


def arms(runs: list[dict]) -> dict[str, tuple[str, str]]:
    """Of each line of the table: the point whose runs have its figures, and how they begin."""
    rows = {}
    for name in dict.fromkeys(run["name"] for run in runs):
        rows |= {f"{name}, frozen": (name, "linear"), f"{name}, fine-tuned": (name, "finetune")}
    return rows | {words: (NAMES["ours"], start) for start, words in CONTROLS.items()}


def draw(runs: list[dict], path) -> None:
    colours = {NAMES["ours"]: plots.ORANGE, NAMES["simclr"]: plots.BLUE}
    picture, axes = plots.plt.subplots(1, 2, figsize=(10, 4.4), constrained_layout=True, sharey=True)
    for arm, (name, start) in arms(runs).items():
        axis = axes[int(start in ("finetune", "scratch"))]
        control = {"scratch": plots.GREY, "untrained linear": plots.GREEN, "raw linear": plots.PURPLE}
        colour = control.get(start, colours[name])
        values = [plots.percent(runs, name, start + ending) for ending in SHARES]
        axis.errorbar(
            [100 * share for share in SHARES.values()], [v.mean().item() for v in values],
            [plots.deviation(v) for v in values], marker=plots.MARKERS[colour], capsize=3, color=colour,
            label=arm.removesuffix(", frozen").removesuffix(", fine-tuned"),
        )  # fmt: skip
    for axis, words in zip(axes, ("linear probe on frozen features", "the whole network trained on labels")):
        axis.set(xscale="log", xlabel="labels, %", title=words)
        axis.set_xticks([1, 10, 100], ["1", "10", "all"])
        axis.minorticks_off()
        axis.legend()
    axes[0].set_ylabel("top-1, %")
    plots.finish(picture, title(runs), runs, path)


def title(runs: list[dict]) -> str:
    """What fine-tuning gains by our pretraining, at each share of the labels."""
    gains = []
    for ending, words in zip(SHARES, WORDS):
        ours, scratch = (plots.percent(runs, NAMES["ours"], start + ending) for start in ("finetune", "scratch"))
        gains.append(f"{(ours - scratch).mean():+.1f} ({words})")
    return f"Fine-tuned after ours, less from scratch: {', '.join(gains)}"


def table(runs: list[dict]) -> str:
    """Markdown: a line per arm, accuracies as mean ± deviation over the seeds, in percent."""
    lines = [f"| arm | {' | '.join(WORDS)} | kNN | seeds |", "|---" * 6 + "|"]
    for arm, (name, start) in arms(runs).items():
        cells = [spread(runs, name, start + ending) for ending in SHARES]
        near = {"linear": "knn", "untrained linear": "untrained knn", "raw linear": "raw knn"}.get(start)
        cells += [spread(runs, name, near) if near else "-", str(sum(run["name"] == name for run in runs))]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(base: LabConfig, scale: str) -> Measure:
    return Measure(FINETUNING[scale])


if __name__ == "__main__":
    sys.exit(figure("photos", __doc__, points, draw, show=table, measure=measure, needs=("finetune_1",)))
