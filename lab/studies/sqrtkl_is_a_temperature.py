"""Is SqrtKL a lower temperature? The released settings with SqrtKL, and without it at tau'.

    python -m lab.studies.sqrtkl_is_a_temperature --scale demo     the embedded shapes, minutes
    python -m lab.studies.sqrtkl_is_a_temperature --scale laptop --data-dir my_cifar10     6 hours

docs/derivations.md, section 10: with tau = 0.2 and lambda = 20 at T = 1, SqrtKL should act as
tau' = 0.143 with 0.71 times the gradient. All runs have NPID's rule, in which tau has no part.
"Scaled" divides the weight decay by the factor as well, so that SGD makes the scaled gradient's
steps. At T = tau SqrtKL is a confidence penalty, which for a small lambda acts as a lower
temperature too, whatever P is: the last point, with tau' = 0.133.
"""

import sys
from dataclasses import replace

from figures import fig3_convergence as fig3
from figures import plots
from figures.sweep import figure, spread
from lab.train import LabConfig

LAM = 20.0
PLAIN, WITH = "τ = 0.2", "τ = 0.2, SqrtKL with λ = 20"
LOWER, SCALED = "τ' = 0.143", "τ' = 0.143, gradient scaled by 0.71"
PENALTY = "τ = 0.2, SqrtKL with λ = 1 and T = τ"


def acts_as(tau: float, lam: float, kl_temperature: float = 1.0) -> float:
    """The tau' of docs/derivations.md, section 10, with u constant."""
    return 1 / (1 / tau + lam * tau / (2 * kl_temperature**2))


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base = next(iter(fig3.points(base, scale).values()))  # without SqrtKL
    base = replace(base, bank_update="npid", temperature=0.2)
    lower = acts_as(base.temperature, LAM)
    factor = lower / base.temperature
    return {
        PLAIN: base,
        WITH: replace(base, lam=LAM, kl_temperature=1.0),
        LOWER: replace(base, temperature=lower),
        SCALED: replace(base, temperature=lower, lr=factor * base.lr, weight_decay=base.weight_decay / factor),
        PENALTY: replace(base, lam=1.0, kl_temperature=base.temperature),
    }


def watched(runs: list[dict], name: str, key: str) -> list[dict]:
    """The runs of a point whose looks have the key: "tau_before" was recorded later than "tau"."""
    return [run for run in runs if run["name"] == name and any(key in row for row in run["epochs"])]


def table(runs: list[dict]) -> str:
    """Markdown: accuracies over the seeds, and the temperature that SqrtKL acts as."""
    lines = ["| | linear | kNN (k = 200) | fitted τ', first to last look | cosine there | at τ | length ratio |"]
    lines.append("|---" * 7 + "|")
    for name in dict.fromkeys(run["name"] for run in runs):
        cells = [name, *(spread(runs, name, key) for key in ("linear", "knn"))]
        for key in ("tau", "tau_cosine", "tau_before", "tau_length"):
            fits = watched(runs, name, key)
            values = plots.history(fits, name, key).mean(0) if fits else None
            cells.append(f"{values[0]:.3f} to {values[-1]:.3f}" if fits else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: list[dict], path) -> None:
    picture, axes = plots.plt.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    for name, colour in zip(dict.fromkeys(run["name"] for run in runs), plots.MARKERS):
        own = [run for run in runs if run["name"] == name]
        looked = [row["epoch"] for row in own[0]["epochs"] if "knn" in row]
        plots.band(axes[0], looked, 100 * plots.history(runs, name, "knn"), colour, name)
        looks = (1, "tau", name, "-"), (2, "tau_cosine", name, "-"), (2, "tau_before", "at τ itself", ":")
        for panel, key, label, style in looks:
            if fits := watched(runs, name, key):
                looked = [row["epoch"] for row in fits[0]["epochs"] if key in row]
                plots.band(axes[panel], looked, plots.history(fits, name, key), colour, label, style)
    axes[0].set(xlabel="epoch", ylabel="kNN (k = 200), top-1 %")
    axes[1].axhline(acts_as(0.2, LAM), color=plots.GREY, linestyle=":", label="predicted τ' for T = 1")
    axes[1].axhline(acts_as(0.2, 1.0, 0.2), color=plots.GREY, linestyle="--", label="predicted τ' for T = τ")
    axes[1].set(xlabel="epoch", ylabel="τ' that fits the gradient best")
    axes[2].set(xlabel="epoch", ylabel="cosine with NCE's gradient at τ'")
    for axis in axes:
        if axis.lines:
            axis.legend(fontsize=8)
    words = {WITH: "SqrtKL", LOWER: "τ' alone", SCALED: "τ' with the scaled gradient", PENALTY: "SqrtKL at T = τ"}
    title = ", ".join(f"{words[name]} {plots.changed(runs, name, PLAIN, 'knn')}" for name in words)
    plots.finish(picture, f"Change of kNN against τ = 0.2: {title}", runs, path)


if __name__ == "__main__":
    needs = ("knn", "rank")
    sys.exit(figure("sqrtkl_is_a_temperature", __doc__, points, draw, show=table, looks=2, needs=needs, laptop=True))
