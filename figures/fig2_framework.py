"""Figure 2: the framework, one branch and one bank, drawn from code with the shapes of a real step.

    python figures/fig2_framework.py                                    the default, 5 000 images
    python figures/fig2_framework.py --recipe released --images 50000   the released script's

The picture shows what that recipe's encoder makes of drawn images before its first step: the view,
the rows of the bank, P and u. Names in typewriter are names in the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import figures  # isort: skip  # noqa: F401  first: Ctrl-C while torch is imported
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from bank import MemoryBank
from figures import plots
from figures.plots import plt
from plumbing import shapes
from plumbing.command_line import Parser, UserError, command
from plumbing.outputs import output, replacing
from train import RECIPES, Config, Pretraining

PICTURE = Path(__file__).parent / "results" / "fig2_framework.png"
TYPE = {"family": "monospace", "fontsize": 8, "color": plots.GREY}


def one_step(config: Config, count: int = 64) -> dict[str, torch.Tensor]:
    """What the picture shows: drawn images, their views and bank, P and u of the first view."""
    pixels = torch.from_numpy(shapes.draw(count, seed=3)[0])  # (count, 3, 32, 32) uint8
    run = Pretraining(config, count, torch.device("cpu"))
    bank = MemoryBank(count, config.dim, config.bank_momentum, config.bank_update, config.temperature)
    torch.manual_seed(1)
    bank.init_forward(run.encoder, [(run.augment(pixels), torch.arange(count))])
    with torch.no_grad():
        views = run.augment(pixels)
        z = run.encoder(views)
    s = bank.similarity(z)  # (count, count)
    p = (s[0] / config.temperature).softmax(0)
    return {"pixels": pixels, "views": views, "z": z, "weight": bank.weight, "p": p, "u": p.sqrt() / p.sqrt().sum()}


def box(axis, x, y, width, height, text, under="", colour="white") -> None:
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "facecolor": colour, "edgecolor": "black"}
    axis.add_patch(FancyBboxPatch((x, y), width, height, **style))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)
    axis.text(x + width / 2, y - 0.1, under, ha="center", va="top", **TYPE)


def arrow(axis, start, end, text="", colour="black", style="-", bend=0.0, place=(0, 0.1), align="center") -> None:
    patch = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=12, color=colour, linestyle=style,
        connectionstyle=f"arc3,rad={bend}", shrinkA=2, shrinkB=2,
    )  # fmt: skip
    axis.add_patch(patch)
    middle = ((start[0] + end[0]) / 2 + place[0], (start[1] + end[1]) / 2 + place[1])
    axis.text(*middle, text, ha=align, va="bottom", fontsize=9, color=colour)


def inset(figure, axis, x, y, width, height):
    """Axes inside the drawing, placed in its units."""
    (left, bottom), (right, top) = (
        figure.transFigure.inverted().transform(axis.transData.transform(c)) for c in ((x, y), (x + width, y + height))
    )
    small = figure.add_axes((left, bottom, right - left, top - bottom))
    small.set(xticks=[], yticks=[])
    small.grid(False)
    return small


def draw(config: Config, images: int, path) -> None:
    step = one_step(config)
    batch, dim, side = config.batch_size, step["z"].shape[1], step["views"].shape[-1]
    held = config.rows(images)  # the bank's rows: one window's, or all N
    columns = held if not config.negatives else f"{batch}+{config.negatives}"
    figure, axis = plt.subplots(figsize=(11, 5.2))
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.98)
    axis.set(xlim=(0, 13.2), ylim=(0, 6.2))
    axis.axis("off")

    def shown(x, y, size, pixels, text, under):
        small = inset(figure, axis, x, y, size, size)
        low, high = pixels.min(), pixels.max()
        small.imshow(((pixels - low) / (high - low)).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.text(x + size / 2, y + size + 0.08, text, ha="center", fontsize=10)
        axis.text(x + size / 2, y - 0.1, under, ha="center", va="top", **TYPE)

    count = f"N = {images}" + f", window {held}" * (held < images)
    shown(0.2, 3.9, 1.3, step["pixels"][0].float(), "image $x_i$", count)
    arrow(axis, (1.55, 4.55), (2.45, 4.55), "augment")
    shown(2.5, 3.9, 1.3, step["views"][0], "one view", f"({batch}, 3, {side}, {side})")
    arrow(axis, (3.85, 4.55), (4.5, 4.55))
    box(axis, 4.55, 4.05, 1.75, 1.0, "encoder $f$", f"{config.arch} + projector", "#dcebf7")
    arrow(axis, (6.35, 4.55), (7.0, 4.55))
    box(axis, 7.05, 4.05, 1.15, 1.0, "$z_i$", f"({batch}, {dim})")
    arrow(axis, (8.25, 4.55), (8.95, 4.55))
    box(axis, 9.0, 4.05, 1.55, 1.0, "$s = z\\,W^\\top$", f"({batch}, {columns})")

    small = inset(figure, axis, 7.05, 0.75, 2.1, 1.6)
    rows = step["weight"][:24, :40]
    small.imshow(rows.numpy(), cmap="PuOr", vmin=-rows.abs().max().item(), vmax=rows.abs().max().item(), aspect="auto")
    axis.text(8.1, 0.65, f"bank.weight ({held}, {dim})", ha="center", va="top", **TYPE)
    axis.text(6.95, 1.55, "bank $W$", ha="right", va="center", fontsize=10)
    arrow(axis, (9.15, 2.4), (9.65, 3.6))
    arrow(
        axis, (5.4, 3.65), (7.0, 2.2), "start: one pass,\n$w_i = z_i$", plots.GREEN, ":", 0.15, (-0.2, -0.35), "right"
    )
    arrow(axis, (7.6, 3.65), (7.75, 2.4), "update", plots.ORANGE, "-", 0, (-0.08, -0.1), "right")
    rule = {"corrected": "m\\,w_k + (1-m)\\,\\sum_i ([k = y_i] - P_k^{(i)})\\,z_i", "npid": "m\\,w_y + (1-m)\\,z_y"}
    every = {"corrected": "every row $k$", "npid": "own row $y$"}[config.bank_update]
    axis.text(
        0.2, 0.75, f"{every}:  $w \\leftarrow$ normalise$({rule[config.bank_update]})$", fontsize=10, color=plots.ORANGE
    )
    axis.text(0.2, 0.4, f"m = {config.bank_momentum:g}, after the step", **TYPE)

    top = step["p"].topk(12).indices
    for y, key, colour, text in (
        (4.05, "p", plots.BLUE, "$P$ = softmax$(s/\\tau)$"),
        (1.5, "u", plots.GREEN, "$u = \\sqrt{P} / \\sum\\sqrt{P}$"),
    ):
        small = inset(figure, axis, 11.2, y, 1.75, 1.0)
        small.bar(range(12), step[key][top].tolist(), color=colour)
        small.set_ylim(0, 1.05 * step["p"].max().item())
        axis.text(12.08, y + 1.08, text, ha="center", fontsize=10)
    arrow(axis, (10.6, 4.55), (11.1, 4.55))
    arrow(axis, (12.08, 3.95), (12.08, 2.95), "", plots.GREEN)
    axis.text(11.95, 3.45, "$L_{NCE} = -\\log P_{y_i}$", ha="right", fontsize=10, color=plots.BLUE)
    axis.text(11.95, 3.0, "$L_{SqrtKL} = KL(P\\,\\|\\,u)$", ha="right", fontsize=10, color=plots.GREEN)
    axis.text(12.95, 0.75, "$L = L_{NCE} + \\lambda\\,L_{SqrtKL}$", ha="right", fontsize=11)
    axis.text(12.95, 0.4, f"tau = {config.temperature:g}, lambda = {config.lam:g}", ha="right", **TYPE)
    axis.text(
        0.2,
        5.85,
        "One branch, one view per image, one bank: its rows are the classifier, and follow the gradient",
        fontsize=12,
    )
    figure.savefig(path, format="png")
    plt.close(figure)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="laptop", help="as in train.py [laptop]")
    parser.add_argument("--images", type=int, default=5000, help="N, the number of images [5000]")
    parser.add_argument("--picture", type=output, default=PICTURE, help="[%(default)s]")
    args = parser.parse_args(argv)
    if not 1 <= args.images <= 10**9:
        raise UserError(f"--images must lie in [1, 1000000000], not {args.images}")
    with replacing(args.picture, "the picture") as place:
        draw(Config(**RECIPES[args.recipe]), args.images, place)
    print(args.picture)


if __name__ == "__main__":
    sys.exit(main())
