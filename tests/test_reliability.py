"""Hostile outputs, checkpoints, streams and neighbours: one line, and nothing is lost."""

import io
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from processes import Forked

import eval_linear
import train as program
from data import load
from plumbing import files
from plumbing.command_line import DataLost, Stream, UserError, command, loaded
from plumbing.files import Images, decode
from plumbing.outputs import HELD, WAITS, locked, replacing, save_text
from plumbing.runs import Interrupted, configure, read_checkpoint
from train import Config, train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(Config(**(TINY | {"data_dir": str(pictures), "out": str(out), "epochs": 1, "negatives": 0})))
    return out


@pytest.fixture
def copy(run, tmp_path):
    """A function that writes the run's checkpoint with changes to it, and gives its place."""

    def write(change=lambda content: None):
        content = torch.load(run / "last.pt", weights_only=True)
        change(content)
        torch.save(content, tmp_path / "copy.pt")
        return tmp_path / "copy.pt"

    return write


def refused(capsys, main, line, *words):
    capsys.readouterr()
    assert main([str(word) for word in line]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and all(word in said[0] for word in words), said


# --------------------------------------------------------------------------------------- 1. outputs


def special(tmp_path, run, kind):
    """A place that no result may go to."""
    if kind == "pipe":
        os.mkfifo(tmp_path / "pipe")
    elif kind == "link to a device":
        (tmp_path / kind).symlink_to("/dev/null")
    elif kind == "link in a circle":
        (tmp_path / kind).symlink_to(tmp_path / kind)
    elif kind == "link to the run":
        (tmp_path / kind).symlink_to(run / "last.pt")
    elif kind == "long name":
        return tmp_path / ("x" * 253)
    else:
        return {"device": "/dev/null", "empty": "", "folder": ".", "run": run / "last.pt", "none": "no/x",
                "settings": run / "config.json", "proc": "/proc/x"}[kind]  # fmt: skip
    return tmp_path / kind


KINDS = ("pipe", "link to a device", "link in a circle", "link to the run", "long name", "device", "empty", "folder",
         "run", "none", "settings", "proc")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["--json", "--export"])
def test_a_place_that_no_result_may_go_to_is_refused_before_the_work(run, tmp_path, capsys, monkeypatch, option, kind):
    for name in ("evaluate", "export"):
        monkeypatch.setattr(eval_linear, name, None)  # no work begins
    place, before = special(tmp_path, run, kind), (run / "last.pt").read_bytes()
    refused(capsys, eval_linear.main, [run, option, place], option)
    assert (run / "last.pt").read_bytes() == before and Path("/dev/null").is_char_device()


def test_two_options_cannot_name_one_file_and_no_input_is_an_output(run, tmp_path, capsys):
    (tmp_path / "best.pt").write_bytes((run / "last.pt").read_bytes())
    refused(capsys, eval_linear.main, [tmp_path / "best.pt", "--export", tmp_path / "best.pt"], "--export", "same file")
    refused(capsys, eval_linear.main, [tmp_path / "best.pt", "--json", tmp_path / "best.pt"], "--json", "same file")
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 6


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "file")
    save_text("new", tmp_path / "link", "it")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "file").read_text() == "new"


def test_a_failed_clean_up_does_not_hide_why_the_writing_failed(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(UserError, match=r"Read-only file system\)$"), replacing(tmp_path / "x", "it"):
        denied()


@pytest.mark.parametrize("refusals", [2, 99])
def test_a_reader_that_holds_the_file_is_waited_for_but_not_forever(tmp_path, monkeypatch, refusals):
    """As on Windows, where a file that is open cannot be replaced."""
    plain, calls, waited = Path.replace, [], []

    def held(path, target):
        calls.append(1)
        if len(calls) <= refusals:
            raise PermissionError(13, "Access is denied")
        return plain(path, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr("plumbing.outputs.time.sleep", waited.append)
    (tmp_path / "x").write_text("old")
    if refusals == 2:
        save_text("new", tmp_path / "x", "it")
        assert (tmp_path / "x").read_text() == "new" and len(waited) == 2
    else:
        with pytest.raises(UserError, match=r"Access is denied\); what was there before is untouched"):
            save_text("new", tmp_path / "x", "it")
        assert (tmp_path / "x").read_text() == "old" and waited == list(WAITS) and 2 < sum(waited) < 5
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# ----------------------------------------------------------------------------------- 2. two at once


def test_a_folder_belongs_to_one_run_at_a_time(tiny, tmp_path):
    """The lock of another process is a refusal, and ends with that process."""

    def hold(_):
        with locked(tmp_path / "run", "busy"):
            (tmp_path / "held").touch()
            time.sleep(600)

    with Forked(hold) as other:
        other.wait_for((tmp_path / "held").exists)
        with pytest.raises(UserError, match="another process is training there"):
            train(tiny())
        assert list((tmp_path / "run").iterdir()) == []
    with locked(tmp_path / "run", "busy"), locked(tmp_path / "run", "busy"):
        assert len(HELD) == 1, "a lock that is held already is no obstacle"
    assert not HELD


def test_a_run_that_ended_meanwhile_is_not_replaced(tiny, run, tmp_path):
    config = tiny(epochs=1)
    config.overwrite = False  # the command line saw an empty folder
    Path(config.out).mkdir()
    (Path(config.out) / "last.pt").write_bytes((run / "last.pt").read_bytes())
    with pytest.raises(UserError, match="holds a run: .*--out starts elsewhere"):
        train(config)
    assert read_checkpoint(config.out)["step"] == 6


# ------------------------------------------------------------------------------- 3., 4. checkpoints


@pytest.mark.parametrize("at", [0.3, 0.5, 0.7, 0.9])
def test_one_flipped_bit_of_a_checkpoint_is_noticed(run, tmp_path, capsys, at):
    data = bytearray((run / "last.pt").read_bytes())
    data[int(at * len(data))] ^= 16
    (tmp_path / "flipped.pt").write_bytes(data)
    refused(capsys, eval_linear.main, [tmp_path / "flipped.pt", "--export", tmp_path / "x.pt"], "damaged")
    assert not (tmp_path / "x.pt").exists()


def test_one_flipped_bit_of_the_decoded_images_is_noticed(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("plumbing.files.FEW", 10)
    before = load("folder", pictures, cache_dir=tmp_path)
    for file in tmp_path.glob("*.pt"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert torch.equal(load("folder", pictures, cache_dir=tmp_path).train.pixels, before.train.pixels)


def put(value, *keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


CHANGES = {
    "NaN in a weight": put(torch.full((8, 3, 3, 3), torch.nan), "encoder", "backbone.conv1.weight"),
    "inf in a buffer": put(torch.full((8,), torch.inf), "encoder", "backbone.bn1.running_mean"),
    "a negative variance": put(-torch.ones(8), "encoder", "backbone.bn1.running_var"),
    "a huge view of one number": put(torch.zeros(1).expand(10**12), "encoder", "backbone.bn1.bias"),
    "no tensor": put("x", "encoder", "backbone.bn1.bias"),
    "no encoder": put(None, "encoder"),
    "10^9 layers": put(10**9, "config", "layers"),
    "a side of 10^6": put(10**6, "config", "size"),
    "a negative width": put(-8, "config", "width"),
    "text for a number": put("8", "config", "dim"),
    "true for a number": put(True, "config", "epochs"),
    "a setting that is missing": lambda content: content["config"].pop("hidden"),
    "a step of text": put("x", "step"),
    "a history of numbers": put([1, 2], "history"),
    "a bank of one number": put(torch.tensor(1.0), "bank", "weight"),
    "true for the list of images": put(True, "images"),
    "words for the list of images": put("x", "images", "files"),
    "fractions for the list of images": put(torch.zeros(96), "images", "files"),
    "words for a range of values": put(["low", "high"], "span"),
    "a range of values without end": put([0.0, math.inf], "span"),
    "a range of one value": put([1.0], "span"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_checkpoint_says_is_checked_before_it_is_believed(copy, tmp_path, capsys, name):
    place = copy(CHANGES[name])
    refused(capsys, eval_linear.main, [place, "--export", tmp_path / "x.pt"], str(place))
    refused(capsys, program.main, ["--resume", place], str(place))
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(
    "change",
    [
        put(-1, "step"),
        put(10**9, "step"),
        put(torch.zeros(7), "sums"),
        put(0.5, "optimizer", "param_groups", 0, "momentum"),
        put("x", "optimizer", "param_groups", 0, "weight_decay"),
        put(torch.zeros(5), "optimizer", "state", 0, "momentum_buffer"),
        lambda content: content.pop("bank"),
        *[put(nothing, "bank") for nothing in ({}, [], "", {"weight": torch.zeros(0, 16)})],
    ],
)
def test_a_checkpoint_that_does_not_fit_its_run_is_not_resumed(copy, capsys, change):
    refused(capsys, program.main, ["--resume", copy(change)], "--resume")


def test_a_checkpoint_names_no_place_outside_that_is_written_to(copy, tmp_path, monkeypatch):
    def elsewhere(content):
        content["config"] |= {"cache_dir": "/tmp/outside", "data_dir": str(tmp_path / "outside"), "dataset": "cifar10"}

    place = copy(elsewhere)
    monkeypatch.chdir(ROOT)
    config = read_checkpoint(str(place), Config)["config"]
    assert (config["cache_dir"], config["data_dir"]) == ("runs/decoded", "data")
    (tmp_path / "outside" / "cifar-10-batches-py").mkdir(parents=True)
    assert read_checkpoint(str(place), Config)["config"]["data_dir"] == str(tmp_path / "outside"), "it is read there"


def test_a_checkpoint_beside_another_run_does_not_replace_that_run(run, tmp_path, capsys):
    other, before = tmp_path / "other", (run / "last.pt").read_bytes()
    other.mkdir()
    (other / "last.pt").write_bytes(before)
    (other / "old.pt").write_bytes(before)
    words = f"--resume {other / 'old.pt'}", f"{other} holds a run", "name another folder with --out"
    for line in ([], ["--out", other]):
        refused(capsys, program.main, ["--resume", other / "old.pt", *line], *words)
    assert sorted(path.name for path in other.iterdir()) == ["last.pt", "old.pt"]
    here, elsewhere = other / ".." / "other", tmp_path / "new"
    for line in (["old.pt", "--out", elsewhere], [""], ["last.pt", "--out", here]):
        assert program.main(["--resume", str(other / line[0]), *map(str, line[1:])]) == 0
    (other / "last.pt").unlink()
    assert program.main(["--resume", str(other / "old.pt")]) == 0, "nothing would be replaced"


# --------------------------------------------------------------------------------- 5. command lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--warmup", "1e18"], "--warmup must be at most"),
        (["--lr", "1e30"], "--lr must be at most"),
        (["--layers", "999999999"], "--layers must be at most"),
        (["--epochs", "9" * 30], "--epochs must be at most"),
        (["--lam", "1e300"], "--lam must be at most"),
        (["--resume", ""], "no checkpoint there"),
        (["--out=" + "x" * 300], "File name too long"),
        (["--out=--", "--lr=--"], "--"),
    ],
)
def test_absurd_values_are_refused(line, message, capsys):
    refused(capsys, program.main, line, message)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (["--muon-momentum", "0.5", "--optimizer", "sgd"], "--optimizer sgd"),
        (["--visits", "3", "--window", "0"], "--window 0"),
        (["--kl-temperature", "2"], "--lam 0"),
        (["--jitter-p", "0.5", "--jitter", "0"], "--jitter 0"),
        (["--data-dir", "my_images"], "--dataset shapes (folder: your own images)"),
        (["--fit", "pad"], "--dataset shapes"),
        (["--cache-gb", "1", "--dataset", "cifar10"], "--dataset cifar10"),
    ],
)
def test_options_that_do_nothing_with_the_others_are_refused(line, why, capsys):
    refused(capsys, program.main, line, f"{line[0]} means nothing with {why}: leave it out")


def test_sgd_does_not_take_muons_weight_decay(capsys):
    """Which would shrink the weights by a fifth in a step; 1e-4 and a small rate do not."""
    refused(capsys, program.main, ["--optimizer", "sgd"], "shrinks the weights to nothing; try --weight-decay 1e-4")
    for line in (["--weight-decay", "1e-4"], ["--lr", "0.001"]):
        config, _ = configure(Config, program.RECIPES, ["--optimizer", "sgd", *line], "")
        assert config.optimizer == "sgd"


def test_an_export_takes_no_options_that_it_would_ignore(run, tmp_path, capsys):
    for option in (["--k", "3"], ["--dataset", "shapes"], ["--json", tmp_path / "x.json"]):
        refused(capsys, eval_linear.main, [run, "--export", tmp_path / "x.pt", *option], f"leave out {option[0]}")


# --------------------------------------------------------------------------------------- 6. streams


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.broken = error

    def write(self, text):
        raise self.broken

    def fileno(self):
        raise io.UnsupportedOperation


@pytest.mark.parametrize(
    ("error", "status"), [(BrokenPipeError(), 141), (OSError(28, "No space left"), 2), (OSError(5, "Input/output"), 2)]
)
def test_where_nobody_can_read_the_work_is_done_and_saved(flags, tmp_path, monkeypatch, error, status):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))
    assert program.main(flags(epochs=1)) == status
    assert read_checkpoint(str(tmp_path / "run"))["step"] == 6
    place = tmp_path / "figures.json"
    assert eval_linear.main([str(tmp_path / "run"), "--k", "5", "--json", str(place)]) == status
    assert 0 <= json.loads(place.read_text())["trained"]["knn"] <= 1


def test_a_strictly_ascii_stream_gets_every_word():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("49.1 ± 0.2 %, λ = 20, naïve", file=Stream(stream), flush=True)
    assert stream.buffer.getvalue() == rb"49.1 \xb1 0.2 %, \u03bb = 20, na\xefve" + b"\n"


def test_a_run_whose_stderr_is_closed_keeps_its_files(flags, tmp_path):
    """What is opened first would get the number of stderr, and warnings would end up in it."""
    line = [sys.executable, str(ROOT / "train.py"), *flags(epochs=1)]
    ended = subprocess.run(["bash", "-c", '"$@" 2>&- 1>&-', "x", *line], timeout=120)
    assert ended.returncode == 0 and read_checkpoint(str(tmp_path / "run"))["step"] == 6


# ---------------------------------------------------------------------------- 7. images and workers


def lose(monkeypatch, after):
    """Images can be loaded `after` times, then no more."""
    plain, calls = Images.batches, []

    def batches(self, *arguments):
        for batch in plain(self, *arguments):
            calls.append(1)
            if len(calls) > after:
                raise DataLost("images cannot be loaded any more (x.png is gone)")
            yield batch

    monkeypatch.setattr(Images, "batches", batches)


def test_a_run_whose_images_vanish_saves_first_and_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
    train(tiny(out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        lose(patch, 6 + 6 + 2 + 3)  # the bank's first pass, an epoch, its look at the accuracy, three steps
        with pytest.raises(UserError, match=r"x\.png is gone.*stopped after step \d+ of 12, saved; .*--resume") as told:
            train(tiny())
    assert not isinstance(told.value, DataLost)
    checkpoint = read_checkpoint(tiny().out)
    train(tiny(), checkpoint)
    one, other = read_checkpoint(str(tmp_path / "whole")), read_checkpoint(tiny().out)
    assert 0 < checkpoint["step"] and torch.equal(one["bank"]["weight"], other["bank"]["weight"])
    assert [row["epoch"] for row in other["history"]] == [1, 2]


def test_images_that_vanish_before_the_first_step_leave_no_checkpoint(tiny, monkeypatch):
    lose(monkeypatch, 2)
    with pytest.raises(UserError, match="nothing was saved yet"):
        train(tiny())
    assert not (Path(tiny().out) / "last.pt").exists()


def test_what_fails_in_a_worker_is_one_line():
    class Gone(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise UserError("x.jpg: cannot be read") if index else FileNotFoundError(2, "No such file", "y.png")

    for start, words in ((0, "'y.png'"), (1, "x.jpg: cannot be read")):
        for workers in (0, 1):
            loader = torch.utils.data.DataLoader(torch.utils.data.Subset(Gone(), [start]), num_workers=workers)
            with pytest.raises(DataLost) as told:
                list(loaded(loader))
            assert words in str(told.value) and "\n" not in str(told.value)


ON_DISK = dict(cache_gb=1e-9, workers=1, window=0, knn_every=0)


def test_a_worker_that_is_killed_ends_a_run_between_two_steps(tiny, tmp_path, monkeypatch):
    """As the kernel kills it where memory runs out; the run goes on to the same last bit."""
    train(tiny(**ON_DISK, out=str(tmp_path / "whole")))
    plain = program.learning_rate

    def killing(config, step, per_epoch):
        for worker in multiprocessing.active_children() if step == 2 else ():
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        return plain(config, step, per_epoch)

    with monkeypatch.context() as patch:
        patch.setattr(program, "learning_rate", killing)
        with pytest.raises(
            UserError, match=r"worker .*--workers 0 reads .*stopped after step \d+ of 12, saved; .*--resume"
        ):
            train(tiny(**ON_DISK))
    checkpoint = read_checkpoint(tiny().out)
    assert 3 <= checkpoint["step"] < 6
    train(tiny(**ON_DISK), checkpoint)
    one, other = read_checkpoint(str(tmp_path / "whole")), read_checkpoint(tiny().out)
    assert torch.equal(one["bank"]["weight"], other["bank"]["weight"])


def test_a_small_shared_memory_is_one_line_that_says_what_helps(flags, tmp_path):
    script = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "bash", "-c", script, "x", "true"]).returncode:
        pytest.skip("this process may not mount a file system of its own")
    options = flags(**ON_DISK, batch_size=48)
    line = ["unshare", "-m", "bash", "-c", script, "x", sys.executable, str(ROOT / "train.py"), *options]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=200)
    said = [text for text in ended.stderr.splitlines() if text.startswith("train.py: ")]
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert len(said) == 1 and "--workers 0" in said[0] and "nothing was saved yet" in said[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_the_whole_group_is_saved_like_one_to_the_run(flags, tmp_path, workers):
    """As `timeout` and schedulers send it: the workers end at once, the run saves."""
    with Forked(program.main, flags(**(ON_DISK | dict(workers=workers, epochs=1000))), os.setsid) as process:
        process.wait_for((tmp_path / "run" / "last.pt").exists)
        os.killpg(process.pid, signal.SIGTERM)
        status, _, error = process.ended()
    assert status == 143 and "Traceback" not in error, error
    step = int(re.search(r"stopped after step (\d+) of 6000, saved", error.splitlines()[-1])[1])
    assert read_checkpoint(str(tmp_path / "run"))["step"] == step


def test_an_image_that_would_take_gigabytes_is_left_out(tmp_path):
    Image.new("1", (12_000, 12_000)).save(tmp_path / "small.png")
    assert (tmp_path / "small.png").stat().st_size < 50_000
    with pytest.raises(ValueError, match="67 million pixels"):
        decode(tmp_path / "small.png", 32)


def huge_jpeg(path, side, **options):
    """A grey JPEG of side x side pixels: the head of a small one, and enough blocks."""
    Image.new("L", (16, 16), 128).save(path, "JPEG", **options)
    raw = bytearray(path.read_bytes())
    frame, scan = raw.index(b"\xff\xc2" if options else b"\xff\xc0"), raw.index(b"\xff\xda")
    raw[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    blocks = (side // 8) ** 2
    path.write_bytes(raw[: scan + 10] + b"\x28\xa2\x8a" * (blocks // 4) + b"\xff\xd9")  # four blocks of 6 bits each


def test_a_photograph_of_a_phone_may_have_200_megapixels(tmp_path):
    huge_jpeg(tmp_path / "huge.jpg", 14_400)
    assert (decode(tmp_path / "huge.jpg", 32) == 128).all()
    assert files.sample([tmp_path / "huge.jpg"])[0] == [(14_400, 14_400)]


def icon_with_a_huge_png(path):
    png = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", 14_000, 14_000, 8, 6, 0, 0, 0)
    for name, content in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(99)))):
        png += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    entry = struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(png), 22)
    path.write_bytes(struct.pack("<HHH", 0, 1, 1) + entry + png)


@pytest.mark.parametrize(
    "write",
    [icon_with_a_huge_png, lambda path: huge_jpeg(path, 14_400, progressive=True)],
    ids=["icon", "progressive"],
)
def test_what_would_be_decoded_at_full_size_keeps_pillows_limit(tmp_path, write):
    write(tmp_path / "huge")
    with pytest.raises(Image.DecompressionBombError, match="exceeds limit of .* pixels"):
        decode(tmp_path / "huge", 32)


def test_no_picture_is_copied_at_full_size(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (300, 200), (9, 99, 199)).save(tmp_path / "turned.png", exif=exif)
    Image.new("RGB", (300, 200), (9, 99, 199)).save(tmp_path / "upright.png")
    monkeypatch.setattr(Image.Image, "copy", lambda image: pytest.fail(f"a copy of {image.size}"))
    monkeypatch.setattr(Image.Image, "transpose", lambda image, _: pytest.fail(f"a copy of {image.size}"))
    for name in ("turned.png", "upright.png"):
        assert (decode(tmp_path / name, 32) == np.array([9, 99, 199])[:, None, None]).all()


def test_an_unreadable_file_takes_no_second_copy_of_the_pixels(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "some")
    whole = load("folder", tmp_path / "some").train
    bad = [3, 4, 50, 95]
    for i in bad:
        whole.paths[i].write_bytes(b"no image")
    images, kept = load("folder", tmp_path / "some").train, torch.tensor([i for i in range(96) if i not in bad])
    assert len(images) == 92 and torch.equal(images.pixels, whole.pixels[kept])
    assert torch.equal(images.labels, whole.labels[kept]) and images.paths == [whole.paths[i] for i in kept.tolist()]
    assert images.pixels.untyped_storage().nbytes() == whole.pixels.nbytes, "the same memory, and a few bytes behind"


def test_moving_rows_does_not_change_the_decoded_images_that_are_kept(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FEW", 10)
    shutil.copytree(pictures, tmp_path / "some")
    sorted((tmp_path / "some" / "train").rglob("*.png"))[7].write_bytes(b"no image")
    first, again, third = (load("folder", tmp_path / "some", cache_dir=tmp_path / "kept").train for _ in range(3))
    assert len(first) == 95 and torch.equal(first.pixels, again.pixels) and torch.equal(first.pixels, third.pixels)


def test_rows_move_down_over_more_than_one_piece():
    pixels = torch.randint(0, 256, (5000, 3, 2, 2), dtype=torch.uint8)
    kept = (torch.rand(5000) < 0.7).nonzero()[:, 0]
    expected, images = pixels[kept], files._without_others(Images(pixels, labels=torch.arange(5000)), kept)
    assert torch.equal(images.pixels, expected) and torch.equal(images.labels, kept)


def test_at_most_eight_pictures_are_decoded_at_a_time(pictures, monkeypatch):
    pools, plain = [], files.ThreadPoolExecutor
    monkeypatch.setattr(files, "ThreadPoolExecutor", lambda count: pools.append(count) or plain(count))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    load("folder", pictures)
    files.Range.of(sorted(pictures.rglob("*.png"))[:2])
    assert pools == [8, 8, 8]


# -------------------------------------------------------------- 8., 9., 11. places, memory, signals


NO_COMPILER = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})("No working C++ compiler")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MemoryError(), 2, "out of memory: take fewer or smaller images"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "out of memory"),
        (RuntimeError("could not create a primitive"), 2, "out of memory"),  # oneDNN's words
        (OSError(12, "Cannot allocate memory"), 2, "out of memory"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (OSError(36, "File name too long", "zzz"), 2, "zzz: File name too long"),
        (NO_COMPILER, 2, "x.py: --compile: torch.compile failed (No working C++ compiler); --no-compile does without"),
    ],
)
def test_what_the_machine_lacks_is_one_line(capsys, error, status, words):
    def main(argv):
        raise error

    assert command(main, "x.py")([]) == status
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("hang_up_ends")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_of_training_is_one_line(capsys, number):
    before = signal.getsignal(number)
    assert command(lambda argv: os.kill(os.getpid(), number) or time.sleep(5), "x.py")([]) == 128 + number
    assert capsys.readouterr().err == "x.py: stopped; what was saved before is kept\n"
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("hang_up_ends")
def test_a_hang_up_is_saved_like_any_other_end(tiny, monkeypatch):
    plain = program.learning_rate
    monkeypatch.setattr(
        program, "learning_rate", lambda *a: (a[1] == 4 and os.kill(os.getpid(), signal.SIGHUP)) or plain(*a)
    )
    with pytest.raises(Interrupted) as told:
        train(tiny())
    assert told.value.args[1] == signal.SIGHUP and read_checkpoint(tiny().out)["step"] == 5


SCRIPTS = ["train.py", "eval_linear.py", *sorted(f"figures/{file.name}" for file in (ROOT / "figures").glob("*.py"))]
SCRIPTS = [script for script in SCRIPTS if "__main__" in (ROOT / script).read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_is_one_line(script):
    """The signal comes where the first package is imported that takes a while."""
    code = "import signal, sys, os; signal.signal(signal.SIGINT, signal.default_int_handler); import runpy\n"
    code += f"sys.argv = [{str(ROOT / script)!r}]; sys.path[:0] = [{str((ROOT / script).parent)!r}]\n"
    code += "import importlib.abc\n"
    code += "class Ctrl_C(importlib.abc.MetaPathFinder):\n    def find_spec(self, name, *_):\n"
    code += "        if name in ('torch', 'numpy', 'matplotlib'): os.kill(os.getpid(), signal.SIGINT)\n"
    code += "sys.meta_path.insert(0, Ctrl_C())\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 130 and len(ended.stderr.splitlines()) == 1, ended.stderr


@pytest.mark.parametrize("words", [["train.py", "--help"], ["figures/page.py", "run"], ["-m", "lab.train"]])
def test_an_environment_that_is_not_active_is_told_in_one_line(words):
    """Python without its installed packages."""
    ended = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("torch is missing: activate the environment") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["--epoch", "2"], "--epochs"), (["--epocs=2"], "--epochs"), (["--datadir", "x"], "--data-dir")],
)
def test_a_misspelt_option_is_told_with_the_one_that_was_meant(words, meant, capsys):
    refused(capsys, program.main, words, f"unrecognized arguments: {words[0]}", f"; did you mean {meant}?")


def test_an_option_like_no_other_is_told_alone(capsys):
    assert program.main(["--zzz"]) == 2
    assert capsys.readouterr().err == "train.py: unrecognized arguments: --zzz\n"


def test_a_file_is_no_folder_of_images(tmp_path, capsys):
    (tmp_path / "a.jpg").write_text("x")
    line = ["--dataset", "folder", "--data-dir", tmp_path / "a.jpg", "--out", tmp_path / "run"]
    refused(capsys, program.main, line, "a.jpg: is a file; name the folder that holds your images")


# ------------------------------------------------------------------------------- no permission


@pytest.fixture
def closed(run, pictures):
    """A folder with images and a run, in which the user "nobody" may write to own/ alone."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place)
        shutil.copytree(pictures, folder / "images")
        shutil.copytree(run, folder / "run")
        (folder / "own").mkdir()
        (folder / "closed").mkdir()
        for name in ("closed.pt", "closed.json"):
            (folder / "own" / name).write_bytes((run / "last.pt").read_bytes())
        for path in (*folder.rglob("*"), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (folder / "own").chmod(0o777)
        for path in (folder / "own" / "closed.pt", folder / "closed"):
            path.chmod(0)
        yield folder
        folder.chmod(0o755)


LACKING = {
    "a run's folder": "--dataset folder --data-dir images --batch-size 16 --out new",
    "a run to go on with": "--resume run --data-dir images",
    "figures": "run --json x.json",
    "figures of old": "run --json own/closed.json",
    "an export": "run --export x.pt",
    "a checkpoint": "own/closed.pt",
    "images": "--dataset folder --data-dir closed --out own/x",
}


@pytest.mark.parametrize("name", LACKING)
def test_a_place_without_permission_is_one_line(closed, name):
    before = sorted(path.name for path in closed.rglob("*"))

    def as_nobody():
        os.chdir(closed)
        if not os.getuid():
            os.setgroups([]), os.setgid(65534), os.setuid(65534)

    main = program.main if LACKING[name].startswith("--") else eval_linear.main
    with Forked(main, LACKING[name].split(), as_nobody) as process:
        status, _, error = process.ended()
    assert status == 2 and len(error.splitlines()) == 1 and "Permission" in error, error
    assert sorted(path.name for path in closed.rglob("*")) == before


def test_the_campaign_finds_no_failure_in_a_few_cases_of_every_kind():
    def campaign(words):
        return runpy.run_path(str(ROOT / "tests" / "hostile" / "campaign.py"))["main"](words)

    with Forked(campaign, ["--count", "3"]) as process:
        status, printed, error = process.ended(300)
    assert status == 0 and printed.endswith("0 failed\n"), printed + error
