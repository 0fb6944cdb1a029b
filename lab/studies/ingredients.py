"""What each ingredient of the method is worth, at equal numbers of views.

python -m lab.studies.ingredients --scale demo            the embedded shapes, a few minutes
python -m lab.studies.ingredients --data-dir my_cifar10   half an hour on two cores
python -m lab.studies.ingredients --scale paper           CIFAR-10, ResNet-18, one GPU
"""

import sys
from dataclasses import replace

from figures import plots
from figures.sweep import figure
from lab.train import LabConfig


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    """Each point differs from the one that it names in one setting, or in the two that it names."""
    npid = replace(base, bank_init="random", bank_update="npid")
    forward = replace(npid, bank_init="forward")
    rows = {
        "NPID: random bank, NPID's rule": npid,
        "+ forward initialisation": forward,
        "+ corrected rule (the default)": base,
        "the default + SqrtKL, λ = 20, T = 1": replace(base, lam=20.0),
        "the default + CutMix, α = 0.5": replace(base, cutmix=0.5),
    }
    if base.temperature != 0.2:  # the released code's rule and temperature
        rows["NPID's rule, forward, τ = 0.2"] = replace(forward, temperature=0.2)
        rows["NPID's rule, forward, τ = 0.2 + SqrtKL, λ = 20"] = replace(forward, temperature=0.2, lam=20.0)
    return rows


def draw(runs: list[dict], path) -> None:
    names = list(dict.fromkeys(run["name"] for run in runs))
    npid, forward, corrected, sqrtkl, cutmix = names[:5]
    steps = {"forward initialisation": (forward, npid), "the corrected rule": (corrected, forward)}
    steps |= {"SqrtKL": (sqrtkl, corrected), "CutMix": (cutmix, corrected)}
    gains = {step: plots.change(runs, *pair, "knn")[0] for step, pair in steps.items()}
    words = [f"{step} {gain:+.1f}" for step, gain in sorted(gains.items(), key=lambda item: -item[1])]
    plots.bars(path, runs, names, "What each ingredient changes in kNN: " + ", ".join(words))


if __name__ == "__main__":
    sys.exit(figure("ingredients", __doc__, points, draw))
