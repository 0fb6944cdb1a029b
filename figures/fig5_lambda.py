"""Figure 5: accuracy against lambda, the weight of SqrtKL, with T = 1 and with T = τ.

    python figures/fig5_lambda.py --scale demo            the embedded shapes, a few minutes
    python figures/fig5_lambda.py --data-dir my_cifar10   5 000 images, 45 minutes on two cores
    python figures/fig5_lambda.py --scale paper           CIFAR-10, ResNet-18, 200 epochs, one GPU

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


def name(words: str, lam: float) -> str:
    return f"{words}, λ = {lam:g}" if lam else "λ = 0"


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    temperatures = {"T = 1": 1.0, "T = τ": base.temperature}
    return {
        name(words, lam): replace(base, lam=lam, kl_temperature=t if lam else base.kl_temperature)
        for words, t in temperatures.items()
        for lam in LAMBDAS
    }


def draw(runs: list[dict], path) -> None:
    findings = []
    for words in ("T = 1", "T = τ"):
        best = max(LAMBDAS[1:], key=lambda lam: plots.percent(runs, name(words, lam), "knn").mean())
        gain, error = plots.change(runs, name(words, best), "λ = 0", "knn")
        findings.append(f"at {words} the best λ, {best:g}, changes kNN by {gain:+.1f} ± {error:.1f}")
    names = {words: [name(words, lam) for lam in LAMBDAS] for words in ("T = 1", "T = τ")}
    labels = [f"{lam:g}" for lam in LAMBDAS]
    plots.lines(path, runs, names, labels, "λ, the weight of SqrtKL", "SqrtKL: " + "; ".join(findings))


if __name__ == "__main__":
    sys.exit(figure("fig5_lambda", __doc__, points, draw, needs=("rank",)))
