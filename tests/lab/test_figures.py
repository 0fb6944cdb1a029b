"""figures/: what is cached is not run again, what is damaged is named, pictures are drawn."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from invented import base, invented, lab, points_can_be_run
from PIL import Image
from processes import Forked

from figures import (
    field,
    fig1_cost,
    fig2_framework,
    fig3_convergence,
    fig4_momentum,
    fig5_lambda,
    neighbours,
    observe,
    page,
    plots,
)
from figures import sweep as sweeper
from lab.train import LabConfig
from plumbing.command_line import UserError, command
from plumbing.runs import read_checkpoint
from train import Config, train


@pytest.fixture(autouse=True)
def without_rates(monkeypatch):
    """Times are those of the runs, whatever images/s are on record."""
    monkeypatch.setattr(fig1_cost, "rates", dict)


def test_a_sweep_runs_what_is_missing_and_only_that(tiny, tmp_path, monkeypatch):
    file, points = tmp_path / "results" / "x.json", {"a": lab(tiny(epochs=1)), "b": lab(tiny(epochs=1, lam=1.0))}
    runs = sweeper.sweep(file, {"a": points["a"]}, seeds=(0,), jobs=1, controls=True)
    assert len(runs) == 1 and runs[0]["name"] == "a" and 0 <= runs[0]["final"]["linear"] <= 1
    assert set(runs[0]["controls"]) == {"untrained", "raw", "majority"} and len(runs[0]["epochs"]) == 1
    assert runs[0]["config"]["data_dir"] == "", "results name no place on the machine that made them"

    monkeypatch.setattr(sweeper, "ProcessPoolExecutor", None)  # nothing may be run now
    other = {"a": replace(points["a"], data_dir=str(tmp_path))}
    with pytest.raises(UserError, match="measured on other images .* --results"):
        sweeper.sweep(file, other, seeds=(0,))
    moved = {"a, by another name": replace(points["a"], data_dir="elsewhere", out="elsewhere")}
    again = sweeper.sweep(file, moved, seeds=(0,))
    assert again[0]["final"] == runs[0]["final"] and again[0]["name"] == "a, by another name"
    with pytest.raises(TypeError):
        sweeper.sweep(file, points, seeds=(0,))
    there = sweeper.sweep(file, points, seeds=(0, 1), make=False)
    assert [(run["name"], run["seed"]) for run in there] == [("a", 0)], "what is not there is left out"
    with pytest.raises(UserError, match="has none of the runs yet; leave out --redraw"):
        sweeper.sweep(file, {"b": points["b"]}, seeds=(0,), make=False)


def test_a_damaged_results_file_is_named_with_what_to_do(tmp_path):
    (tmp_path / "x.json").write_text('{"runs": [')
    with pytest.raises(UserError, match=r"x\.json: damaged .*; delete it and run the script again"):
        sweeper.read(tmp_path / "x.json")
    assert sweeper.read(tmp_path / "none.json") == []
    run = sweeper.read(sweeper.RESULTS / "fig4_momentum-cpu.json")[0]
    for final in ({}, {"linear": 0.5}, {"knn": 0.5, "linear": None}):
        (tmp_path / "x.json").write_text(json.dumps({"runs": [run | {"final": final}]}))
        with pytest.raises(UserError, match=r"x\.json: damaged"):
            sweeper.read(tmp_path / "x.json")


FIGURES = (fig1_cost, fig3_convergence, fig4_momentum, fig5_lambda)


@pytest.mark.parametrize("script", FIGURES, ids=lambda script: script.__name__)
@pytest.mark.parametrize("scale", sweeper.SCALES)
def test_every_point_of_every_figure_can_be_run_at_every_scale(script, scale):
    points_can_be_run(script, scale)


def test_the_first_round_s_settings_are_pinned(monkeypatch):
    """Figures redraw from their results when defaults change or settings are added."""
    run = sweeper.read(sweeper.RESULTS / "fig4_momentum-cpu.json")[0]
    older = {k: v for k, v in run["config"].items() if k not in sweeper.ROUND_ONE or k in sweeper.SCALES["cpu"]}
    for name in ("lr", "temperature", "crop_min"):
        older.pop(name)
    assert sweeper.identity(older, 0) == sweeper.identity(run["config"], 0)
    free = {name for name, field in LabConfig.__dataclass_fields__.items() if field.metadata["free"]}
    measured = set(asdict(LabConfig())) - free - {"dataset", "data_dir", "subset", "holdout", "seed", "precision"}
    assert measured - sweeper.ROUND_ONE.keys() <= {
        "method", "branch_setting", "views", "drop_last_stage", "torchvision_stem", "size_start", "init_from",
        "bank_dtype",
    }, "a new setting needs its value in ROUND_ONE, the one that leaves old runs as they were"  # fmt: skip


def test_the_grids_are_those_of_the_paper_s_figures():
    rows = fig4_momentum.points(base("cpu"))
    assert {(c.bank_update, c.bank_momentum) for c in rows.values()} == {
        (rule, m) for rule in ("corrected", "npid") for m in (0, 0.25, 0.5, 0.75, 0.9, 0.99)
    }
    rows = fig5_lambda.points(base("cpu")).values()
    assert {(c.lam, c.kl_temperature) for c in rows if c.lam} == {
        (lam, t) for lam in (1, 5, 10, 20, 50, 100) for t in (1.0, base("cpu").temperature)
    }
    assert sum(c.lam == 0 for c in rows) == 1
    without, with_ = fig3_convergence.points(base("cpu")).values()
    assert replace(with_, lam=0.0) == without and with_.lam == 20


@pytest.fixture
def titles(monkeypatch):
    """The titles of the pictures that are drawn, as they are drawn."""
    seen, finish = [], plots.finish

    def note(figure, title, *args):
        seen.append(title)
        finish(figure, title, *args)

    monkeypatch.setattr(plots, "finish", note)
    return seen


@pytest.mark.parametrize(
    "script, better, finding",
    [
        (
            fig3_convergence, [fig3_convergence.WITH],
            "halfway and +10.0 ± 0.8 at the end; an epoch takes 1.00 times as long",
        ),
        (
            fig1_cost, ["ours, 40 epochs"],
            "ours, 40 epochs, less SimCLR, 10 epochs: +10.0 ± 0.8 in 4.00 times the time",
        ),
        (
            fig4_momentum, ["corrected rule, m = 0.9"],
            "The corrected rule is best at m = 0.9, NPID's rule at m = 0; best against best +10.0",
        ),
        (
            fig5_lambda, ["T = τ, λ = 5"],
            "at T = 1 the best λ, 1, changes kNN by +0.0 ± 0.8; at T = τ the best λ, 5, changes kNN by +10.0 ± 0.8",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_every_figure_is_drawn_and_its_title_says_what_the_figures_say(script, better, finding, titles, tmp_path):
    script.draw(invented(script, better=better), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert finding in titles[0]
    script.draw(invented(script, seeds=(0,)), tmp_path / "one seed.png")
    assert (tmp_path / "one seed.png").stat().st_size > 10_000


def test_the_framework_is_drawn(tmp_path, capsys):
    assert fig2_framework.main(["--picture", str(tmp_path / "fig2.png"), "--images", "50"]) == 0
    assert (tmp_path / "fig2.png").stat().st_size > 10_000
    assert fig2_framework.main(["--picture", str(tmp_path / "none" / "fig2.png")]) == 2
    assert "--picture" in capsys.readouterr().err


def run_figure(script, *options, draw=None):
    name = script.__name__.removeprefix("figures.")
    return sweeper.figure(name, script.__doc__, script.points, draw, list(options))


def test_a_figure_is_redrawn_from_its_results_without_the_images(tmp_path, capsys, monkeypatch):
    (tmp_path / "r.json").write_text(json.dumps({"runs": invented(fig4_momentum)}))
    monkeypatch.setattr(sweeper, "ProcessPoolExecutor", None)  # nothing may be run
    assert run_figure(fig4_momentum, "--results", str(tmp_path / "r.json"), draw=fig4_momentum.draw) == 0
    assert (
        tmp_path / "r.png"
    ).stat().st_size > 10_000 and "| corrected rule, m = 0.75 | 46.0 ± 1.0 |" in capsys.readouterr().out


def test_missing_and_damaged_results_are_named_with_the_way_to_make_them(tmp_path, capsys, monkeypatch):
    place = tmp_path / "r.json"
    assert run_figure(fig4_momentum, "--results", str(place), "--data-dir", str(tmp_path / "none"), "--jobs", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"fig4_momentum.py: {place} lacks 36 of 36 runs: --data-dir {tmp_path}/none")
    for damage in ("{", '{"runs": [{}]}', '{"runs": [{"seed": 0, "config": {"nonsense": 1}}]}', "[]", '{"runs": 3}'):
        place.write_text(damage)
        assert run_figure(fig4_momentum, "--results", str(place)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"fig4_momentum.py: {place}: damaged") and error.endswith(
            "run the script again to make it anew"
        )
    assert not (tmp_path / "r.png").exists()
    assert run_figure(fig4_momentum, "--jobs", "0") == 2 and "--jobs must be at least 1" in capsys.readouterr().err


def test_a_run_in_another_figure_s_file_is_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeper, "ProcessPoolExecutor", None)  # nothing may be run
    runs = invented(fig5_lambda)
    (tmp_path / "other.json").write_text(json.dumps({"runs": runs}))
    point = {"λ": fig5_lambda.points(base("cpu"))["T = τ, λ = 5"]}
    runs = sweeper.sweep(tmp_path / "mine.json", point, needs=("rank",))
    assert [run["seed"] for run in runs] == [0, 1, 2] and {run["name"] for run in runs} == {"λ"}
    with pytest.raises(UserError, match="lacks 3 of 3 runs: --data-dir data: no such folder"):
        sweeper.sweep(tmp_path / "mine.json", point, needs=("what it does not have",))
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(UserError, match="lacks 3 of 3 runs"):
        sweeper.sweep(tmp_path / "mine.json", point)
    assert "other.json: damaged" in capsys.readouterr().err
    for other in ('{"arch": "resnet10"}', "[1, 2]", "3"):  # files of other programs: --export writes one
        (tmp_path / "other.json").write_text(other)
        assert sweeper.borrowed(tmp_path / "mine.json", {"x"}, (), {""}) == []
        assert ("damaged" in capsys.readouterr().err) == (other == "3")


class Slow(observe.Watch):
    """Leaves time to interrupt a run whose epochs take milliseconds."""

    def __call__(self, run, dataset, epoch):
        time.sleep(1 if epoch > 3 else 0)
        return super().__call__(run, dataset, epoch)


def test_an_interrupted_sweep_goes_on_at_the_last_epoch(pictures, tmp_path, monkeypatch, forked_sweep):
    monkeypatch.setitem(sweeper.SCALES, "cpu", TINY | {"epochs": 8, "subset": 64})
    line = ["--data-dir", pictures, "--results", tmp_path / "x.json", "--keep", tmp_path / "kept", "--seeds", "0"]

    def script(words):
        return sweeper.figure("x", "x", lambda base, scale: {"a": base, "b": replace(base, lam=1.0)}, argv=words)

    def epochs():
        return [len(file.read_text().splitlines()) for file in (tmp_path / "kept").glob("*/metrics.jsonl")]

    with monkeypatch.context() as patch:
        patch.setattr(sweeper, "Watch", Slow)
        with Forked(script, line) as process:
            process.wait_for(lambda: any(count > 3 for count in epochs()))
            os.kill(process.pid, signal.SIGINT)
            status, _, error = process.ended()
    assert status == 130 and "the same command goes on" in error and "Traceback" not in error
    assert 3 < max(epochs()) < 8 and not (tmp_path / "x.json").exists()
    kept = {file.parent.name: read_checkpoint(file)["history"] for file in (tmp_path / "kept").glob("*/last.pt")}

    assert script([str(word) for word in line]) == 0
    runs = sweeper.read(tmp_path / "x.json")
    assert sorted(run["name"] for run in runs) == ["a", "b"] and all(len(run["epochs"]) == 8 for run in runs)
    for folder, before in kept.items():
        after = read_checkpoint(tmp_path / "kept" / folder)["history"]
        assert after[: len(before)] == before, "no epoch is made again"
        clock = [row["seconds"] for row in after]
        assert clock == sorted(clock), "the clock of a run goes on where it stopped"


# --------------------------------------------------------------------------------- what is measured


def test_the_spectrum_is_that_of_the_covariance():
    weight = torch.nn.functional.normalize(torch.randn(40, 8), dim=1)
    shares = observe.spectrum(weight)
    expected = torch.linalg.eigvalsh(torch.cov(weight.T.double())).flip(0)
    assert torch.allclose(shares, expected / expected.sum()) and len(shares) == 8
    assert observe.perplexity(torch.full((5,), 0.2)).item() == pytest.approx(5)
    flat = observe.spectrum(torch.eye(9)[:, :8])  # equal along every axis but the mean's
    assert 6 < observe.perplexity(flat).item() <= 8


def test_half_of_the_nce_gradient_falls_on_other_rows_and_sqrt_kl_adds_to_it():
    similarity, target = 2 * torch.rand(6, 30) - 1, torch.arange(6)
    share, rows = observe.reach(similarity, target, Config(lam=0.0))
    assert share == pytest.approx(0.5) and 1 <= rows < 29
    more, wider = observe.reach(similarity, target, Config(lam=5.0, kl_temperature=0.07))
    assert more > 0.5
    uniform, all_rows = observe.reach(torch.zeros(6, 30), target, Config(lam=0.0))
    assert uniform == pytest.approx(0.5) and all_rows == pytest.approx(29)


def test_what_is_watched_does_not_change_the_run(tiny):
    alone, watched = train(tiny(epochs=2)), train(tiny(epochs=2), watch=observe.Watch(looks=2))
    first, last = (json.loads(line) for line in (Path(tiny().out) / "metrics.jsonl").read_text().splitlines())
    assert last["nce"] == alone["nce"] == watched["nce"]
    assert 0.5 == first["reach_share"] and 1 <= last["rank"] <= 16 and len(last["spectrum"]) == 8
    assert 0 < last["knn"] < 1


def test_training_seconds_leave_out_what_else_ran_for_an_epoch():
    histories = [[{"seconds": clock} for clock in clocks] for clocks in ((2, 4, 106), (2, 5, 7))]
    assert sweeper.training_seconds(histories[0]) == 3 * 2
    assert sweeper.training_seconds(*histories) == 3 * 2, "the median of 2, 2, 102, 2, 3 and 2"


def test_the_table_shows_mean_and_spread_over_seeds():
    runs = [{"name": "x", "final": {"linear": v, "knn": 0.5}} for v in (0.40, 0.42, 0.44)]
    runs += [{"name": "y", "final": {"linear": 0.3, "knn": 0.2}}]
    lines = sweeper.table(runs).splitlines()
    assert lines[2:] == ["| x | 42.0 ± 2.0 | 50.0 ± 0.0 | 3 |", "| y | 30.0 | 20.0 | 1 |"]


def test_the_foot_of_a_picture_names_every_machine_the_commonest_first():
    runs = invented(fig3_convergence)
    usual, runs[0]["hardware"] = runs[0]["hardware"], "an abacus"
    assert plots.settings(runs).endswith(f"3 seeds; {usual}; an abacus")


def test_nearest_neighbours_are_drawn(tiny, capsys):
    train(tiny(epochs=1))
    assert neighbours.main([tiny().out]) == 0
    picture = Path(tiny().out) / "neighbours.png"
    assert capsys.readouterr().out.splitlines()[-1] == str(picture) and picture.stat().st_size > 10_000
    assert neighbours.main(["nowhere"]) == 2
    assert capsys.readouterr().err.startswith("neighbours.py: nowhere: no checkpoint there")


@pytest.mark.parametrize("kind", ["without labels", "without a test set"])
def test_neighbours_need_no_labels_and_pictures_that_are_there_twice_are_named(pictures, tiny, tmp_path, capsys, kind):
    folder = tmp_path / "images" / ("train" if kind == "without a test set" else "")
    files = sorted(pictures.glob("train/*/*.png"))[::2]
    for i, file in enumerate(files):
        place = folder / (file.parent.name if kind == "without a test set" else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(file.read_bytes())
    twice = next(folder.rglob("7.png"))
    Image.open(twice).convert("RGB").resize((24, 24), Image.Resampling.BICUBIC).save(twice.with_name("larger.png"))
    train(tiny(data_dir=str(tmp_path / "images"), epochs=1))
    capsys.readouterr()
    assert neighbours.main([tiny().out]) == 0
    printed = capsys.readouterr().out
    assert f"near-duplicates among {len(files) + 1} pictures:" in printed
    pair = "(7.png = .*larger.png|larger.png = .*7.png)"
    assert re.search(rf"^  .*{pair} \(cosine [01]\.\d+, \d\.\d%\)$", printed, re.M)
    assert (Path(tiny().out) / "neighbours.png").stat().st_size > 10_000


@pytest.mark.parametrize("script", [neighbours, page])
def test_a_picture_of_a_run_is_not_drawn_from_other_images(pictures, tiny, tmp_path, capsys, script):
    images = tmp_path / "images"
    shutil.copytree(pictures, images)
    train(tiny(epochs=1, data_dir=str(images)))
    before = sorted(Path(tiny().out).iterdir())
    for change in ("renamed", "replaced", "added"):
        shutil.rmtree(images)
        shutil.copytree(pictures, images)
        first, second = sorted((images / "train").rglob("*.png"))[:2]
        if change == "added":
            (first.parent / "new.png").write_bytes(second.read_bytes())
        else:
            first.rename(first.with_name("other.png") if change == "renamed" else second)
        capsys.readouterr()
        assert script.main([tiny().out]) == 2, change
        said = capsys.readouterr().err
        assert f"{script.__name__.split('.')[1]}.py: {tiny().out}: " in said and "of its 96 images are gone" in said
        assert said.count("\n") == 1 and sorted(Path(tiny().out).iterdir()) == before
    assert script.main([tiny().out, "--data-dir", str(pictures)]) == 0


def test_the_table_of_costs_has_time_memory_and_arithmetic():
    runs = invented(fig1_cost)
    lines = fig1_cost.table(runs).splitlines()
    images = 39 * 256 * 10  # whole batches of 10 000
    assert lines[2] == f"| ours, 10 epochs | 46.0 ± 1.0 | 41.0 ± 1.0 | 200 | {images / 200:.0f} | - | 100 | 3 |"
    assert len(lines) == 2 + 4 + 2 + 5 * 2 + 1 + 2
    counted = fig1_cost.table([run | {"gflop": 0.125} for run in runs]).splitlines()
    assert all("| 0.12 | 100 | 3 |" in line for line in counted[2:])


def test_the_time_of_a_run_follows_from_its_method_s_measured_rate(monkeypatch):
    runs = invented(fig1_cost)
    same = {key: runs[0]["config"][key] for key in ("arch", "width", "batch_size")}
    rows = {"ours": {"images/s": 500, "settings": same}, "npid": {"images/s": 500, "settings": same | {"width": 32}}}
    monkeypatch.setattr(fig1_cost, "rates", lambda: {"rows": rows})
    assert fig1_cost.seconds(runs, "ours, 20 epochs") == 39 * 256 * 20 / 500
    assert fig1_cost.seconds(runs, "NPID, 40 epochs") == 800, "another network: its own clock"


def test_convergence_is_drawn_against_the_measured_rate_where_there_is_one(monkeypatch):
    runs = invented(fig3_convergence, "laptop")
    fast, slow = (f"NPID's rule, {words}" for words in (fig3_convergence.WITHOUT, fig3_convergence.WITH))
    rows = {fast: {"images/s": 5120, "settings": {"lam": 0.0}}, slow: {"images/s": 1, "settings": {"lam": 1.0}}}
    monkeypatch.setattr(fig3_convergence, "rates", lambda: {"rows": rows})
    seconds = fig3_convergence.clock(runs, fast)
    assert seconds.tolist() == pytest.approx([100 * e * 512 / 5120 for e in range(1, 101)])
    assert fig3_convergence.clock(runs, slow)[-1] == 2000, "measured with another λ: its own clock"
    assert "takes 2.00 times as long" in fig3_convergence.finding(runs, "NPID's rule, ")


def test_a_field_s_methods_keep_to_their_own_settings():
    default = field.base_of(base("cpu"))
    ours, parametric, byol = (field.contestant(default, method) for method in ("ours", "parametric", "byol"))
    assert (parametric.bank_init, parametric.window) == ("random", default.window), "PIC's window"
    first = field.with_sgd(base("cpu"), "parametric")
    assert (first.bank_init, first.bank_momentum, first.window, first.optimizer) == ("random", 0.9, 0, "sgd")
    assert (byol.method, byol.window, byol.dim) == ("byol", 0, sweeper.ROUND_ONE["dim"])
    assert ours.window == default.window and byol.width == ours.width == 16
    assert field.with_sgd(replace(base("cpu"), batch_size=512), "byol", 0.06).lr == pytest.approx(0.24)


def test_a_method_gets_what_the_search_chose_for_it_and_smaller_batches_a_rate_to_match(tmp_path, monkeypatch):
    config = asdict(field.base_of(base("cpu"))) | {"branch_setting": 0.1, "batch_size": 128, "lr": 0.04}
    knn = {"centre": 0.4, "half the batch": 0.5, "SGD": 0.3}
    runs = [
        {
            "name": f"SimCLR: {name}",
            "config": config | {"lr": 0.08 * value},
            "seed": 0,
            "final": {"knn": value, "linear": 0.5},
        }
        for name, value in knn.items()
    ]
    monkeypatch.setattr(field, "read", lambda file: runs)
    monkeypatch.setattr(field, "SEARCH", tmp_path / "search.json")
    chosen = field.contestant(field.base_of(base("cpu")), "simclr")
    assert (chosen.lr, chosen.batch_size, chosen.branch_setting) == (0.04, 128, 0.1)
    small = field.contestant(replace(field.base_of(base("cpu")), batch_size=32), "simclr")
    assert (small.lr, small.batch_size) == (0.02, 32), "Muon: the root of a quarter"
    monkeypatch.setattr(field, "read", lambda file: [])
    monkeypatch.setattr(field, "SEARCH", tmp_path / "none.json")
    assert field.contestant(field.base_of(base("cpu")), "simclr").lr == LabConfig.lr, "not searched yet"


def test_a_run_can_be_measured_for_what_its_step_costs(tiny, tmp_path, forked_sweep):
    points = {"ours": lab(tiny(epochs=1)), "byol": lab(tiny(epochs=1), method="byol")}
    points["a window"] = lab(tiny(epochs=2, window=64, visits=2))
    runs = sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), jobs=1, costs=True)
    assert [run["method"] for run in runs] == ["ours", "byol", "ours"]
    assert runs[2]["gflop"] == pytest.approx(runs[0]["gflop"], rel=0.05), "its bank is a little smaller"
    assert 0 < runs[0]["step_mib"] < runs[1]["step_mib"]
    assert 0 < 2 * runs[0]["gflop"] < runs[1]["gflop"], "two views, and a teacher"


def test_a_run_counts_only_with_the_looks_and_the_images_that_are_meant():
    run = {"epochs": [{"epoch": 1, "rank": 3.0}], "final": {"knn": 0.5, "linear": 0.6, "few": 0.4}}
    assert sweeper.whole(run, ()) and sweeper.whole(run, ("rank", "few"))
    assert not sweeper.whole(run, ("knn", "rank")), "the accuracy at the end is not one of every look"
    folds = run | {"final": {"knn": 0.5, "linear": 0.6, "folds": 5}}
    assert sweeper.whole(folds, ("folds",)) and not sweeper.whole(folds, ()), "measured on other images"


def test_committed_results_are_whole():
    settings = asdict(LabConfig()).keys()
    later = {
        "bank",
        "loss",
        "fit",
        "optimizer",
        "muon_momentum",
        "window",
        "visits",
    }  # these count with their value in ROUND_ONE
    for file in sweeper.RESULTS.glob("*.json"):
        for run in json.loads(file.read_text())["runs"]:
            key = "pretrained box_ap" if file.stem == "cells-cpu" else "linear"
            assert run["hardware"] and run["date"] and run["epochs"] and 0 < run["final"][key] < 1, file
            assert bool(run["data"]) == (run["config"]["dataset"] == "folder"), file  # a folder's hash
            assert not run["config"]["data_dir"] and not run["config"]["out"], file
            assert run["config"].keys() <= settings and sweeper.ROUND_ONE.keys() - later <= run["config"].keys(), file


def test_a_script_ends_in_one_line_whatever_stops_it(capsys):
    def ends(error):
        def main(argv):
            raise error

        return command(main, "x.py", "stopped; all is kept")(None), capsys.readouterr().err

    assert ends(UserError("--lr is wrong")) == (2, "x.py: --lr is wrong\n")
    assert ends(KeyboardInterrupt()) == (130, "x.py: stopped; all is kept\n")
    with pytest.raises(ValueError):
        ends(ValueError())  # a fault of the script's own, which keeps its traceback
    assert command(lambda argv: print(argv), "x.py")(["a"]) == 0 and capsys.readouterr().out == "['a']\n"


def test_a_script_whose_reader_goes_away_ends_quietly(tmp_path):
    line = [sys.executable, "figures/fig2_framework.py", "--images", "50", "--picture", str(tmp_path / "x.png")]
    script = ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "x", *line]
    ended = subprocess.run(script, capture_output=True, text=True, cwd=sweeper.ROOT)
    assert (ended.returncode, ended.stderr) == (141, "") and (tmp_path / "x.png").exists()


def test_a_sweep_decodes_images_as_train_and_its_evaluation_need_them(tiny, monkeypatch, tmp_path):
    config, seen = lab(tiny(eval_size=40, fit="pad"), out=str(tmp_path / "x")), []
    monkeypatch.setattr(sweeper, "load_dataset", seen.append)
    monkeypatch.setattr(sweeper, "train", lambda *given, **named: None)
    monkeypatch.setattr(sweeper, "read_checkpoint", lambda *given: {})
    sweeper.images.cache_clear()
    sweeper.trained(config, 0)
    sweeper.images.cache_clear()
    same = "dataset data_dir subset holdout size eval_size fit cache_gb workers cache_dir".split()
    assert [getattr(seen[0], name) for name in same] == [getattr(config, name) for name in same]
