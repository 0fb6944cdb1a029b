"""What one GPU reaches: the gpu and the released recipe, SimCLR and BYOL in the same time.

    python -m lab.studies.paper_scale gpu --scale paper --data-dir my_cifar10 --dataset folder
    python -m lab.studies.paper_scale released --scale paper
    python -m lab.studies.paper_scale field --scale paper     after python -m lab.studies.throughput

At paper scale the recipes are those of `train.RECIPES`, 200 epochs each. At other scales, network,
images and length come from the scale, the other settings from the recipe. The two-branch methods
have the settings of the search, and as many epochs as fit in the time of the gpu recipe, by the
images/s that were measured with these settings.
lab/studies/paper_scale.sh runs this and everything else that needs a GPU.
"""

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from figures.field import NAMES, contestant, lasting, with_batch
from figures.fig1_cost import seconds
from figures.sweep import RESULTS, ROUND_ONE, figure, spread
from lab.train import LabConfig
from plumbing.command_line import Parser, UserError, command
from train import RECIPES

OF_SCALE = "dataset arch size layers hidden dim negatives epochs batch_size warmup compile".split()
METHODS = ("simclr", "byol")
PARTS = {"gpu": ["gpu"], "released": ["released"], "field": [f"{NAMES[method]}, the same time" for method in METHODS]}
RATES = RESULTS / "bench" / "throughput-cuda.json"


def recipe(name: str, base: LabConfig, scale: str) -> LabConfig:
    settings = RECIPES[name] | {"knn_every": 0}
    if scale == "paper":
        return LabConfig(**(settings | {"dataset": base.dataset, "data_dir": base.data_dir, "device": base.device}))
    config = with_batch(LabConfig(**settings), base.batch_size)
    method = {k: v for k, v in asdict(config).items() if k in ROUND_ONE and k not in OF_SCALE}
    return replace(base, **(method | {"knn_every": 0}))


def points(
    base: LabConfig, scale: str = "cpu", rates: dict[str, float] | None = None, group: str = ""
) -> dict[str, LabConfig]:
    """All points, or those of a part; the points of the field need rates, images/s by method."""
    rows = {name: recipe(name, base, scale) for name in ("gpu", "released")}
    for method, name in zip(METHODS if rates else (), PARTS["field"]):
        epochs = max(1, round(rows["gpu"].epochs * rates[method] / rates["gpu"]))
        rows[name] = lasting(contestant(rows["gpu"], method), epochs)
    return {name: config for name, config in rows.items() if not group or name in PARTS[group]}


def read(file: Path) -> dict[str, float]:
    try:
        rates = {name: row["images/s"] for name, row in json.loads(file.read_text())["rows"].items()}
        assert all(rates[name] > 0 for name in ("gpu", *METHODS))
        return rates
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        what = "missing" if not file.exists() else f"damaged ({error!r})"
        raise UserError(f"{file}: {what}; make it with: python -m lab.studies.throughput --results {file}") from error


def table(runs: list[dict]) -> str:
    """Markdown: accuracies as mean ± deviation over seeds, and the minutes of training."""
    lines = ["| | epochs | training, minutes | linear | kNN (k = 200) | seeds |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        cells = [name, str(len(own[0]["epochs"])), f"{seconds(runs, name) / 60:.1f}"]
        cells += [*(spread(runs, name, key) for key in ("linear", "knn")), str(len(own))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0], add_help=False)
    parser.add_argument("group", metavar="PART", choices=PARTS)
    parser.add_argument("--rates", type=Path, default=RATES)
    args, others = parser.parse_known_args(argv)
    rates = read(args.rates) if args.group == "field" else None
    return figure("paper_scale", __doc__, partial(points, rates=rates, group=args.group), argv=others, show=table)


if __name__ == "__main__":
    sys.exit(main())
