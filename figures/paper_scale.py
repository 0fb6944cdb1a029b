"""What one GPU reaches: the gpu recipe, the released one, and SimCLR and BYOL in the time that the first takes.

    python figures/paper_scale.py gpu --scale paper --data-dir my_cifar10 --dataset folder
    python figures/paper_scale.py released --scale paper
    python figures/paper_scale.py field --scale paper           after figures/throughput.py, which says how fast each is

Recipes are those of `config.RECIPES`, 200 epochs each at paper scale; at the others they lend their losses and bank to the
scale's network, images and length. The two-branch methods get as many epochs as fit in the time of the gpu recipe by the
measured images/s, with the learning rate and weight decay of lightly's benchmark, which are meant for runs of that length.
figures/paper_scale.sh runs this and everything else that wants a GPU.
"""

import json
import sys
from functools import partial
from pathlib import Path

from field import NAMES, contestant, lasting
from fig1_cost import seconds
from sweep import RESULTS, Config, Parser, UserError, command, figure, replace, spread

from config import RECIPES

OF_SCALE = "dataset arch size layers hidden dim negatives epochs batch_size warmup compile".split()
METHODS = ("simclr", "byol")
PARTS = {"gpu": ["gpu"], "released": ["released"], "field": [f"{NAMES[method]}, the same time" for method in METHODS]}
RATES = RESULTS / "bench" / "throughput-cuda.json"


def recipe(name: str, base: Config, scale: str) -> Config:
    settings = RECIPES[name] | {"knn_every": 0}
    if scale == "paper":
        return Config(**(settings | {"dataset": base.dataset, "data_dir": base.data_dir, "device": base.device}))
    lr = settings["lr"] * base.batch_size / settings["batch_size"]
    return replace(base, **({k: v for k, v in settings.items() if k not in OF_SCALE} | {"lr": lr}))


def points(
    base: Config, scale: str = "cpu", rates: dict[str, float] | None = None, part: str = ""
) -> dict[str, Config]:
    """All of them, or a part's; those of the field need rates, images/s by method."""
    rows = {name: recipe(name, base, scale) for name in ("gpu", "released")}
    for method, name in zip(METHODS if rates else (), PARTS["field"]):
        epochs = max(1, round(rows["gpu"].epochs * rates[method] / rates["gpu"]))
        rows[name] = lasting(contestant(rows["gpu"], method, lr=0.06), epochs)
    return {name: config for name, config in rows.items() if not part or name in PARTS[part]}


def read(file: Path) -> dict[str, float]:
    try:
        rates = {name: row["images/s"] for name, row in json.loads(file.read_text())["rows"].items()}
        assert all(rates[name] > 0 for name in ("gpu", *METHODS))
        return rates
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        what = "missing" if not file.exists() else f"damaged ({error!r})"
        raise UserError(f"{file}: {what}; make it with: python figures/throughput.py --results {file}") from error


def table(runs: list[dict]) -> str:
    """Markdown: accuracies as mean ± deviation over seeds, and the minutes of training."""
    lines = ["| | epochs | training, minutes | linear | kNN (k = 200) | seeds |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        cells = [str(len(mine[0]["epochs"])), f"{seconds(runs, name) / 60:.1f}"]
        lines.append(
            f"| {' | '.join([name, *cells, *(spread(runs, name, k) for k in ('linear', 'knn')), str(len(mine))])} |"
        )
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, add_help=False)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rates", type=Path, default=RATES)
    mine, rest = parser.parse_known_args(argv)
    rates = read(mine.rates) if mine.part == "field" else None
    return figure("paper_scale", __doc__, partial(points, rates=rates, part=mine.part), argv=rest, show=table)


if __name__ == "__main__":
    sys.exit(main())
