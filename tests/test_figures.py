"""The scripts under figures/: what is cached is not run again, what is damaged is named, pictures are drawn."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "figures"))

import bank_spectrum
import cheaper_bank
import data_efficiency
import field
import field_ideas
import field_lr
import fig1_cost
import fig2_framework
import fig3_convergence
import fig4_momentum
import fig5_lambda
import growing_views
import ingredients
import model_efficiency
import negatives
import neighbours
import observe
import paper_scale
import plots
import recipe
import speed
import sqrtkl_where
import sweep as sweeper
import torch
import transfer

import bench
from config import Config, command
from images import UserError
from train import train


def test_a_sweep_runs_what_is_missing_and_only_that(tiny, tmp_path, monkeypatch):
    file, points = tmp_path / "results" / "x.json", {"a": tiny(epochs=1), "b": tiny(epochs=1, lam=1.0)}
    runs = sweeper.sweep(file, {"a": points["a"]}, seeds=(0,), jobs=1, controls=True)
    assert len(runs) == 1 and runs[0]["name"] == "a" and 0 <= runs[0]["final"]["linear"] <= 1
    assert set(runs[0]["controls"]) == {"untrained", "raw"} and len(runs[0]["epochs"]) == 1
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


def test_a_damaged_results_file_is_named_with_what_to_do(tmp_path):
    (tmp_path / "x.json").write_text('{"runs": [')
    with pytest.raises(UserError, match=r"x\.json: damaged .*; delete it and run the script again"):
        sweeper.read(tmp_path / "x.json")
    assert sweeper.read(tmp_path / "none.json") == []


SCRIPTS = (
    fig3_convergence, fig4_momentum, fig5_lambda, ingredients, sqrtkl_where, bank_spectrum, recipe, negatives, cheaper_bank,
    fig1_cost, field_lr, field_ideas, growing_views, data_efficiency, model_efficiency, transfer, paper_scale,
)  # fmt: skip


def base(scale):
    return Config(**(sweeper.SCALES[scale] | {"knn_every": 0}))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("scale", sweeper.SCALES)
def test_every_point_of_every_figure_can_be_run_at_every_scale(script, scale):
    points = script.points(base(scale), scale)
    for config in points.values():
        config.check()
    same = {
        fig5_lambda.name("T = 1", 0),
        fig3_convergence.WITHOUT,
    } & points.keys()  # twice in the bank's picture at paper scale
    distinct = {sweeper.identity(asdict(config), 0) for config in points.values()}
    assert len(points) - len(same) - 1 <= len(distinct) <= len(points)


def test_the_grids_are_those_of_the_paper_s_figures():
    rows = fig4_momentum.points(base("cpu"))
    assert {(c.bank_update, c.momentum) for c in rows.values()} == {
        (rule, m) for rule in ("corrected", "npid") for m in (0, 0.25, 0.5, 0.75, 0.9, 0.99)
    }
    rows = fig5_lambda.points(base("cpu")).values()
    assert {(c.lam, c.kl_temperature) for c in rows if c.lam} == {
        (lam, t) for lam in (1, 5, 10, 20, 50, 100) for t in (1.0, base("cpu").temperature)
    }
    assert sum(c.lam == 0 for c in rows) == 1
    without, with_ = fig3_convergence.points(base("cpu")).values()
    assert replace(with_, lam=0.0) == without and with_.lam == 20


def invented(script, scale="cpu", seeds=(0, 1, 2), better=()):
    """Runs as `sweep` would return them, with invented figures; points whose name is in better are 10 points higher."""
    runs = []
    for name, config in script.points(base(scale), scale).items():
        for seed in seeds:
            top = 0.4 + 0.01 * seed + 0.1 * (name in better)
            rows = [
                {"epoch": e, "nce": 9 - 0.2 * e, "loss": 9.5 - 0.2 * e, "seconds": 20.0 * e, "rank": 90.0 - e, "reach_share": 0.5,
                 "reach_rows": 900.0, "variance": 0.9, "spectrum": [0.5 / r for r in observe.RANKS]}
                | ({"knn": top - 0.01 * (config.epochs - e)} if e % 2 == 0 else {})
                for e in range(1, config.epochs + 1)
            ]  # fmt: skip
            runs.append({
                "name": name, "seed": seed, "config": asdict(replace(config, seed=seed)), "hardware": "a laptop", "epochs": rows,
                "final": {"knn": top, "linear": top + 0.05}, "controls": {}, "data": "", "date": "2026-11-22", "step_mib": 100,
            })  # fmt: skip
    return runs


@pytest.fixture
def titles(monkeypatch):
    """The titles of the pictures that are drawn, as they are drawn."""
    seen, finish = [], plots.finish
    monkeypatch.setattr(
        plots, "finish", lambda figure, title, *rest: (seen.append(title), finish(figure, title, *rest))
    )
    return seen


@pytest.mark.parametrize(
    "script, better, finding",
    [
        (fig3_convergence, [fig3_convergence.WITH], "halfway and +10.0 ± 0.8 at the end; an epoch takes 1.00 times as long"),
        (fig1_cost, ["ours, 20 epochs"], "ours, 20 epochs, less SimCLR, 5 epochs: +10.0 ± 0.8 in 4.00 times the time"),
        (fig4_momentum, ["corrected rule, m = 0.9"], "The corrected rule is best at m = 0.9, NPID's rule at m = 0; best against best +10.0"),
        (fig5_lambda, ["T = τ, λ = 5"], "at T = 1 the best λ, 1, changes kNN by +0.0 ± 0.8; at T = τ the best λ, 5, changes kNN by +10.0 ± 0.8"),
        (ingredients, ["+ forward initialisation"], "forward initialisation +10.0, SqrtKL +0.0, CutMix +0.0, the corrected rule -10.0"),
        (sqrtkl_where, [], "larger than chance: nowhere"),
        (bank_spectrum, [], "84 under the corrected rule, 84 under NPID's\nwith SqrtKL (λ = 20, T = 1) it ends at 70, without at 70"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_every_figure_is_drawn_and_its_title_says_what_the_figures_say(script, better, finding, titles, tmp_path):
    script.draw(invented(script, better=better), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert finding in titles[0]
    script.draw(invented(script, seeds=(0,)), tmp_path / "one seed.png")
    assert (tmp_path / "one seed.png").stat().st_size > 10_000


def test_a_difference_beyond_chance_is_named(titles, tmp_path):
    runs = invented(sqrtkl_where, better=["1000 images, with SqrtKL"])
    for run in runs:  # equal gains in every seed would have no spread to compare with
        run["final"]["knn"] += 0.001 * (run["seed"] == 1) * (run["name"] == "1000 images, with SqrtKL")
    sqrtkl_where.draw(runs, tmp_path / "x.png")
    assert "for 1000 images (+10.0 knn)" in titles[0] and "Figure" not in titles[0]


def test_the_framework_is_drawn(tmp_path, capsys):
    assert fig2_framework.main(["--picture", str(tmp_path / "fig2.png"), "--images", "300"]) == 0
    assert (tmp_path / "fig2.png").stat().st_size > 10_000
    assert fig2_framework.main(["--picture", str(tmp_path / "none" / "fig2.png")]) == 2
    assert "the picture" in capsys.readouterr().err


def run_figure(script, *options, draw=None):
    return sweeper.figure(script.__name__, script.__doc__, script.points, draw, list(options))


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
    found = sweeper.sweep(tmp_path / "mine.json", point, needs=("rank",))
    assert [run["seed"] for run in found] == [0, 1, 2] and {run["name"] for run in found} == {"λ"}
    with pytest.raises(TypeError):
        sweeper.sweep(tmp_path / "mine.json", point, needs=("what it does not have",))
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(TypeError):
        sweeper.sweep(tmp_path / "mine.json", point)
    assert "other.json: damaged" in capsys.readouterr().err


SCRIPT = """
import pathlib, sys, time
sys.path[:0] = ["figures", "tests"]
import sweep
from sweep import Config, SCALES, figure
from conftest import TINY

class Slow(sweep.Watch):
    def __call__(self, run, dataset, epoch):
        if epoch > 3 and (pathlib.Path(__file__).parent / "slow").exists():
            time.sleep(1)  # leaves time to interrupt a run whose epochs take milliseconds
        return super().__call__(run, dataset, epoch)

sweep.Watch = Slow
SCALES["cpu"] = TINY | {"epochs": 24, "subset": 64}
def points(base, scale):
    return {"a": base, "b": Config(**(base.__dict__ | {"lam": 1.0}))}
if __name__ == "__main__":
    sys.exit(figure("x", "x", points))
"""


def test_an_interrupted_sweep_goes_on_at_the_last_epoch(pictures, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "slow").touch()
    options = ["--data-dir", pictures, "--results", tmp_path / "x.json", "--keep", tmp_path / "kept", "--seeds", "0"]
    command = [sys.executable, tmp_path / "script.py", *options]

    def epochs():
        return [len(file.read_text().splitlines()) for file in (tmp_path / "kept").glob("*/metrics.jsonl")]

    def heed():  # Ctrl-C, which a suite that runs in a shell's background inherits as ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    piped = dict(cwd=sweeper.ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    with subprocess.Popen(command, **piped) as process:
        while not any(count > 3 for count in epochs()) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command goes on" in error and "Traceback" not in error
    before = epochs()
    (tmp_path / "slow").unlink()
    assert max(before) < 24 and not (tmp_path / "x.json").exists()
    done = subprocess.run(command, cwd=sweeper.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    runs = sweeper.read(tmp_path / "x.json")
    assert sorted(run["name"] for run in runs) == ["a", "b"] and all(len(run["epochs"]) == 24 for run in runs)
    clock = [[row["seconds"] for row in run["epochs"]] for run in runs]
    assert all(row == sorted(row) for row in clock), "the clock of a run goes on where it stopped"


# ------------------------------------------------------------------------------------------------- what is measured


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
    plain, watched = train(tiny(epochs=2)), train(tiny(epochs=2), watch=observe.Watch(looks=2))
    first, last = (json.loads(line) for line in (Path(tiny().out) / "metrics.jsonl").read_text().splitlines())
    assert last["nce"] == plain["nce"] == watched["nce"]
    assert 0.5 == first["reach_share"] and 1 <= last["rank"] <= 16 and len(last["spectrum"]) == 8
    assert 0 < last["knn"] < 1


def test_the_table_shows_mean_and_spread_over_seeds():
    runs = [{"name": "x", "final": {"linear": v, "knn": 0.5}} for v in (0.40, 0.42, 0.44)]
    runs += [{"name": "y", "final": {"linear": 0.3, "knn": 0.2}}]
    lines = sweeper.table(runs).splitlines()
    assert lines[2:] == ["| x | 42.0 ± 2.0 | 50.0 ± 0.0 | 3 |", "| y | 30.0 | 20.0 | 1 |"]


def test_nearest_neighbours_are_drawn(tiny, capsys):
    train(tiny(epochs=1))
    assert neighbours.main([tiny().out]) == 0
    picture = Path(tiny().out) / "neighbours.png"
    assert capsys.readouterr().out.splitlines()[-1] == str(picture) and picture.stat().st_size > 10_000
    assert neighbours.main(["nowhere"]) == 2
    assert capsys.readouterr().err.startswith("neighbours.py: nowhere: no checkpoint there")


def test_the_table_of_costs_has_time_and_memory(tiny):
    lines = fig1_cost.table(invented(fig1_cost)).splitlines()
    assert (
        lines[2] == "| ours, 5 epochs | 46.0 ± 1.0 | 41.0 ± 1.0 | 100 | 100 | 3 |" and len(lines) == 2 + 3 + 2 + 7 * 2
    )


def test_what_little_data_will_do_is_measured_and_drawn(tiny, tmp_path):
    points = {"ours, 96 images": tiny(epochs=1), "SimCLR, 96 images": tiny(epochs=1, method="simclr")}
    runs = sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), jobs=1, measure=data_efficiency.measure)
    ours, other = (run["final"] for run in runs)
    keys = {"knn", "linear", "linear_1", "linear_10", "linear_1_std", "linear_10_std"}
    assert set(other) == keys and set(ours) == keys | {f"scratch_linear{share}" for share in ("", "_1", "_10")}
    assert all(0 <= value <= 1 for value in (*ours.values(), *other.values()))
    again = sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), needs=("linear_1",))
    assert again[0]["final"] == ours, "a run that has what is needed is not repeated"
    data_efficiency.draw(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    lines = data_efficiency.table(runs).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["ours", "SimCLR", "from scratch"]


def test_the_title_of_little_data_names_the_largest_and_the_smallest_gain():
    def runs(count, **final):
        return [{"name": f"ours, {count} images", "final": final | {f"scratch_{key}": 0.3 for key in final}}]

    found = data_efficiency.rows_of(
        runs(1000, linear=0.4, linear_10=0.35, linear_1=0.32) + runs(5000, linear=0.29, linear_10=0.3, linear_1=0.3)
    )
    text = data_efficiency.title(found)
    assert "+10.0 (1000 images, all labels) to -1.0 (5000 images, all labels)" in text


def test_small_backbones_are_drawn_with_what_they_cost(titles, tmp_path):
    runs = invented(model_efficiency, better=["resnet10, ours"])
    model_efficiency.draw(runs, tmp_path / "x.png")
    assert "ahead on 1 of 6" in titles[0] and "resnet10 +10.0, mobilenet_v3_small +0.0" in titles[0]
    lines = model_efficiency.table(runs).splitlines()
    assert len(lines) == 2 + 18 and lines[-1].startswith(
        f"| resnet18 | 11.17 | 312 | {field.NAMES[field.BEST[-1]]} | 46.0 ± 1.0 |"
    )


def test_transfer_probes_every_run_on_every_target(tiny, tmp_path):
    own = tiny().dataset
    points = {f"ours on {own}": tiny(epochs=1)}
    targets = tuple(dict.fromkeys((own, "shapes")))
    runs = sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), jobs=1, measure=transfer.Measure(targets))
    wanted = {
        f"{who} {key} {t}" for who in ("trained", "untrained", "raw") for key in ("knn", "linear") for t in targets
    }
    assert set(runs[0]["final"]) == wanted | {"knn", "linear"}
    lines = transfer.table(runs).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "| pretrained on",
        "|" + "---|" * (len(targets) + 2),
        f"| ours on {own}",
        "| untrained",
        "| raw",
    ]


def test_the_ideas_name_the_one_that_helps_most(titles, tmp_path):
    runs = invented(field_ideas, better=["τ = 0.1"])
    field_ideas.draw(runs, tmp_path / "x.png")
    assert "at most +10.0 ± 0.8\nwith τ = 0.1" in titles[0]
    assert len(field_ideas.table(runs).splitlines()) == 2 + 15
    assert {run["config"]["holdout"] for run in runs} == {4000}, "settings are not chosen by the test images"


def test_a_field_s_methods_keep_to_their_own_settings():
    ours, parametric, byol = (field.contestant(base("cpu"), method) for method in ("ours", "parametric", "byol"))
    assert replace(parametric, momentum=ours.momentum, bank_init="forward", lr=ours.lr) == ours
    assert (byol.method, byol.weight_decay, byol.dim) == ("byol", 5e-4, Config.dim)
    assert replace(byol, arch="resnet18").epochs == ours.epochs and byol.width == ours.width
    assert field.contestant(replace(base("cpu"), batch_size=512), "byol", 0.06).lr == pytest.approx(0.24)


def test_the_chosen_learning_rates_are_the_best_of_the_search():
    file = sweeper.RESULTS / "field_lr-cpu.json"
    runs = sweeper.read(file)
    for method in field.NAMES:
        mine = {run["config"]["lr"]: run["final"]["linear"] + run["final"]["knn"] for run in runs
                if run["name"].startswith(field.NAMES[method] + ", lr")}  # fmt: skip
        if method != "moco":  # takes what MoCo v2 takes
            best = max(mine, key=mine.get)
            assert best == field.LR[method] and min(mine) < best < max(mine), method
    assert field.LR["moco"] == field.LR["mocov2"]
    assert field_lr.table(runs).count("**") == 2 * 9


def test_a_run_can_be_measured_for_the_memory_of_its_step(tiny, tmp_path):
    points = {"ours": tiny(epochs=1), "byol": tiny(epochs=1, method="byol")}
    runs = sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), jobs=1, memory=True)
    assert [run["method"] for run in runs] == ["ours", "byol"] and 0 < runs[0]["step_mib"] < runs[1]["step_mib"]


def test_committed_results_are_whole():
    for file in sweeper.RESULTS.glob("*.json"):
        for run in json.loads(file.read_text())["runs"]:
            assert run["hardware"] and run["date"] and run["epochs"] and 0 < run["final"]["linear"] < 1, file
            assert bool(run["data"]) == (run["config"]["dataset"] == "folder"), file  # a folder's hash
            assert not run["config"]["data_dir"] and not run["config"]["out"], file


def test_the_picture_of_speed_is_drawn_from_what_bench_writes(tmp_path, capsys):
    for part in speed.PARTS:
        line = [part, "--scale", "0.01", "--repeats", "1", "--device", "cpu"]
        assert bench.main([*line, "--results", str(tmp_path / f"{part}-cpu.json")]) == 0
    picture = tmp_path / "x.png"
    assert speed.main(["--results", str(tmp_path), "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000

    (tmp_path / "field-cpu.json").write_text("{")
    (tmp_path / "bank-cpu.json").unlink()
    for part, word in (("field", "damaged"), ("bank", "missing")):
        assert speed.main(["--results", str(tmp_path), "--picture", str(tmp_path / "y.png")]) == 2
        error = capsys.readouterr().err
        assert word in error and f"python bench.py {part} --device cpu --results" in error and error.count("\n") == 1
        (tmp_path / f"{part}-cpu.json").write_text((tmp_path / "overhead-cpu.json").read_text())
    assert not (tmp_path / "y.png").exists()


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
    script = f"{sys.executable} figures/fig2_framework.py --picture {tmp_path}/x.png | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=sweeper.ROOT)
    assert (ended.returncode, ended.stderr) == (141, "") and (tmp_path / "x.png").exists()
