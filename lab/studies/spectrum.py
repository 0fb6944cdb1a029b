"""Why orthogonalised steps help: the singular values of what training moves, SGD and Muon.

    python -m lab.studies.spectrum --scale demo            the embedded shapes, a minute
    python -m lab.studies.spectrum --data-dir my_cifar10   a quarter of an hour on two cores

Both runs are rows of lab/studies/search.py. For every weight matrix (a convolution's is (out, in k
k)) the study takes the singular values of two things: of the last step, and of the whole way. The
way is the last weights less what weight decay has left of the first ones, Muon's a ten-thousandth:
the sum of all steps, each as far as it has not decayed. The last step is that of the momentum
buffer; Muon's step also looks ahead along the last gradient, which no checkpoint holds. The
effective rank is exp of the entropy of the squared singular values' shares: the number of
directions, if all were equally long.
"""

import sys

import torch

from eval_linear import evaluate
from figures import plots
from figures.sweep import figure
from lab.backbones import encoder_of
from lab.studies import search
from lab.train import LabConfig
from plumbing.files import Dataset
from plumbing.optimizer import optimizer_of, orthogonalise
from plumbing.quality import perplexity
from train import learning_rate

SHOWN = 40  # singular values kept per matrix


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    rows = search.points(base, scale)
    return {"SGD": rows["SGD"], "Muon": rows[search.CENTRE]}


def shape_of(matrix: torch.Tensor) -> dict:
    """SHOWN equally spaced singular values over the largest, the effective and the full rank."""
    values = torch.linalg.svdvals(matrix.flatten(1).double())
    places = torch.linspace(0, len(values) - 1, SHOWN).round().long()
    shares = values.square() / values.square().sum()
    relative = [float(f"{v:.3g}") for v in values[places] / values[0]]
    return {"rank": round(perplexity(shares).item(), 2), "full": len(values), "values": relative}


def undecayed(config: LabConfig, per_epoch: int) -> float:
    """The share of a matrix's first weights that weight decay has left after the last step."""
    left, momentum = 1.0, 0.0
    for step in range(config.epochs * per_epoch):
        lr = learning_rate(config, step, per_epoch)
        if config.optimizer == "muon":
            left *= 1 - lr * config.weight_decay
        else:
            momentum = config.sgd_momentum * momentum + config.weight_decay * left
            left -= lr * momentum
    return left


def measure(checkpoint: dict, dataset: Dataset) -> dict:
    """Accuracies, and per weight matrix the shapes of the last step and of the whole way."""
    config, matrices = checkpoint["config"], {}
    encoder = encoder_of(config)  # as it was before the first step
    optimizer = optimizer_of(LabConfig(**config), encoder.parameters())
    optimizer.load_state_dict(checkpoint["optimizer"])
    left = undecayed(LabConfig(**config), checkpoint["step"] // len(checkpoint["history"]))
    for name, first in encoder.named_parameters():
        if first.ndim > 1:
            step = optimizer.state[first]["momentum_buffer"].flatten(1)
            if config["optimizer"] == "muon":
                step = orthogonalise([step])[0]
            way = checkpoint["encoder"][name] - left * first.detach()
            matrices[name] = {"step": shape_of(step), "way": shape_of(way)}
    figures = evaluate(checkpoint, dataset, device=config["device"], controls=False, quiet=True)["trained"]
    return figures | {"matrices": matrices}


def table(runs: list[dict]) -> str:
    """Markdown: effective ranks of the last step and of the way per matrix, over the full rank."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    heads = [f"{name}, {what}" for what in ("last step", "whole way") for name in names]
    lines = [f"| matrix | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for matrix in runs[0]["final"]["matrices"]:
        cells = [f"{100 * share(runs, name, matrix, what):.0f} %" for what in ("step", "way") for name in names]
        lines.append(f"| {matrix} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(runs: list[dict], name: str, matrix: str, what: str) -> float:
    """The effective rank over the full rank, mean over the seeds."""
    own = [run["final"]["matrices"][matrix][what] for run in runs if run["name"] == name]
    return sum(row["rank"] / row["full"] for row in own) / len(own)


def draw(runs: list[dict], path) -> None:
    matrices = list(runs[0]["final"]["matrices"])
    example = next(name for name in matrices if name.endswith("layer4.0.conv2.weight"))
    picture, axes = plots.plt.subplots(1, 3, figsize=(13, 4.4), constrained_layout=True)
    for name, colour in (("SGD", plots.ORANGE), ("Muon", plots.BLUE)):
        own = [run["final"]["matrices"][example] for run in runs if run["name"] == name]
        x = [100 * i / (SHOWN - 1) for i in range(SHOWN)]
        for axis, what in zip(axes, ("step", "way")):
            values = torch.tensor([row[what]["values"] for row in own], dtype=torch.float64)
            plots.band(axis, x, values, colour, name)
        y = [i + (0.19 if name == "Muon" else -0.19) for i in range(len(matrices))]
        axes[2].barh(y, [100 * share(runs, name, m, "way") for m in matrices], 0.36, color=colour, label=name)
    for axis, words in zip(axes, ("the last step", "the whole way, the sum of all steps")):
        title = f"{words},\nlayer4's second convolution"
        axis.set(xlabel="singular values, largest first, %", ylabel="relative to the largest", title=title)
        axis.set_ylim(0, 1.25), axis.legend()
    labels = [m.removesuffix(".weight").removeprefix("backbone.") for m in matrices]
    axes[2].set(yticks=range(len(matrices)), yticklabels=labels, title="effective rank of the way,\n% of the full rank")
    axes[2].invert_yaxis(), axes[2].grid(False, axis="y")
    ranks = {name: 100 * sum(share(runs, name, m, "way") for m in matrices) / len(matrices) for name in ("SGD", "Muon")}
    title = "Along how many directions does training move a weight matrix?\n"
    title += "Of the full rank, as means over all matrices: SGD {SGD:.0f} %, Muon {Muon:.0f} %".format(**ranks)
    plots.finish(picture, title, runs, path)


if __name__ == "__main__":
    needs = ("matrices",)
    sys.exit(figure("spectrum", __doc__, points, draw, show=table, measure=lambda *_: measure, needs=needs))
