"""The bank as it learns: its spectrum, with and without SqrtKL, and the reach of a view's gradient.

    python -m lab.studies.bank_spectrum --scale demo           after the demos of Figures 3 to 5
    python -m lab.studies.bank_spectrum                        from the results of Figures 3 to 5
    python -m lab.studies.bank_spectrum --data-dir my_cifar10

Expected: for a nearly uniform P, L_SqrtKL ≈ Var_j(s_j) / 8 = z' Cov(W) z / 8. This penalises the
directions in which the bank varies most, so it should flatten the spectrum. Its gradient should
reach all rows, the NCE's gradient only the rows that resemble the view. What is measured exactly:
`spectrum` and `reach` in figures/observe.py.
"""

import sys

import torch

from figures import fig3_convergence as fig3
from figures import fig4_momentum as fig4
from figures import fig5_lambda as fig5
from figures import plots
from figures.observe import RANKS
from figures.plots import plt
from figures.sweep import figure
from lab.train import LabConfig


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    return fig3.points(base, scale) | fig4.points(base, scale) | fig5.points(base, scale)


def table(runs: list[dict]) -> str:
    """Markdown: the bank's effective rank, the gradient's reach and both losses at the end."""
    lines = [
        "| setting | effective rank | gradient on other rows | rows reached | NCE | λ · SqrtKL |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        last = {
            key: plots.history(runs, name, key).mean(0)[-1].item()
            for key in ("rank", "reach_share", "reach_rows", "nce")
        }
        penalty = plots.history(runs, name, "loss").mean(0)[-1].item() - last["nce"]
        lines.append(
            f"| {name} | {last['rank']:.1f} | {last['reach_share']:.1%} | {last['reach_rows']:.0f} "
            f"| {last['nce']:.2f} | {penalty:.3f} |"
        )
    return "\n".join(lines)


def draw(runs: list[dict], path) -> None:
    picture, axes = plt.subplots(3, 2, figsize=(10, 10), constrained_layout=True)
    spectrum, rank, rule, flat, share, rows = axes.flat
    for name, colour in ((fig3.WITHOUT, plots.BLUE), (fig3.WITH, plots.ORANGE)):
        shares = plots.history(runs, name, "spectrum").mean(0)  # (X, R)
        ranks = RANKS[: shares.shape[1]]
        for epoch, style in ((0, ":"), (len(shares) - 1, "-")):
            spectrum.plot(ranks, 100 * shares[epoch], style, color=colour, label=f"{name}, epoch {epoch + 1}")
        y = plots.history(runs, name, "rank")
        plots.band(rank, range(1, y.shape[1] + 1), y, colour, name)
    spectrum.set(xscale="log", yscale="log", xlabel="principal axis of the bank", ylabel="share of its variance, %")
    spectrum.set(ylim=(1e-3, None), title="the spectrum, first epoch against last")
    spectrum.legend(fontsize=8)
    rank.set(
        xlabel="epoch",
        ylabel="effective rank",
        ylim=(0, None),
        title="the same as one number: axes, if all had equal shares",
    )
    rank.xaxis.get_major_locator().set_params(integer=True)
    rank.legend()

    def against(axis, labels, lines, key, scale, xlabel, ylabel, title):
        for (words, names), colour in zip(lines.items(), (plots.BLUE, plots.ORANGE)):
            y = torch.stack([plots.history(runs, name, key)[:, -1] for name in names], dim=1)  # (S, X)
            plots.band(axis, range(len(labels)), scale * y, colour, words)
        places = {"xticks": range(len(labels)), "xticklabels": [f"{label:g}" for label in labels]}
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title, **places)
        axis.legend()

    momenta = {words: [fig4.name(words, m) for m in fig4.MOMENTA] for words in fig4.RULES.values()}
    lambdas = {words: [fig5.name(words, lam) for lam in fig5.LAMBDAS] for words in ("T = 1", "T = τ")}
    after, weight = "effective rank, after the last epoch", "λ, the weight of SqrtKL"
    against(
        rule,
        fig4.MOMENTA,
        momenta,
        "rank",
        1,
        "m, the momentum of the bank's update",
        after,
        "the update rule and the spectrum",
    )
    against(flat, fig5.LAMBDAS, lambdas, "rank", 1, weight, after, "SqrtKL and the spectrum")
    against(
        share, fig5.LAMBDAS, lambdas, "reach_share", 100, weight, "%", "share of a view's gradient on rows not its own"
    )
    against(rows, fig5.LAMBDAS, lambdas, "reach_rows", 1, weight, "rows", "how many rows that gradient is spread over")
    rows.set(ylim=(0, None))

    def last(name):
        return plots.history(runs, name, "rank")[:, -1].mean().item()

    corrected, npid = (last(fig4.name(words, 0.5)) for words in fig4.RULES.values())
    title = (
        f"Effective rank of the bank at m = 0.5: {corrected:.0f} under the corrected rule, {npid:.0f} under NPID's\n"
        f"with SqrtKL (λ = 20, T = 1) it ends at {last(fig3.WITH):.0f}, without at {last(fig3.WITHOUT):.0f}"
    )
    plots.finish(picture, title, runs, path)


if __name__ == "__main__":
    sys.exit(figure("bank_spectrum", __doc__, points, draw, show=table, looks=2, needs=("rank",)))
