"""Runs with invented figures, as `sweep` returns them, to test figures and studies with."""

from dataclasses import asdict, replace

from figures import observe, sweep
from lab.train import LabConfig


def base(scale: str) -> LabConfig:
    return LabConfig(**((sweep.SCALES | {"laptop": sweep.LAPTOP})[scale] | {"knn_every": 0}))


def invented(script, scale="cpu", seeds=(0, 1, 2), better=()) -> list[dict]:
    """Runs of a script's points; points whose name is in better are 10 percent points higher."""
    runs = []
    for name, config in script.points(base(scale), scale).items():
        for seed in seeds:
            top = 0.4 + 0.01 * seed + 0.1 * (name in better)
            rows = [epoch_row(e) for e in range(1, config.epochs + 1)]
            for row in rows[1::2]:
                row["knn"] = top - 0.01 * (config.epochs - row["epoch"])
                row |= {"ageing": [[10.0 * i, 0.9 - 0.04 * i] for i in range(8)], "two_views": 0.9}
            runs.append({
                "name": name, "seed": seed, "config": asdict(replace(config, seed=seed)), "hardware": "a laptop",
                "epochs": rows, "final": {"knn": top, "linear": top + 0.05}, "controls": {}, "data": "",
                "date": "2026-11-22", "step_mib": 100,
            })  # fmt: skip
    return runs


def epoch_row(e: int) -> dict:
    row = {"epoch": e, "step": 100 * e, "nce": 9 - 0.2 * e, "loss": 9.5 - 0.2 * e, "seconds": 20.0 * e}
    spectrum = [0.5 / r for r in observe.RANKS]
    return row | {"rank": 90.0 - e, "reach_share": 0.5, "reach_rows": 900.0, "variance": 0.9, "spectrum": spectrum}


def points_can_be_run(script, scale: str, twice=frozenset()) -> None:
    """Fails unless every point has valid settings and no two points are the same run.

    twice names points that may be the same run as another.
    """
    points = script.points(base(scale), scale)
    for config in points.values():
        config.check()
    distinct = {sweep.identity(asdict(config), 0) for config in points.values()}
    assert len(points) - len(twice & points.keys()) - 1 <= len(distinct) <= len(points)


def lab(config, **options) -> LabConfig:
    """The settings of a core run, and options, as lab.train has them."""
    return LabConfig(**(asdict(config) | options))
