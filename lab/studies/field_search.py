"""Every compared method gets the same search: twelve trials each, on held-out training images.

    python -m lab.studies.field_search --scale demo                      the embedded shapes
    python -m lab.studies.field_search --data-dir my_cifar10 --seeds 0   six hours on two cores

A trial changes one thing of the method's centre, which has the default recipe's optimiser: Muon at
rate 0.07 with weight decay 0.3, 256 images a step. The trials: half and twice the rate, no weight
decay, two other values of the method's own setting (the temperature, or what plays its part),
smaller crops, half the batch, and SGD at the best rate of the first search
(lab/studies/field_lr.py). Then three trials combine the best of these. All trials have equal
numbers of views. The sum of the held-out linear and kNN accuracies chooses.
"""

import sys
from dataclasses import replace

from figures.field import LR, NAMES, OURS, base_of, method_on, total
from figures.sweep import figure, spread
from lab.train import LabConfig

EPOCHS = {"demo": 4, "cpu": 24, "paper": 200}  # of one view
OWN = {  # each method's own setting: what it is called, the centre's value (None: usual), two others
    "ours": ("τ", 0.1, (0.07, 0.15)), "npid": ("τ", 0.1, (0.07, 0.15)), "parametric": ("τ", 0.1, (0.07, 0.15)),
    "simclr": ("temperature", 0.2, (0.1, 0.5)), "moco": ("temperature", None, (0.07, 0.2)),
    "mocov2": ("temperature", None, (0.07, 0.2)), "byol": ("teacher's m", None, (0.97, 0.996)),
    "simsiam": ("predictor's width", None, (128, 1024)), "barlow": ("λ", None, (0.002, 0.02)),
    "dino": ("student's temperature", None, (0.07, 0.2)),
}  # fmt: skip


# Three more trials for each, named after the first nine were seen: the best one together with the
# next best changes, or further in the direction of the best one.
SECOND = {
    "ours": (("crops from 0.1", "twice the rate"), ("crops from 0.1", "τ 0.15"), ("twice the rate", "τ 0.15")),
    "npid": (("τ 0.07", "crops from 0.1"), ("τ 0.07", "half the rate"), ("τ 0.05",)),
    "parametric": (("twice the rate", "τ 0.15"), ("twice the rate", "half the batch"), ("τ 0.15", "half the batch")),
    "simclr": (("temperature 0.1", "twice the rate"), ("temperature 0.1", "half the batch"), ("temperature 0.07",)),
    "moco": (("quarter of the batch",), ("half the batch", "temperature 0.07"), ("half the batch", "half the rate")),
    "mocov2": (("quarter of the batch",), ("half the batch", "temperature 0.07"), ("half the batch", "half the rate")),
    "byol": (("teacher's m 0.97", "half the batch"), ("teacher's m 0.97", "half the rate"), ("teacher's m 0.94",)),
    "simsiam": (
        ("predictor's width 128", "half the batch"), ("half the batch", "half the rate"), ("predictor's width 256",)
    ),
    "barlow": (("λ 0.002", "half the batch"), ("λ 0.002", "twice the rate"), ("λ 0.001",)),
    "dino": (("quarter of the batch",), ("half the batch", "half the rate"), ("half the batch", "no weight decay")),
}  # fmt: skip


def trials(method: str, centre: LabConfig) -> dict[str, LabConfig]:
    name, usual, values = OWN[method]
    own = "temperature" if method in OURS else "branch_setting"
    centre = replace(centre, **({own: usual} if usual else {}))
    changes = {
        "centre": {},
        "half the rate": dict(lr=centre.lr / 2),
        "twice the rate": dict(lr=centre.lr * 2),
        "no weight decay": dict(weight_decay=0.0),
        "crops from 0.1": dict(crop_min=0.1),
        "half the batch": dict(batch_size=centre.batch_size // 2, lr=centre.lr / 2**0.5),
        "SGD": dict(
            optimizer="sgd", lr=LR[method] * centre.batch_size / 128, weight_decay=1e-4 if method in OURS else 5e-4
        ),
    }
    changes |= {f"{name} {value:g}": {own: value} for value in values}
    rows = {words: replace(centre, **change) for words, change in changes.items()}
    factors = {"half the rate": 0.5, "twice the rate": 2, "half the batch": 0.5**0.5, "quarter of the batch": 0.5}
    changes["quarter of the batch"] = dict(batch_size=centre.batch_size // 4)
    for several in SECOND[method]:
        together = {"lr": centre.lr}
        for words in several:
            change = changes[words] if words in changes else {own: float(words.split()[-1])}
            together |= {key: value for key, value in change.items() if key != "lr"}
            together["lr"] *= factors.get(words, 1)
        rows[", ".join(several)] = replace(centre, **together)
    return rows


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    held_out, rows = {"demo": 200, "cpu": 4000, "paper": 5000}[scale], {}
    for method, words in NAMES.items():
        epochs = EPOCHS[scale] // (1 if method in OURS else 2)
        centre = replace(base_of(base, scale), holdout=held_out, epochs=epochs, warmup=epochs / 20)
        tried = trials(method, method_on(centre, method))
        rows |= {f"{words}: {name}": config for name, config in tried.items()}
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


if __name__ == "__main__":
    sys.exit(figure("field_search", __doc__, points, show=table))
