"""The numbers of EXERCISES.md: its training commands, over seeds.

    python -m lab.studies.exercises --seeds 0 1 2     three quarters of an hour on one core

Runs that figures/results/exercises/exercises.json has are not run again; delete it to measure all
anew. Prints the table that ends EXERCISES.md, which tests/test_docs.py compares with the file.
"""

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from eval_linear import evaluate
from plumbing.command_line import Parser, command
from plumbing.devices import hardware
from plumbing.runs import read_checkpoint, save_text
from train import RECIPES, Config, load_dataset, train

RESULTS = Path(__file__).resolve().parents[2] / "figures" / "results" / "exercises" / "exercises.json"
SHORT = dict(subset=2000, epochs=8, knn_every=0)
TEXTURED = dict(dataset="shapes-textured")
POINTS = {  # the run's words: the exercises that have it, and its settings beside the demo recipe
    "the demo": ("4", {}),
    "2 000 images": ("6, 7, 8, 10", SHORT),
    "2 000 images, random rows": ("6", SHORT | dict(bank_init="random")),
    "2 000 images, τ = 0.02": ("7", SHORT | dict(temperature=0.02)),
    "2 000 images, τ = 1": ("7", SHORT | dict(temperature=1.0)),
    "2 000 images, m = 0.25": ("8", SHORT | dict(bank_momentum=0.25)),
    "2 000 textured images": ("10", SHORT | TEXTURED),
    "2 000 textured images, blurred": ("10", SHORT | TEXTURED | dict(blur=1.0)),
    "2 000 textured images, grey": ("10", SHORT | TEXTURED | dict(gray=1.0, jitter=0.8)),
}
CONTROLS = ("the demo", "2 000 images", "2 000 textured images")


def measure(config: Config) -> dict:
    """One run and its evaluation, in percent and nats."""
    dataset = load_dataset(config)
    with tempfile.TemporaryDirectory() as folder:
        result = train(replace(config, out=folder), dataset=dataset)
        accuracies = evaluate(read_checkpoint(folder), dataset, device=config.device, quiet=True)
    row = {"seed": config.seed, "loss": round(result["loss"], 3), "hardware": hardware(config.device)}
    row |= {name: {key: round(100 * x, 2) for key, x in values.items()} for name, values in accuracies.items()}
    return row | {"date": time.strftime("%Y-%m-%d")}


def span(values: list[float], digits: int = 1) -> str:
    """The smallest and the largest value, or one if they print alike."""
    low, high = (f"{x:.{digits}f}" for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown, a row per run with its seeds, loss and accuracies, and rows for the controls."""
    lines = ["| run | exercise | seeds | loss, nats | kNN, % | linear, % |", "|---|---|---|---|---|---|"]
    for name, (numbers, _) in POINTS.items():
        rows = runs.get(name, [])
        for kind in ("trained", "untrained", "raw")[: 3 if name in CONTROLS else 1]:
            if rows:
                cells = [span([row[kind][key] for row in rows]) for key in ("knn", "linear")]
                loss = span([row["loss"] for row in rows], 2) if kind == "trained" else ""
                words = name if kind == "trained" else f"{name}, {'raw pixels' if kind == 'raw' else kind}"
                lines.append(f"| {words} | {numbers} | {len(rows)} | {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    args = parser.parse_args(argv)
    for seed in args.seeds:
        Config(seed=seed).check()
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in args.seeds:
        for name, (_, settings) in POINTS.items():
            rows = runs.setdefault(name, [])
            if seed not in [row["seed"] for row in rows]:
                rows.append(measure(Config(**(RECIPES["demo"] | settings | {"seed": seed}))))
                save_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", RESULTS, "the results")
    print(table(runs))


if __name__ == "__main__":
    sys.exit(main())
