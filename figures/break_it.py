"""Six runs, five with a planted fault each: which one is right? (EXERCISES.md, exercise 11)

    python figures/break_it.py              trains them on the embedded shapes, a few minutes,
                                            and draws runs/break_it.png
    python figures/break_it.py --reveal     names them, and does not train again

The faults come from tests/faults.py. The letters are dealt by chance when the runs are made, and
kept with them; --deal N deals them by the number N, the same for a whole class. There are only
500 images and their views differ little, so that the loss comes close to 0, or to the floor that
a fault leaves. Good features are not the aim.
"""

import json
import math
import random
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import figures  # isort: skip  # noqa: F401  first: Ctrl-C while torch is imported
import faults

from figures import plots
from figures.observe import Watch
from figures.sweep import SCALES
from plumbing.command_line import Parser, UserError, command
from plumbing.outputs import output, replacing, save_text
from plumbing.runs import read_checkpoint
from train import Config, Pretraining, load_dataset, train

KINDS = {
    "nothing is wrong": faults.AsWritten,
    "rows are not normalised": faults.NotNormalised,
    "P is dropped": faults.NoP,
    "the sign of P is flipped": faults.PullsAll,
    "the bank moves before the similarities are read": faults.BankFirst,
    "own rows among the negatives": faults.OwnAmongNegatives,
}
EASY = SCALES["demo"] | dict(
    subset=500, width=16, size=20, dim=128, batch_size=50, negatives=440, bank_momentum=0.75, knn_every=0, crop_min=0.9,
    jitter_p=0.0, gray=0.0, temperature=0.07, optimizer="sgd", lr=0.1, weight_decay=1e-4, window=0, precision="fp32",
)  # fmt: skip
CURVES = {"nce": "L_NCE, nats", "knn": "kNN, share of the test images", "rank": "effective axes of the bank"}


def learner(kind, config: Config, count: int, device) -> Pretraining:
    """The method with a bank of that kind, and no other change."""
    bank = kind(count, config.dim, config.bank_momentum, config.bank_update, config.temperature)
    return Pretraining(config, count, device, bank=bank)


def histories(config: Config) -> dict[str, list[dict]]:
    """The epochs' figures of a short run with each bank, by what is wrong with the bank."""
    dataset, rows = load_dataset(config), {}
    for words, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            train(replace(config, out=folder), None, dataset, partial(learner, kind), Watch(1))
            rows[words] = read_checkpoint(folder)["history"]
    return rows


def draw(epochs: dict[str, list[dict]], deal: int, reveal: bool, path) -> None:
    order = random.Random(deal).sample(list(epochs), len(epochs))
    figure, axes = plots.plt.subplots(1, len(CURVES), figsize=(12, 4), constrained_layout=True)
    for axis, (key, words) in zip(axes, CURVES.items()):
        for i, name in enumerate(order):
            label = f"{'ABCDEF'[i]}: {name}" if reveal else "ABCDEF"[i]
            rows = [row for row in epochs[name] if key in row]
            colour = plots.plt.get_cmap("viridis")(i / len(order))
            axis.plot(
                [row["epoch"] for row in rows],
                [row[key] for row in rows],
                marker="osD^vP"[i],
                markevery=(i % 3, 3),
                color=colour,
                label=label,
            )
        axis.set(xlabel="epoch", ylabel=words)
    axes[0].axhline(math.log(2), color=plots.GREY, linestyle=":")
    axes[0].annotate("ln 2", (0, math.log(2)), color=plots.GREY, va="bottom", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3 if reveal else 6)
    figure.suptitle("One of these runs is right. What is wrong with the others?")
    figure.savefig(path, format="png")
    plots.plt.close(figure)


def stored(file: Path) -> dict:
    """The runs of an earlier call. Raises UserError for a damaged file."""
    try:
        runs = json.loads(file.read_text())
        return {**runs, "epochs": dict(runs["epochs"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}); delete it") from error


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--reveal", action="store_true", help="name the faults in the picture")
    parser.add_argument("--epochs", type=int, default=24, help="[24]")
    parser.add_argument("--seed", type=int, default=0, help="of the runs [0]")
    parser.add_argument("--deal", type=int, metavar="N", help="deal the letters by this number [by chance, once]")
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="for break_it.json and .png [runs]"
    )
    args = parser.parse_args(argv)
    base = Config(**(EASY | {"epochs": args.epochs, "seed": args.seed}))
    base.check()
    args.out.mkdir(parents=True, exist_ok=True)
    kept, picture = output(args.out / f"break_it-{args.epochs}-{args.seed}.json"), output(args.out / "break_it.png")
    runs = stored(kept) if kept.exists() else {"epochs": histories(base)}
    if args.deal is not None or "deal" not in runs:
        runs["deal"] = random.SystemRandom().randrange(10**6) if args.deal is None else args.deal
        save_text(json.dumps(runs), kept, "--out")
    with replacing(picture, "the picture") as place:
        draw(runs["epochs"], runs["deal"], args.reveal, place)
    print(picture)


if __name__ == "__main__":
    sys.exit(main())
