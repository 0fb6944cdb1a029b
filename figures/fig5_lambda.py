"""Figure 5: accuracy against lambda, the weight of SqrtKL, with T = 1 and with T = τ.

    python figures/fig5_lambda.py --scale demo            the embedded shapes, a few minutes
    python figures/fig5_lambda.py --data-dir my_cifar10   5 000 images, 45 minutes on two cores
    python figures/fig5_lambda.py --scale paper           CIFAR-10, ResNet-18, 200 epochs, one GPU
    python figures/fig5_lambda.py --scale laptop --data-dir my_cifar10    50 000 images, 2 hours

At --scale laptop T is 1, τ is 0.2 or 0.07, and the ends and the best λ of each τ have all seeds.
One more point has no SqrtKL and 1.27 times the epochs: they take as long as those with SqrtKL.
T is the temperature of SqrtKL's softmax. The released code uses T = 1 and lambda = 20. At T = 1 the
softmax over the bank is nearly uniform and the loss is small. At T = τ it is as sharp as the NCE's,
and the same lambda has a hundred times the weight.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import plots
from figures.sweep import figure
from lab.train import LabConfig

LAMBDAS = (0.0, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0)
LONGER, LONGER_EPOCHS = "τ = 0.2, λ = 0, 38 epochs", 38  # 30 epochs times 5 035 / 3 964, Figure 3's images/s
LINES, LAPTOP_LINES = ("T = 1", "T = τ"), {"τ = 0.2": 0.2, "τ = 0.07": 0.07}


def name(words: str, lam: float) -> str:
    return f"{words}, λ = {lam:g}" if lam or words in LAPTOP_LINES else "λ = 0"


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    if scale == "laptop":
        lambdas = [lam for lam in LAMBDAS if lam not in (1, 10)]
        lines = {
            name(words, lam): replace(base, lam=lam, temperature=tau)
            for words, tau in LAPTOP_LINES.items()
            for lam in lambdas
        }
        return lines | {LONGER: replace(base, epochs=LONGER_EPOCHS)}
    temperatures = dict(zip(LINES, (1.0, base.temperature)))
    return {
        name(words, lam): replace(base, lam=lam, kl_temperature=t if lam else base.kl_temperature)
        for words, t in temperatures.items()
        for lam in LAMBDAS
    }


def shown(runs: list[dict]) -> tuple[list[str], list[float]]:
    """The lines of the picture, and their lambdas."""
    names = {run["name"] for run in runs}
    words = [w for w in (*LINES, *LAPTOP_LINES) if any(name(w, lam) in names for lam in LAMBDAS[1:])]
    return words, [lam for lam in LAMBDAS if any(name(w, lam) in names for w in words)]


def best(runs: list[dict], words: str) -> float:
    return plots.highest(runs, {lam: name(words, lam) for lam in shown(runs)[1] if lam})


def repeated(runs: list[dict]) -> list[str]:
    words, lambdas = shown(runs)
    return [LONGER, *(name(w, lam) for w in words for lam in {lambdas[0], best(runs, w), lambdas[-1]})]


def draw(runs: list[dict], path) -> None:
    words, lambdas = shown(runs)
    findings = []
    for w in words:
        lam = best(runs, w)
        change = plots.changed(runs, name(w, lam), name(w, 0.0), "knn")
        findings.append(f"at {w} the best λ, {lam:g}, changes kNN by {change}")
    line = "τ = 0.2"
    if line in words and any(run["name"] == LONGER for run in runs):
        change = plots.changed(runs, name(line, best(runs, line)), LONGER, "knn")
        findings.append(f"\nin as much time {change} at {line}")
    names = {w: [name(w, lam) for lam in lambdas] for w in words}
    labels = [f"{lam:g}" for lam in lambdas]
    runs = [run for run in runs if run["name"] != LONGER]
    plots.lines(path, runs, names, labels, "λ, the weight of SqrtKL", "SqrtKL: " + "; ".join(findings))


if __name__ == "__main__":
    sys.exit(figure("fig5_lambda", __doc__, points, draw, needs=("rank",), laptop=True, repeated=repeated))
