"""Where does SqrtKL pay? A pair with and without it, under one changed setting at a time.

    python -m lab.studies.sqrtkl_where --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.sqrtkl_where --data-dir my_cifar10   half an hour on two cores

Each pair differs in lambda alone: 0 and 20, at T = 1 as in the released code. Dots are seeds.
"""

import sys
from dataclasses import replace

import torch

from figures import fig3_convergence as fig3
from figures import plots
from figures.plots import plt
from figures.sweep import figure
from lab.train import LabConfig

CHANCE = 3.6  # standard errors: Student's t, 10 degrees of freedom, 5 % over ten comparisons
LAMBDAS = {", without": 0.0, ", with SqrtKL": 20.0}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    few = base.subset // 5 or 10_000  # images; trained on for as many steps
    longer = fig3.points(base, scale)[fig3.WITHOUT]
    settings = {
        "as Figure 5": base,
        **({f"{longer.epochs} epochs, as Figure 3": longer} if longer != base else {}),
        "NPID's rule, random bank": replace(base, bank_init="random", bank_update="npid"),
        "NPID's rule, τ = 0.2": replace(base, temperature=0.2, bank_update="npid"),
        f"{few} images": replace(
            base, subset=few, epochs=5 * base.epochs, bank_momentum=0.9, negatives=min(base.negatives, few // 2)
        ),
    }
    return {f"{name}{words}": replace(c, lam=lam) for name, c in settings.items() for words, lam in LAMBDAS.items()}


def draw(runs: list[dict], path) -> None:
    without, with_ = LAMBDAS
    names = [name.removesuffix(without) for name in dict.fromkeys(r["name"] for r in runs) if name.endswith(without)]
    figure, axis = plt.subplots(figsize=(10, 0.6 * len(names) + 1.5), constrained_layout=True)
    beyond = []
    for (key, words), colour, shift in zip(plots.FIGURES.items(), (plots.BLUE, plots.ORANGE), (-0.12, 0.12)):
        # The same seed has the same first weights and order of images: differences go seed by seed.
        gains = torch.stack(
            [plots.percent(runs, n + with_, key) - plots.percent(runs, n + without, key) for n in names]
        )
        count = gains.shape[1]  # gains is (settings, S)
        # Three differences say little of their spread: it is pooled over the settings.
        error = (gains.var(1).mean() / count).sqrt().item() if count > 1 else 0.0
        for y, (name, row) in enumerate(zip(names, gains)):
            axis.plot(row, [y + shift] * count, ".", color=colour, alpha=0.5)
            axis.errorbar(row.mean(), y + shift, xerr=error, color=colour, marker=plots.MARKERS[colour], capsize=3)
            if abs(row.mean()) > CHANCE * error > 0:
                beyond.append(f"{name} ({row.mean():+.1f} {key})")
        axis.plot([], [], color=colour, marker=plots.MARKERS[colour], label=words.split(",")[0])
    axis.axvline(0, color=plots.GREY, linewidth=1)
    axis.set(
        yticks=range(len(names)), yticklabels=names, xlabel="accuracy with SqrtKL (λ = 20, T = 1) less without, points"
    )
    axis.invert_yaxis()
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    finding = "nowhere" if not beyond else "for " + ", ".join(beyond)
    finding = finding if count > 1 else "one seed cannot tell"
    plots.finish(figure, f"SqrtKL makes a difference that is larger than chance: {finding}", runs, path)


if __name__ == "__main__":
    sys.exit(figure("sqrtkl_where", __doc__, points, draw))
