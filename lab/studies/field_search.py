"""Every compared method gets the same search: nine trials each, on held-out training images.

    python -m lab.studies.field_search --scale demo                      the embedded shapes
    python -m lab.studies.field_search --data-dir my_cifar10 --seeds 0   three hours on two cores

A trial changes one thing of the method's centre, which is Muon at rate 0.05 with weight decay 0.3.
The trials: two other rates, no weight decay, two other values of the method's own setting (the
temperature, or what plays its part), larger crops of the image left out, a larger batch, and SGD
at the best rate of the first search (lab/studies/field_lr.py). All trials have equal numbers of
views. The sum of the held-out linear and kNN accuracies chooses.
"""

import sys
from dataclasses import replace

from figures.field import LR, NAMES, OURS, contestant
from figures.sweep import figure, spread
from lab.studies import search
from lab.train import LabConfig

EPOCHS = {"demo": 4, "cpu": 12, "paper": 200}  # of one view
MUON = dict(optimizer="muon", lr=0.05, muon_momentum=0.6, weight_decay=0.3)
OWN = {  # each method's own setting: what it is called, and two values around the usual one
    "ours": ("τ", (0.07, 0.15)), "npid": ("τ", (0.07, 0.15)), "parametric": ("τ", (0.07, 0.15)),
    "simclr": ("temperature", (0.1, 0.2)), "moco": ("temperature", (0.07, 0.2)), "mocov2": ("temperature", (0.07, 0.2)),
    "byol": ("teacher's m", (0.97, 0.996)), "simsiam": ("predictor's width", (128, 1024)),
    "barlow": ("λ", (0.002, 0.02)), "dino": ("student's temperature", (0.07, 0.2)),
}  # fmt: skip


def trials(method: str, batch: int) -> dict[str, dict]:
    """The changes of a method's centre; the batch and rate of SGD are for `batch` images."""
    name, values = OWN[method]
    own = "temperature" if method in OURS else "branch_setting"
    decay = 1e-4 if method in OURS else 5e-4
    changes = {
        "centre": {},
        "rate 0.025": dict(lr=0.025),
        "rate 0.1": dict(lr=0.1),
        "no weight decay": dict(weight_decay=0.0),
        "crops from 0.1": dict(crop_min=0.1),
        "batch twice as large": dict(batch_size=2 * batch, lr=0.07),
        "SGD": dict(optimizer="sgd", lr=LR[method] * batch / 128, weight_decay=decay),
    }
    return changes | {f"{name} {value:g}": {own: value} for value in values}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    centre, rows = search.points(base, scale)[search.CENTRE], {}
    for method, words in NAMES.items():
        epochs = EPOCHS[scale] if method in OURS else EPOCHS[scale] // 2
        window = centre.window if method == "ours" else 0  # the others have no rows that age, or are the older methods
        own = replace(contestant(centre, method), **MUON, epochs=epochs, warmup=epochs / 18, window=window)
        if method in OURS:  # `contestant` sets what its two-branch methods ignore to fixed values
            own = replace(own, temperature=centre.temperature, dim=centre.dim, hidden=centre.hidden)
        rows |= {f"{words}: {name}": replace(own, **change) for name, change in trials(method, own.batch_size).items()}
    return rows


def table(runs: list[dict]) -> str:
    """Markdown: a line per method, its trials with linear / kNN, the best in bold."""
    lines = ["| method | best trial | linear | kNN (k = 200) | other trials, linear / kNN |", "|---|---|---|---|---|"]
    for words in NAMES.values():
        own = list(dict.fromkeys(run["name"] for run in runs if run["name"].startswith(words + ": ")))
        if not own:
            continue
        best = max(own, key=lambda name: total(runs, name))
        figures = {name: [spread(runs, name, key) for key in ("linear", "knn")] for name in own}
        others = [f"{short(name)}: {' / '.join(figures[name])}" for name in own if name != best]
        lines.append(f"| {words} | **{short(best)}** | {' | '.join(figures[best])} | {'; '.join(others)} |")
    return "\n".join(lines)


def short(name: str) -> str:
    return name.split(": ", 1)[1]


def total(runs: list[dict], name: str) -> float:
    """Linear and kNN accuracy together, the mean over the seeds."""
    sums = [run["final"]["linear"] + run["final"]["knn"] for run in runs if run["name"] == name]
    return sum(sums) / len(sums)


if __name__ == "__main__":
    sys.exit(figure("field_search", __doc__, points, show=table))
