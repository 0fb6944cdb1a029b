"""Sweeps next to each other, options that nobody reads, and files of strangers: one line each."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest
from invented import invented
from PIL import Image
from processes import Forked
from test_reliability import refused

from figures import break_it, fig2_framework, fig4_momentum, fig5_lambda
from figures import sweep as sweeper
from lab import ranks, scenes
from lab import train as lab_program
from plumbing.command_line import UserError

# -------------------------------------------------------------------------------------- two at once


def test_results_that_processes_add_at_the_same_time_are_all_kept(tmp_path):
    file = tmp_path / "x.json"
    runs = [run | {"seed": seed} for seed, run in enumerate(invented(fig5_lambda)[:1] * 16)]
    children = []
    for own in (runs[:8], runs[8:]):
        children.append(os.fork())
        if not children[-1]:
            for run in own:
                sweeper.add(file, [run])
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert sorted(run["seed"] for run in sweeper.read(file)) == list(range(16))
    assert [place.name for place in tmp_path.iterdir()] == ["x.json"]


def test_a_run_that_another_sweep_has_made_is_not_made_again(lab_config, tmp_path, monkeypatch):
    config, calls = lab_config(epochs=1, knn_every=0), []
    monkeypatch.setattr(sweeper, "ROOT", tmp_path)

    def measure(checkpoint, dataset):
        calls.append(1)
        return {"knn": 0.5, "linear": 0.5}

    for name in ("first", "second"):
        sweeper.run_one(tmp_path / f"{name}.json", (), name, config, 1, 0, False, "", False, measure)
    assert len(calls) == 1
    assert len(sweeper.read(tmp_path / "second.json")) == 1 and not list((tmp_path / "runs" / "figures").iterdir())


def test_the_processes_of_a_sweep_end_when_it_is_killed(lab_config, tmp_path):
    point = lab_config(epochs=5000, subset=32, knn_every=0)

    def long(_):
        sweeper.sweep(tmp_path / "x.json", {"a": point}, seeds=(0,), jobs=1, keep=tmp_path / "kept")

    with Forked(long) as process:
        process.wait_for(lambda: list((tmp_path / "kept").glob("*/last.pt")), 240)
        children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
        process.kill()
    assert children.stdout.split()
    for child in map(int, children.stdout.split()):
        deadline = time.monotonic() + 60
        while os.path.exists(f"/proc/{child}/exe"):
            assert time.monotonic() < deadline, "it trains on"
            time.sleep(0.1)


# ------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"WORLD_SIZE": "4"}, {"RANK": "3", "WORLD_SIZE": "4"}])
def test_variables_that_torchrun_did_not_set_train_no_run_to_throw_away(monkeypatch, capsys, lab_config, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks.first()
    with pytest.raises(UserError, match="torchrun did not start this process: unset it"):
        lab_program.train(lab_config(epochs=1))


@pytest.mark.parametrize("option", ["--lam", "--negatives", "--dim"])
def test_options_that_a_method_ignores_are_refused(capsys, option):
    refused(capsys, lab_program.main, ["--method", "simclr", option, "5"], option, "leave it out")


def test_options_that_a_bank_ignores_are_refused(capsys):
    refused(capsys, lab_program.main, ["--similarity-gb", "5"], "--similarity-gb means nothing with --window")


def test_the_letters_of_break_it_go_to_no_device(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(break_it, "histories", None)  # no work begins
    (tmp_path / "break_it.png").symlink_to("/dev/null")
    refused(capsys, break_it.main, ["--out", tmp_path], "break_it.png: a device, a pipe")
    refused(capsys, break_it.main, ["--out", "/proc/x"], "/proc/x")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--device", "tpu"], "--device"),
        (["--seeds", "0", "0"], "--seeds"),
        (["--seeds", "-1"], "--seeds"),
        (["--jobs", "100000"], "--jobs"),
        (["--picture", "no/such/x.png"], "--picture"),
        (["--results", "."], "--results"),
        (["--data-dir", "no/such"], "--data-dir no/such"),
    ],
)
def test_a_sweep_checks_its_options_before_a_process_starts(monkeypatch, tmp_path, capsys, line, words):
    monkeypatch.setattr(sweeper, "ProcessPoolExecutor", None)
    line = line if "--results" in line else [*line, "--results", tmp_path / "x.json"]
    line = [str(word) for word in line]
    assert sweeper.figure("x", "x", fig4_momentum.points, None, line) == 2
    assert words in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_the_framework_is_drawn_for_a_number_of_images_that_there_can_be(capsys, tmp_path):
    for number in ("-5", "0", "9" * 20):
        refused(capsys, fig2_framework.main, ["--images", number, "--picture", tmp_path / "x.png"], "--images")


def test_two_outputs_of_a_sweep_are_two_files(tmp_path, capsys):
    line = ["--results", str(tmp_path / "x.json"), "--picture", str(tmp_path / "x.json")]
    assert sweeper.figure("x", "x", fig4_momentum.points, None, line) == 2
    assert "another option names the same file" in capsys.readouterr().err
    assert sweeper.figure("x", "x", fig4_momentum.points, None, ["--results", str(tmp_path / "x.png")]) == 2
    assert "would be replaced by the picture" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- files of others


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.update(epochs=[]),
        lambda run: run.update(epochs=[{"epoch": 1}]),
        lambda run: run.update(epochs=3),
        lambda run: run["final"].update(knn=None),
        lambda run: run["final"].update(linear=float("nan")),
        lambda run: run.update(final=[]),
        lambda run: run.update(config=[]),
    ],
)
def test_results_with_figures_that_are_none_are_damaged(tmp_path, change):
    runs = json.loads(json.dumps(invented(fig5_lambda)[:1]))
    change(runs[0])
    (tmp_path / "x.json").write_text(json.dumps({"runs": runs}))
    with pytest.raises(UserError, match=r"x\.json: damaged"):
        sweeper.read(tmp_path / "x.json")


def test_results_that_nest_too_deep_or_are_no_text_are_damaged(tmp_path):
    for content in (b"[" * 100_000, b"\xff\xfe\x00"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json: damaged"):
            sweeper.read(tmp_path / "x.json")


GOOD = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 5, 1, 5, 5]]}


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": None}, {"bbox": [1, 2]}, {"bbox": [1, 1, float("nan"), 5]}, {"bbox": [0, 0, 1e300, 1]},
        {"bbox": ["a", 1, 2, 3]}, {"category_id": []}, {"image_id": 7}, {"segmentation": 3}, {"segmentation": [[1, 2]]},
        {"segmentation": {"counts": [10**12]}}, {"segmentation": {"counts": [-5, 261]}}, {"segmentation": {}},
        {"iscrowd": "x"}, {"file_name": "../out.jpg"}, {"file_name": "/etc/passwd"}, {"file_name": 3},
        {"segmentation": {"counts": [10]}},
    ],
)  # fmt: skip
def test_absurd_annotations_are_named(tmp_path, change):
    name = change.pop("file_name", "1.jpg") if "file_name" in change else "1.jpg"
    content = {"images": [{"id": 1, "file_name": name}], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        file = tmp_path / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content | {"annotations": [GOOD | change]}))
        (tmp_path / split).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / split / "1.jpg")
    with pytest.raises(UserError) as told:
        [scene[0] for scene in scenes.load("coco", tmp_path, "segmentation")]
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["<name></name>", "<name>a</name><bndbox><xmin>nan</xmin></bndbox>"])
def test_absurd_annotations_of_voc_are_named(tmp_path, text):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "1.xml").write_text(f"<annotation><object>{text}</object></annotation>")
    with pytest.raises(UserError, match="not VOC's annotations"):
        scenes.load("voc", tmp_path, "detection")


def test_a_list_of_images_names_none_outside(tmp_path):
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Annotations" / "1.xml").write_text("<annotation/>")
    for split in ("train", "val"):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("../../outside\n")
    with pytest.raises(UserError, match="no name of an image"):
        scenes.load("voc", tmp_path, "detection")


def test_a_killed_process_of_a_sweep_is_one_line(monkeypatch, lab_config, tmp_path, forked_sweep):
    """As the kernel kills it where memory runs out."""
    monkeypatch.setattr(sweeper, "run_one", kill_itself)
    points = {"a": replace(lab_config(epochs=1))}
    with pytest.raises(UserError, match="lacks 1 of 1 runs: one of its processes was killed.*fewer --jobs"):
        sweeper.sweep(tmp_path / "x.json", points, seeds=(0,), jobs=1)


def kill_itself(*_):
    os.kill(os.getpid(), signal.SIGKILL)
