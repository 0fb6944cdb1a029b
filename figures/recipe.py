"""The default recipe on 5 000 images, three seeds, beside both controls: the first table of the README.

    python figures/recipe.py --data-dir my_cifar10        runs what is missing, prints the table

Each run is `python train.py --dataset folder --data-dir my_cifar10 --subset 5000 --seed SEED` followed by
`python eval_linear.py runs/folder`.
"""

import sys

from sweep import Config, figure, spread


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    """The defaults of `config.Config`, whatever the scale: only the images are the scale's."""
    return {"default": Config(dataset=base.dataset, data_dir=base.data_dir, subset=base.subset, device=base.device)}


def table(runs: list[dict]) -> str:
    """Markdown: kNN and linear probe of the trained encoder and of both controls, mean ± deviation over seeds, percent."""
    lines = ["| | linear probe | kNN (k = 200) |", "|---|---|---|"]
    for name in ("trained", "untrained", "raw"):
        rows = [{"name": name, "final": run["final"] if name == "trained" else run["controls"][name]} for run in runs]
        cells = [spread(rows, name, key) for key in ("linear", "knn")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("recipe", __doc__, points, controls=True, show=table))
