"""The picture of all benchmarks: a step and its network, the field, the bank against its size.

python -m lab.studies.speed                     from figures/results/bench/<part>-cpu.json
python -m lab.studies.speed --device cuda       from the results of a GPU
"""

import json
import sys
from pathlib import Path

from figures import plots
from figures.sweep import RESULTS
from plumbing.command_line import Parser, UserError, command
from plumbing.outputs import output, replacing

BENCHMARKS = ("overhead", "field", "bank")


def read(folder: Path, device: str) -> dict[str, dict]:
    """The results of each benchmark.

    Raises UserError, which names the command to make it, for a missing or damaged file.
    """
    results = {}
    for name in BENCHMARKS:
        file = folder / f"{name}-{device}.json"
        try:
            results[name] = json.loads(file.read_text())
            assert results[name]["rows"] and results[name]["hardware"]
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            what = "missing" if not file.exists() else f"damaged ({error})"
            make = f"python -m lab.bench {name} --device {device} --results {file}"
            raise UserError(f"{file}: {what}; make it with: {make}") from error
    return results


def draw(results: dict[str, dict], path) -> None:
    figure, axes = plots.plt.subplots(2, 2, figsize=(11, 7.4), constrained_layout=True)
    overhead(axes[0, 0], results["overhead"]["rows"])
    field(axes[0, 1], results["field"]["rows"])
    bank(axes[1], results["bank"]["rows"])
    slowest = max(results["overhead"]["rows"].values(), key=lambda row: row["ratio"])["ratio"]
    figure.suptitle(
        f"A step takes at most {slowest:.2f} times as long as its network alone, "
        f"two-branch methods at least {results['field']['ratio']:.2f} times as long as ours"
    )
    hardware = {f"{r['hardware']}, {r['threads']} threads, {r['precision']}, {r['date']}" for r in results.values()}
    figure.supxlabel("; ".join(sorted(hardware)), fontsize=8, color=plots.GREY)
    figure.savefig(path, format="png")
    plots.plt.close(figure)


def overhead(axis, rows: dict[str, dict]) -> None:
    for y, row in enumerate(rows.values()):
        spread = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
        axis.barh(y, row["ratio"], 0.6, color=plots.BLUE, alpha=0.8, xerr=spread, capsize=3)
        axis.plot([row["goal"]] * 2, [y - 0.4, y + 0.4], color=plots.ORANGE, label="" if y else "goal")
        axis.text(0.02, y, f"{row['ratio']:.2f}", color="white", va="center")
    names = [name.replace(", ", "\n", 2) for name in rows]
    axis.set(yticks=range(len(rows)), yticklabels=names, xlabel="a whole step / its network alone, time")
    axis.invert_yaxis(), axis.grid(False, axis="y")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1))


def field(axis, rows: dict[str, dict]) -> None:
    """Speed and activations of every method, each relative to ours."""
    for y, row in enumerate(rows.values()):
        memory = 1 / row["ours / its activations"]
        axis.barh(y - 0.19, row["ratio"], 0.36, color=plots.BLUE, alpha=0.8, label="" if y else "time of a step")
        axis.barh(y + 0.19, memory, 0.36, color=plots.GREEN, alpha=0.8, label="" if y else "activations")
        axis.text(0.03, y - 0.19, f"{row['images/s']:.0f} images/s", color="white", va="center", fontsize=8)
        axis.text(0.03, y + 0.19, f"{row['activations, MiB']} MiB", color="white", va="center", fontsize=8)
    names = [name.replace("OneWay", ", one way") for name in rows]
    axis.set(yticks=range(len(rows)), yticklabels=names, xlabel="relative to ours")
    axis.invert_yaxis(), axis.grid(False, axis="y")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def bank(axes, rows: dict[str, dict]) -> None:
    """Time and memory of losses and update against N, plain and streamed (`lab.bench bank`)."""
    sizes = [int(name.split("=")[1]) for name in rows]
    for way, colour in (("plain", plots.ORANGE), ("streamed", plots.BLUE)):
        style = {"color": colour, "marker": plots.MARKERS[colour], "label": way}
        axes[0].loglog(sizes, [row[way] for row in rows.values()], **style)
        axes[1].loglog(sizes, [max(row[f"{way}, MiB"], 0.1) for row in rows.values()], **style)
    axes[1].axhline(300, color=plots.GREY, linestyle="--", label="goal at the right end")
    axes[0].set(xlabel="N, rows of the bank (D = 128, B = 256)", ylabel="losses and update, seconds per step")
    axes[1].set(xlabel="N, rows of the bank (D = 128, B = 256)", ylabel="memory beyond the bank, MiB")
    for axis in axes:
        axis.legend()


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="[cpu]")
    parser.add_argument("--results", type=Path, default=RESULTS / "bench", help="their folder [figures/results/bench]")
    parser.add_argument("--picture", type=output, help="[figures/results/speed-DEVICE.png]")
    args = parser.parse_args(argv)
    picture = args.picture or RESULTS / f"speed-{args.device}.png"
    results = read(args.results, args.device)
    with replacing(picture, "the picture") as place:
        draw(results, place)
    print(picture)


if __name__ == "__main__":
    sys.exit(main())
