"""One row per ingredient of the method: what each is worth, with three seeds, at equal numbers of views.

    python figures/ingredients.py --data-dir my_cifar10                      runs what is missing, prints the table
    python figures/ingredients.py --data-dir my_cifar10 --seeds 0 --jobs 1   one seed, one process

5 000 training images, a resnet10 of width 16, 24 px crops, D = 512, 6 epochs; evaluated on the whole test set. The figures are
kept in figures/results/ingredients-cpu.json; settings were chosen on held-out training images, not here.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from sweep import Config, UserError, arguments, spread, sweep


def points(dataset: str = "folder", data_dir: str = "data") -> dict[str, Config]:
    """The rows of the table; each differs from the one it names in one field, or in the two that its name gives."""
    base = Config(
        dataset=dataset, data_dir=data_dir, subset=5000, arch="resnet10", width=16, size=24,
        dim=512, hidden=1024, epochs=6, knn_every=0,
    )  # fmt: skip
    npid = replace(base, bank_init="random", bank_update="npid")
    forward = replace(npid, bank_init="forward")
    return {
        "NPID: random bank, NPID's rule": npid,
        "+ forward initialisation": forward,
        "+ corrected rule (the default)": base,
        "the default + SqrtKL, λ = 20, T = 1": replace(base, lam=20.0),
        "the default + CutMix, α = 0.5": replace(base, cutmix=0.5),
        "NPID's rule, forward, τ = 0.2": replace(forward, temperature=0.2),
        "NPID's rule, forward, τ = 0.2 + SqrtKL, λ = 20": replace(forward, temperature=0.2, lam=20.0),
    }


def table(runs: list[dict]) -> str:
    """The results as a Markdown table: mean ± standard deviation over the seeds, in percent."""
    lines = ["| setting | linear | kNN (k = 200) | seeds |", "|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        seeds = sum(run["name"] == name for run in runs)
        lines.append(f"| {name} | {spread(runs, name, 'linear')} | {spread(runs, name, 'knn')} | {seeds} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(__doc__.split("\n")[0], "ingredients-cpu.json", argv)
        rows = points(args.dataset, args.data_dir)
        print(table(sweep(args.results, rows, args.seeds, args.jobs, keep=args.keep)))
    except UserError as error:
        print(f"ingredients.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
