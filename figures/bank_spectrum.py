"""The bank as it learns: its spectrum with and without SqrtKL, and how far into the bank a view's gradient reaches.

    python figures/bank_spectrum.py --scale demo          after the demo of Figures 3 and 5, whose runs these are
    python figures/bank_spectrum.py                       redrawn from their results in figures/results
    python figures/bank_spectrum.py --data-dir my_cifar10

Expected: for a nearly uniform P, L_SqrtKL ≈ Var_j(s_j) / 8 = z' Cov(W) z / 8, a penalty on the directions in which the bank
varies most, so it should flatten the spectrum; and its gradient reaches all rows, the NCE's those that look like the view.
`observe.spectrum` and `observe.reach` say what exactly is measured.
"""

import sys

import fig3_convergence as fig3
import fig5_lambda as fig5
import plots
import torch
from observe import RANKS
from plots import plt
from sweep import Config, figure


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    return fig3.points(base, scale) | fig5.points(base, scale)


def table(runs: list[dict]) -> str:
    """Markdown: effective rank of the bank, reach of the gradient, and both losses, after the last epoch; means over seeds."""
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
    picture, ((spectrum, rank), (flat, reach)) = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for name, colour in ((fig3.WITHOUT, plots.BLUE), (fig3.WITH, plots.ORANGE)):
        shares = plots.history(runs, name, "spectrum").mean(0)  # (X, R)
        ranks = RANKS[: shares.shape[1]]
        for epoch, style in ((0, ":"), (len(shares) - 1, "-")):
            label = f"{name}, epoch {epoch + 1}"
            spectrum.plot(ranks, 100 * shares[epoch], style, color=colour, label=label)
        y = plots.history(runs, name, "rank")
        plots.band(rank, range(1, y.shape[1] + 1), y, colour, name)
    spectrum.set(xscale="log", yscale="log", xlabel="principal axis of the bank", ylabel="share of its variance, %")
    spectrum.set_ylim(bottom=1e-3)
    spectrum.set_title("the first epoch against the last")
    spectrum.legend(fontsize=8)
    rank.set(xlabel="epoch", ylabel="effective rank", title="how many axes it would take, if all had equal shares")
    rank.set_ylim(bottom=0)
    rank.xaxis.get_major_locator().set_params(integer=True)

    place, labels = range(len(fig5.LAMBDAS)), [f"{lam:g}" for lam in fig5.LAMBDAS]
    for words, colour in (("T = 1", plots.BLUE), ("T = τ", plots.ORANGE)):
        names = [fig5.name(words, lam) for lam in fig5.LAMBDAS]
        for axis, key, scale in ((flat, "rank", 1), (reach, "reach_share", 100)):
            y = torch.stack([plots.history(runs, name, key)[:, -1] for name in names], dim=1)  # (S, λ)
            plots.band(axis, place, scale * y, colour, words)
    flat.set(ylabel="effective rank, after the last epoch", title="SqrtKL against the spectrum")
    reach.set(ylabel="gradient on other rows, %", title="the gradient that falls beyond the image's own row")
    for axis in (flat, reach):
        axis.set(xlabel="λ, the weight of SqrtKL", xticks=place, xticklabels=labels)
        axis.legend()
    last = {name: plots.history(runs, name, "rank")[:, -1].mean().item() for name in (fig3.WITHOUT, fig3.WITH)}
    title = f"The bank's effective rank ends at {last[fig3.WITHOUT]:.0f} without SqrtKL and at {last[fig3.WITH]:.0f} with λ = 20, T = 1"
    plots.finish(picture, title, runs, path)


if __name__ == "__main__":
    sys.exit(figure("bank_spectrum", __doc__, points, draw, show=table, looks=2, needs=("rank",)))
