"""The default recipe on 5 000 images, three seeds, beside both controls: the first table of the README.

    python figures/recipe.py --data-dir my_cifar10        runs what is missing, prints the table

Each run is `python train.py --dataset folder --data-dir my_cifar10 --subset 5000 --seed SEED` followed by
`python eval_linear.py runs/folder`; the figures are kept in figures/results/recipe-cpu.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from sweep import Config, UserError, arguments, spread, sweep


def table(runs: list[dict]) -> str:
    """Markdown: kNN and linear probe of the trained encoder and of both controls, mean ± deviation over seeds, percent."""
    lines = ["| | linear probe | kNN (k = 200) |", "|---|---|---|"]
    for name in ("trained", "untrained", "raw"):
        rows = [{"name": name, "final": run["final"] if name == "trained" else run["controls"][name]} for run in runs]
        cells = [spread(rows, name, figure) for figure in ("linear", "knn")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(__doc__.split("\n")[0], "recipe-cpu.json", argv)
        config = Config(dataset=args.dataset, data_dir=args.data_dir, subset=5000, knn_every=10)
        print(table(sweep(args.results, {"default": config}, args.seeds, args.jobs, True, args.keep)))
    except UserError as error:
        print(f"recipe.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
