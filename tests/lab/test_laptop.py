"""The figures at --scale laptop, and the study of what SqrtKL is."""

import json

import pytest
import torch
from invented import base, invented, points_can_be_run

from figures import fig3_convergence, fig4_momentum, fig5_lambda, observe, plots
from figures import sweep as sweeper
from lab.studies import sqrtkl_is_a_temperature as study
from train import Config

SCRIPTS = (fig3_convergence, fig4_momentum, fig5_lambda, study)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("scale", ["laptop", "demo"])
def test_every_point_can_be_run_and_has_the_paper_s_n_and_k(script, scale):
    points_can_be_run(script, scale, twice={"λ = 0"})
    if scale == "laptop":
        configs = script.points(base(scale), scale).values()
        assert all((c.subset, c.negatives, c.optimizer, c.window) == (0, 10_000, "sgd", 0) for c in configs)
        assert all(c.epochs >= 30 for c in configs)


def test_figure_3_compares_both_rules_with_and_without_sqrtkl_for_at_least_100_epochs():
    points = fig3_convergence.points(base("laptop"), "laptop").values()
    assert {(c.bank_update, c.lam) for c in points} == {(r, lam) for r in ("npid", "corrected") for lam in (0, 20)}
    assert all((c.temperature, c.bank_momentum, c.cutmix) == (0.2, 0.5, 0.5) and c.epochs >= 100 for c in points)


@pytest.mark.parametrize(
    "script, better, finding",
    [
        (
            fig3_convergence, ["NPID's rule, " + fig3_convergence.WITH],
            "at the end with NPID's rule, an epoch takes 1.00 times as long,\nand +0.0 halfway and +0.0 ± 0.8",
        ),
        (fig4_momentum, ["corrected rule, m = 0.9"], "best at m = 0.9, NPID's rule at m = 0; best against best +10.0"),
        (fig5_lambda, ["τ = 0.2, λ = 20"], "at τ = 0.2 the best λ, 20, changes kNN by +10.0 ± 0.8; at τ = 0.07"),
        (fig5_lambda, [fig5_lambda.LONGER, "τ = 0.2, λ = 5"], "\nin as much time +0.0 ± 0.8 at τ = 0.2"),
        (study, [study.WITH, study.SCALED], "SqrtKL +10.0 ± 0.8, τ' alone +0.0 ± 0.8, τ' with the scaled"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_laptop_picture_s_title_says_what_the_figures_say(script, better, finding, monkeypatch, tmp_path):
    titles, finish = [], plots.finish
    monkeypatch.setattr(plots, "finish", lambda f, title, *args: (titles.append(title), finish(f, title, *args)))
    monkeypatch.setattr(fig3_convergence, "rates", dict)  # the clock of the runs counts
    script.draw(invented(script, "laptop", better=better), tmp_path / "x.png")
    assert finding in titles[0] and (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize("script, count", [(fig4_momentum, 6), (fig5_lambda, 7)])
def test_only_the_ends_and_the_best_points_have_all_seeds(script, count, monkeypatch, tmp_path):
    best = {fig4_momentum: "NPID's rule, m = 0.5", fig5_lambda: "τ = 0.07, λ = 5"}[script]
    ready = invented(script, "laptop", better=[best])
    few = [run for run in ready if run["seed"] == 0]
    asked = []

    def made(file, points, seeds, **options):
        asked.append((list(points), list(seeds)))
        return [run for run in ready if run["name"] in points and run["seed"] in seeds]

    monkeypatch.setattr(sweeper, "sweep", made)
    options = ["--scale", "laptop", "--results", str(tmp_path / "r.json")]
    drawn = []
    options_of = dict(laptop=True, repeated=script.repeated, show=lambda runs: drawn.extend(runs) or "")
    assert sweeper.figure("x", "x", script.points, None, options, **options_of) == 0
    (everything, first), (some, others) = asked
    assert len(everything) == len(few) and (first, others) == ([0], [1, 2])
    ends = [name for name in everything if name.endswith(("m = 0", "m = 0.99", "λ = 0", "λ = 100"))]
    assert best in some and set(ends) <= set(some) and len(some) <= count < len(everything)
    assert len(drawn) == len(few) + 2 * len(some) and "1 to 3 seeds" in plots.settings(drawn)


@pytest.mark.parametrize("script", (fig4_momentum, fig5_lambda))
def test_a_sweep_at_the_laptop_scale_is_redrawn_from_what_is_there(script, monkeypatch, tmp_path, capsys):
    """From the first seed alone, and from a part of its points."""
    runs = [run for run in invented(script, "laptop") if run["seed"] == 0]
    monkeypatch.setattr(sweeper, "fingerprint", lambda *_: "")
    for count in (len(runs), len(runs) - 2, 3):
        file = tmp_path / str(count) / "r.json"
        file.parent.mkdir()
        file.write_text(json.dumps({"runs": [run | {"data": ""} for run in runs[:count]]}))
        options = ["--scale", "laptop", "--redraw", "--results", str(file)]
        arguments = dict(laptop=True, repeated=script.repeated)
        assert sweeper.figure("x", "x", script.points, script.draw, options, **arguments) == 0, capsys.readouterr().err
        assert file.with_suffix(".png").stat().st_size > 10_000
        assert len(capsys.readouterr().out.splitlines()) == 3 + count


def test_scripts_without_a_laptop_scale_refuse_it(capsys):
    assert sweeper.figure("x", "x", fig3_convergence.points, None, ["--scale", "laptop"]) == 2
    assert "--scale" in capsys.readouterr().err


def test_the_temperature_that_sqrtkl_acts_as_is_found_in_a_gradient():
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(2, 0.1, 32)
    rows = torch.nn.functional.normalize(torch.randn(5000, 32, generator=generator) * scales, dim=1)
    target = torch.arange(40)
    z = torch.nn.functional.normalize(rows[target] + 0.3 * torch.randn(40, 32, generator=generator) * scales, dim=1)
    for lam in (5.0, 10.0):
        config = Config(temperature=0.5, lam=lam, kl_temperature=1.0)
        fit = observe.fitted_temperature(z, target, rows, config)
        assert fit["tau"] == pytest.approx(study.acts_as(0.5, lam), rel=0.12)
        assert fit["tau_cosine"] > 0.995 and fit["tau_length"] == pytest.approx(fit["tau"] / 0.5, rel=0.12)
        assert 1 - fit["tau_before"] > 10 * (1 - fit["tau_cosine"])  # τ itself fits worse
    alone = observe.fitted_temperature(z, target, rows, Config(temperature=0.5, lam=0.0))
    assert (alone["tau"], alone["tau_cosine"], alone["tau_length"], alone["tau_before"]) == (0.5, 1.0, 1.0, 1.0)


def test_gradients_are_compared_at_a_right_angle_to_z():
    """What pulls a unit vector along itself does not reach the encoder."""
    z = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = torch.nn.functional.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    pull = observe._pull(z, torch.arange(8), rows, 0.2, Config(temperature=0.2, lam=20.0, kl_temperature=1.0))
    assert (pull * z).sum(1).abs().max() < 1e-5 < 0.1 < pull.norm(dim=1).min()


def test_the_scaled_point_makes_the_steps_of_the_scaled_gradient():
    """SGD's step is lr (g + wd w): with lr f and wd / f it is lr (f g + wd w)."""
    points = study.points(base("laptop"), "laptop")
    plain, scaled = points[study.PLAIN], points[study.SCALED]
    assert scaled.temperature == points[study.LOWER].temperature == pytest.approx(1 / 7)
    assert scaled.lr == pytest.approx(plain.lr / 1.4)
    assert scaled.lr * scaled.weight_decay == pytest.approx(plain.lr * plain.weight_decay)
    assert (
        points[study.WITH] == fig3_convergence.points(base("laptop"), "laptop")["NPID's rule, " + fig3_convergence.WITH]
    )


def test_the_table_has_the_fitted_temperature(tmp_path):
    runs = invented(study, "laptop", seeds=(0,))
    for run in runs:
        if run["name"] == study.WITH:
            for row in run["epochs"][1::2]:
                row |= {"tau": 0.15, "tau_cosine": 0.999, "tau_before": 0.9, "tau_length": 0.7}
    lines = study.table(json.loads(json.dumps(runs))).splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {study.WITH} ")]
    assert line.endswith("| 0.150 to 0.150 | 0.999 to 0.999 | 0.900 to 0.900 | 0.700 to 0.700 |")
    assert all(line.count("|") == 8 for line in lines)
    study.draw(runs, tmp_path / "x.png")
