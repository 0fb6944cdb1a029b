"""What a hostile world does to the programs: damaged files, wrong command lines, kills, starvation.

    make hostile                                             every kind, with the counts of KINDS
    python tests/hostile/campaign.py kills pairs --seed 3    two kinds, other draws
    python tests/hostile/campaign.py --share 0.1             a tenth of the counts

Every case is drawn from (seed, kind, number), so anybody repeats it. It counts as

    refused     exit status 2 and one line on stderr
    accepted    the work was done, or its start was reached, and what it left is whole
    failed      a traceback, another status, a hang, a file left, something lost or taken for whole

The last line is 0 failed, or the exit status is 1. docs/reliability.md has the figures.
"""

import contextlib
import copy
import io
import json
import logging
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import pytest
import torch
from invented import invented
from PIL import Image

import eval_linear
import train
from figures import sweep
from lab import scenes
from plumbing import files, shapes
from plumbing.command_line import Parser, UserError, command, flag

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # Pillow's, of damaged files
logging.disable()
KINDS = {"checkpoints": 2000, "images": 5000, "annotations": 60, "lines": 800, "kills": 150, "starved": 40, "pairs": 15}
TINY = dict(
    dataset="folder", arch="resnet10", width=8, size=16, dim=16, hidden=16, batch_size=16, bank_momentum=0.9,
    negatives=0, epochs=3, lr=0.1, optimizer="sgd", weight_decay=1e-4, window=0, warmup=0.0, device="cpu",
    precision="fp32", knn_every=0, cache_dir="", seed=0,
)  # fmt: skip
ABSURD = (
    None, "x", "", -1, 0, 1, 10**9, 10**30, 1e30, float("nan"), float("inf"), True, [], {}, [1], b"x", (1, 2),
    torch.zeros(0), torch.full((3,), float("nan")), torch.zeros(1).expand(10**10), torch.zeros(2, 2, dtype=torch.int64),
    torch.zeros(3, dtype=torch.complex64),
)  # fmt: skip


def line(**options) -> list[str]:
    return [word for name, value in options.items() for word in (flag(name), str(value))]


# ---------------------------------------------------------------------------------------- verdicts


class Hang(BaseException):
    pass


def ended(call, seconds: int = 300) -> tuple[object, str]:
    """The exit status of call(), and what it printed to stderr; for a traceback, its last line."""

    def hang(*_):
        raise Hang

    error = io.StringIO()
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            status = call()
    except SystemExit as end:
        status = end.code or 0
    except (Exception, Hang) as problem:
        status = f"{type(problem).__name__}: {problem}"[:200]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status, error.getvalue()


def verdict(status, error: str, lines: int = 1) -> str:
    """ "refused", "accepted", or what is wrong."""
    said = [text for text in error.splitlines() if text.strip()]
    if status == 2 and len(said) <= lines and "Traceback" not in error:
        return "refused" if said or not lines else "refused without a word"
    return "accepted" if status == 0 and "Traceback" not in error else f"status {status}: {' / '.join(said[-2:])[:300]}"


def forked(call, prepare=lambda: None) -> int:
    """The number of a process that runs call() after prepare(), and ends with its status."""
    number = os.fork()
    if number:
        return number
    try:
        prepare()
        status = call()
    except BaseException as problem:
        os.write(2, f"Traceback {type(problem).__name__}: {problem}\n".encode())
        status = 99
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(status if isinstance(status, int) else 98)


def waited(number: int, seconds: float = 120) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return 97  # a hang


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one.keys() - {"seconds", "out"})
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class World:
    """A folder with a few images and a finished run, for all kinds."""

    def __init__(self, root: Path):
        self.root, self.images, self.run = root, root / "images", root / "whole"
        for split, count in (("train", 48), ("test", 16)):
            pixels, labels = shapes.draw(count, seed=count, size=16)
            for i, (image, label) in enumerate(zip(pixels, labels)):
                folder = self.images / split / shapes.CLASSES[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(folder / f"{i:03d}.png")
        assert ended(lambda: train.main(self.line(self.run)), 600)[0] == 0
        self.content = torch.load(self.run / "last.pt", weights_only=True)

    def line(self, out: Path, **options) -> list[str]:
        return line(**(TINY | {"data_dir": self.images, "out": out} | options))


# --------------------------------------------------------------------------------------- the kinds


def mutated(content: dict, draws: random.Random) -> dict:
    """A checkpoint with one to three entries replaced, removed or renamed."""
    content = copy.deepcopy(content)
    for _ in range(draws.choice((1, 1, 2, 3))):
        place = content if draws.random() < 0.2 else draws.choice([content["config"]] * 3 + [content])
        while isinstance(place, dict) and place:
            key = draws.choice(list(place))
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and draws.random() < 0.8:
                place = inner if isinstance(inner, dict) else dict(enumerate(inner))
                continue
            change = draws.random()
            if change < 0.7:
                place[key] = draws.choice(ABSURD)
            elif change < 0.85:
                del place[key]
            else:
                place["renamed"] = place.pop(key)
            break
        if not isinstance(content.get("config"), dict):
            break
    return content


def checkpoints(world: World, draws: random.Random) -> str:
    """Half have bits flipped, half are written anew with absurd content."""
    place, export = world.root / "mutated" / "last.pt", world.root / "export.pt"
    place.parent.mkdir(exist_ok=True)
    flipped = draws.random() < 0.5
    if flipped:
        data = bytearray((world.run / "last.pt").read_bytes())
        if draws.random() < 0.1:
            del data[draws.randrange(len(data)) :]
        for _ in range(draws.choice((1, 1, 8, 64))):
            data[draws.randrange(len(data) or 1)] ^= 1 << draws.randrange(8)
        place.write_bytes(data)
    else:
        try:
            torch.save(mutated(world.content, draws), place)
        except Exception:  # what torch refuses to write
            return "refused"
    resumed = draws.random() < 0.25
    if resumed:
        status, error = ended(lambda: train.main(["--resume", str(place), "--data-dir", str(world.images)]))
    else:
        status, error = ended(lambda: eval_linear.main([str(place), "--export", str(export)]))
    judged = verdict(status, error)
    if judged == "accepted" and flipped and not resumed and not same(torch.load(export), world.exported()):
        judged = "a damaged file was taken for whole"
    for file in (export, *place.parent.iterdir()):
        file.unlink(missing_ok=True)
    return judged


def exported(self):
    if not hasattr(self, "_export"):
        state = self.content["encoder"]
        self._export = {k.removeprefix("backbone."): x for k, x in state.items() if k.startswith("backbone.")}
    return self._export


World.exported = exported


def images(world: World, draws: random.Random) -> str:
    """A damaged image file is decoded, or left out."""
    source = draws.choice(sorted(world.images.glob("train/*/*.png")))
    suffix = draws.choice(("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"))
    buffer = io.BytesIO()
    Image.open(source).save(buffer, suffix)
    data = bytearray(buffer.getvalue())
    if draws.random() < 0.3:
        del data[draws.randrange(len(data)) :]
    for _ in range(draws.choice((0, 1, 4, 32))):
        if data:
            data[draws.randrange(min(len(data), draws.choice((64, 10**9))))] = draws.randrange(256)
    place = world.root / f"damaged.{suffix}"
    place.write_bytes(data)

    def decoded():
        try:
            return 0 if files.decode(place, 16).shape == (3, 16, 16) else 1
        except files.UNREADABLE:
            print("left out", file=sys.stderr)
            return 2

    return verdict(*ended(decoded, 20))


def annotations(world: World, draws: random.Random) -> str:
    """COCO's or VOC's files with a field that is missing or absurd."""
    root = world.root / "scenes"
    shutil.rmtree(root, ignore_errors=True)
    kind = draws.choice(("coco", "voc"))
    values = (None, "", "x", -1, 10**12, float("nan"), [], {}, [1, 2], "../../outside.jpg", "/etc/passwd")
    if kind == "coco":
        content = {
            "images": [{"id": 1, "file_name": "1.jpg"}], "categories": [{"id": 1, "name": "a"}],
            "annotations": [{
                "id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 0,
                "segmentation": [[1, 1, 5, 1, 5, 5]],
            }],
        }  # fmt: skip
        entry = draws.choice([content, *(content[key][0] for key in content)])
        key = draws.choice(list(entry))
        if draws.random() < 0.3:
            del entry[key]
        else:
            entry[key] = draws.choice(values)
        (root / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            (root / split).mkdir()
            (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
            Image.new("RGB", (16, 16)).save(root / split / "1.jpg")
    else:
        word = lambda good: str(draws.choice(values)) if draws.random() < 0.15 else good  # noqa: E731
        for folder in ("Annotations", "JPEGImages", "SegmentationObject"):
            (root / folder).mkdir(parents=True)
        for name in ("1", "2"):
            box = "".join(f"<{k}>{word(v)}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), "1299"))
            text = f"<annotation><object><name>{word('a')}</name><bndbox>{box}</bndbox></object></annotation>"
            if draws.random() < 0.3:
                text = text.replace(draws.choice(("<name>", "<xmin>", "</object>", "bndbox")), "")
            (root / "Annotations" / f"{name}.xml").write_text(text)
            Image.new("RGB", (16, 16)).save(root / "JPEGImages" / f"{name}.jpg")
            Image.new("L", (16, 16)).save(root / "SegmentationObject" / f"{name}.png")

    def read(_):
        for scene in scenes.load(kind, root, draws.choice(("detection", "segmentation"))):
            image, target = scene[0]
            assert torch.isfinite(target["boxes"]).all() and len(target["boxes"]) == len(target["labels"])

    return verdict(*ended(lambda: command(read, "scenes")(None)))


SCRIPTS = sorted(
    str(file.relative_to(ROOT))
    for file in (*ROOT.glob("*.py"), *ROOT.glob("lab/**/*.py"), *ROOT.glob("figures/*.py"))
    if "__main__" in file.read_text()
)
WORK = {  # where the work of a script with a main() of its own begins
    "train": ("train",), "eval_linear": ("evaluate", "export"), "lab.train": ("train",),
    "lab.detection": ("transfer",), "lab.bench": ("hardware", "BENCHMARKS"), "lab.studies.throughput": ("measure",),
    "lab.studies.speed": ("draw",), "lab.studies.exercises": ("measure",), "figures.neighbours": ("draw",),
    "figures.page": ("compose",), "figures.fig2_framework": ("draw",), "figures.break_it": ("histories",),
}  # fmt: skip


def reached(*_, **__):
    raise SystemExit(0)


def lines(world: World, draws: random.Random) -> str:
    """One to three options of absurd values; where the work of a script would begin, it ends."""
    with pytest.MonkeyPatch.context() as patch:
        return _lines(world, draws, patch)


def _lines(world: World, draws: random.Random, patch: pytest.MonkeyPatch) -> str:
    script = draws.choice(SCRIPTS)
    module = script.removesuffix(".py").replace("/", ".")
    known, plain = [], Parser.parse_known_args

    def noting(self, *arguments, **options):
        known[:] = [action for action in self._actions if action.option_strings and action.dest != "help"]
        return plain(self, *arguments, **options)

    def run(argv):
        before, sys.argv = sys.argv, [script, *argv]
        try:
            if module in WORK or module == "lab.evaluate":
                loaded = __import__(module, fromlist=["main"])
                for name in WORK.get(module, ()):
                    end = dict.fromkeys(loaded.BENCHMARKS, reached) if name.isupper() else reached
                    patch.setattr(loaded, name, end)
                return loaded.main(argv)
            runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            sys.argv = before

    results = world.root / "results"  # what a script would change: not the project's own
    if not results.exists():
        shutil.copytree(sweep.RESULTS, results)
    patch.setattr(sweep, "RESULTS", results)
    patch.chdir(results.parent)
    patch.setattr(sweep, "side_by_side", reached)
    if module == "lab.evaluate":
        patch.setattr(eval_linear, "evaluate", reached)
    needs = {"eval_linear", "lab.evaluate", "lab.detection", "figures.neighbours", "figures.page"}
    fixed = [str(world.run)] if module in needs else ["overhead"] if module == "lab.bench" else []
    fixed = ["cpu"] if module == "lab.studies.paper_scale" else fixed
    with patch.context() as noted:
        noted.setattr(Parser, "parse_known_args", noting)
        ended(lambda: run([*fixed, "--no-such-option"]))
    fifo = world.root / "fifo"
    if not fifo.exists():
        os.mkfifo(fifo)
    values = (
        "", ".", "/", "/dev/null", "/proc/x", str(fifo), "nan", "inf", "-1", "0", "1e30", "9" * 30, "no/such/folder/x",
        "x" * 300, "é", "--", "[]", str(world.run / "last.pt"), str(world.run), str(world.images),
    )  # fmt: skip
    argv = list(fixed)
    for action in draws.sample(known, min(len(known), draws.choice((1, 1, 2, 3)))):
        if draws.random() < 0.05:
            argv.append(draws.choice(action.option_strings))
        elif action.nargs == 0:
            argv.append(action.option_strings[0])
        else:
            argv.append(f"{action.option_strings[0]}={draws.choice(values)}")
    before = (world.run / "last.pt").read_bytes()
    status, error = ended(lambda: run(argv))
    judged = verdict(status, error)
    if (world.run / "last.pt").read_bytes() != before:
        judged = "the run was destroyed"
    return judged if judged in ("refused", "accepted") else f"{script} {' '.join(argv)}: {judged}"


def kills(world: World, draws: random.Random) -> str:
    """SIGKILL at a random moment, then --resume: equal to the last bit, and nothing left."""
    out = world.root / "killed"
    shutil.rmtree(out, ignore_errors=True)
    quiet = silent(world.root)
    number = forked(lambda: train.main(world.line(out)), quiet)
    time.sleep(draws.uniform(0, 1.2) * world.seconds())
    os.kill(number, signal.SIGKILL)
    waited(number)
    again = ["--resume", str(out)] if (out / "last.pt").exists() else world.line(out)
    status = waited(forked(lambda: train.main(again), quiet))
    if status:
        return f"resuming ended with {status}: {(world.root / 'stderr').read_text()[-300:]}"
    if list(out.glob("*.part")):
        return "a part was left"
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (world.run, out))
    one["config"]["out"] = other["config"]["out"]
    one["history"], other["history"] = ([row | {"seconds": 0} for row in x["history"]] for x in (one, other))
    return "accepted" if same(one, other) else "the resumed run differs"


def silent(root: Path):
    def prepare():
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)

    return prepare


def seconds(self) -> float:
    if not hasattr(self, "_seconds"):
        started = time.monotonic()
        waited(forked(lambda: train.main(self.line(self.root / "timed")), silent(self.root)))
        self._seconds = time.monotonic() - started
    return self._seconds


World.seconds = seconds


def starved(world: World, draws: random.Random) -> str:
    """Little memory, disk or files; streams that are closed, full, ASCII or without a reader."""
    out = world.root / "starved"
    shutil.rmtree(out, ignore_errors=True)
    quiet = silent(world.root)
    kind = draws.choice(("memory", "files", "size", "closed", "full", "reader", "ascii"))
    which = draws.choice((1, 2))
    amount = {"memory": draws.choice((1, 4, 16, 64)) << 20, "files": draws.randrange(4, 14)}.get(kind, 0)
    amount = draws.choice((0, 100, 20_000, 200_000)) if kind == "size" else amount

    def prepare():
        quiet()
        if kind == "memory":
            pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (pages + amount,) * 2)
        elif kind == "files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (amount,) * 2)
        elif kind == "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (amount,) * 2)
        elif kind == "closed":
            os.close(which)
        elif kind == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), which)
        elif kind == "reader":
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, which)
        else:
            sys.stdout.reconfigure(encoding="ascii", errors="strict")
            sys.stderr.reconfigure(encoding="ascii", errors="strict")

    work = ["train", "evaluate"][draws.random() < 0.4]
    json_file = world.root / "starved.json"
    json_file.unlink(missing_ok=True)
    line_of = {
        "train": lambda: train.main(world.line(out)),
        "evaluate": lambda: eval_linear.main([str(world.run), "--k", "5", "--json", str(json_file)]),
    }
    status = waited(forked(line_of[work], prepare))
    error = (world.root / "stderr").read_text(errors="replace")
    about = f"{work}, {kind} {which} {amount}: "
    if status in (0, 141) or (status == 2 and kind in ("full", "closed") and which == 1):
        place = out / "last.pt" if work == "train" else json_file
        done = place.exists() and (work != "train" or torch.load(place, weights_only=True)["step"] == 9)
        judged = (
            "accepted" if done and "Traceback" not in error else f"status {status}, nothing was kept {error[-200:]}"
        )
    else:
        silent_now = kind in ("full", "closed", "reader") and which == 2
        judged = verdict(status, error, 1 if not (kind == "size" and amount == 0 or silent_now) else 0)
    if list(out.glob("*.part")):
        judged = "a part was left"
    return judged if judged in ("refused", "accepted") else about + judged


def pairs(world: World, draws: random.Random) -> str:
    """Two runs in one folder, or two processes that add to one file of results."""
    out, file = world.root / "shared", world.root / "shared.json"
    shutil.rmtree(out, ignore_errors=True)
    file.unlink(missing_ok=True)
    if draws.random() < 0.4:
        runs = [run | {"seed": i} for i, run in enumerate(invented_runs()[:1] * 20)]
        halves = [lambda own=own: [sweep.add(file, [run]) for run in own] and 0 for own in (runs[:10], runs[10:])]
        numbers = [forked(half, silent(world.root)) for half in halves]
        if [waited(number) for number in numbers] != [0, 0]:
            return f"adding failed: {(world.root / 'stderr').read_text()[-300:]}"
        return "accepted" if len(sweep.read(file)) == 20 else f"{20 - len(sweep.read(file))} results were lost"
    wait = draws.uniform(0, 1.3) * world.seconds()
    first = forked(lambda: train.main(world.line(out, seed=1)), silent(world.root))
    time.sleep(wait)
    second = forked(lambda: train.main(world.line(out, seed=2)), silent(world.root))
    codes = [waited(first), waited(second)]
    content = torch.load(out / "last.pt", weights_only=True)
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    if sorted(codes) != [0, 2]:
        return f"the two ended with {codes}"
    whole = content["step"] == 9 and content["config"]["seed"] == 1 + codes.index(0) and rows == content["history"]
    whole = whole and json.loads((out / "config.json").read_text())["seed"] == content["config"]["seed"]
    return "accepted" if whole else "the two runs are mixed"


def invented_runs() -> list[dict]:
    from figures import fig5_lambda

    return invented(fig5_lambda)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} [all]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--share", type=float, default=1.0, help="of the counts [1]")
    parser.add_argument("--count", type=int, help="cases per kind, in place of the share")
    parser.add_argument("--case", type=int, help="this case alone")
    args = parser.parse_args(argv)
    chosen = args.kinds or list(KINDS)
    if set(chosen) - KINDS.keys():
        raise UserError(f"kinds are {', '.join(KINDS)}")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        print(f"{'kind':<14}{'tried':>8}{'refused':>10}{'accepted':>10}{'failed':>8}{'seconds':>9}", flush=True)
        for kind in chosen:
            count, started, tally = args.count or max(1, round(args.share * KINDS[kind])), time.monotonic(), {}
            for case in [args.case] if args.case is not None else range(count):
                judged = globals()[kind](world, random.Random(f"{args.seed} {kind} {case}"))
                known = judged if judged in ("refused", "accepted") else "failed"
                tally[known] = tally.get(known, 0) + 1
                if known == "failed":
                    failures += 1
                    print(f"  {kind} --case {case}: {judged}", flush=True)
            tried = sum(tally.values())
            cells = [tried, *(tally.get(key, 0) for key in ("refused", "accepted", "failed"))]
            print(f"{kind:<14}{cells[0]:>8}{cells[1]:>10}{cells[2]:>10}{cells[3]:>8}", end="")
            print(f"{time.monotonic() - started:>9.0f}", flush=True)
    print(f"{failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
