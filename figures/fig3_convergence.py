"""Figure 3: with and without SqrtKL, accuracy and loss against epochs and against the clock.

    python figures/fig3_convergence.py --scale demo            the embedded shapes, a few minutes
    python figures/fig3_convergence.py --data-dir my_cifar10   half an hour on two cores
    python figures/fig3_convergence.py --scale paper           CIFAR-10, ResNet-18, one GPU
    python figures/fig3_convergence.py --scale laptop --data-dir my_cifar10   both rules, 6 hours

At --scale laptop the time is the number of views at the images/s of
`python -m lab.studies.throughput figure3 --device cpu`, so it does not depend on where the runs
were made, or on what else ran.

The paper's claim: with SqrtKL the same network needs fewer epochs, because every row gets a
gradient in every step. With K sampled negatives only a step's rows do.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import plots
from figures.plots import plt
from figures.sweep import RESULTS, figure, measured_rate, rates_of
from lab.train import LabConfig

EPOCHS = {"demo": 12, "cpu": 20, "paper": 200, "laptop": 100}
RULES = {"NPID's rule, ": "npid", "corrected rule, ": "corrected"}  # at --scale laptop
RATES = RESULTS / "bench" / "figure3-cpu.json"
WITHOUT, WITH = "without SqrtKL", "with SqrtKL, λ = 20, T = 1"


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base = replace(base, epochs=EPOCHS[scale])
    rules = RULES if scale == "laptop" else {"": base.bank_update}
    rows = {}
    for words, rule in rules.items():
        rows[words + WITHOUT] = replace(base, bank_update=rule)
        rows[words + WITH] = replace(base, bank_update=rule, lam=20.0, kl_temperature=1.0)
    return rows


def draw(runs: list[dict], path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), constrained_layout=True, sharey="row", sharex="col")
    panels = {"knn": (100, "kNN (k = 200), top-1 %"), "nce": (1, "NCE loss, nats")}
    names = {run["name"] for run in runs}
    rules = [words for words in ("", *RULES) if words + WITHOUT in names]
    for row, (key, (scale, label)) in zip(axes, panels.items()):
        for words, style in zip(rules, ("-", "--")):
            for name, colour in ((words + WITHOUT, plots.BLUE), (words + WITH, plots.ORANGE)):
                y = scale * plots.history(runs, name, key)  # (S, X)
                looked = [r for r in runs[0]["epochs"] if key in r]
                minutes = clock(runs, name)[[r["epoch"] - 1 for r in looked]] / 60
                plots.band(row[0], [r["epoch"] for r in looked], y, colour, name, style)
                plots.band(row[1], minutes, y, colour, name, style)
        row[0].set(ylabel=label)
    axes[1, 0].set(xlabel="epoch")
    axes[1, 0].xaxis.get_major_locator().set_params(integer=True)
    where = f"{rates()['hardware']}, {rates()['precision']}" if rate_of(runs, runs[0]["name"]) else "mean over seeds"
    axes[1, 1].set(xlabel=f"minutes of training ({where})")
    axes[0, 0].legend(loc="lower right")
    plots.finish(figure, "With SqrtKL kNN is " + ",\nand ".join(finding(runs, words) for words in rules), runs, path)


def rates() -> dict:
    return rates_of(RATES)


def rate_of(runs: list[dict], name: str) -> float | None:
    return measured_rate(rates(), name, next(run["config"] for run in runs if run["name"] == name))


def clock(runs: list[dict], name: str):
    """Seconds of training (E,) after each epoch: by the measured rate, else by the clock."""
    rate, batch = rate_of(runs, name), next(run["config"]["batch_size"] for run in runs if run["name"] == name)
    if rate:
        return plots.history(runs, name, "step").mean(0) * batch / rate
    return plots.history(runs, name, "seconds").mean(0)


def finding(runs: list[dict], words: str) -> str:
    """What SqrtKL changes under a rule, in words."""
    times = [clock(runs, words + name)[-1].item() for name in (WITH, WITHOUT)]
    early = [100 * plots.history(runs, words + name, "knn").mean(0) for name in (WITH, WITHOUT)]
    half = len(early[0]) // 2 - 1
    change = plots.changed(runs, words + WITH, words + WITHOUT, "knn")
    changes = f"{(early[0] - early[1])[half]:+.1f} halfway and {change} at the end"
    under = f" with the {words}" if words.startswith("corrected") else f" with {words}" if words else "; "
    return f"{changes}{under}an epoch takes {times[0] / times[1]:.2f} times as long"


if __name__ == "__main__":
    sys.exit(figure("fig3_convergence", __doc__, points, draw, looks=2, needs=("knn", "rank"), laptop=True))
