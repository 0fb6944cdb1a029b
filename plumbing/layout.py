"""A listing of file names to a layout: which images train, which test, of which class.

`layout` looks at names alone, in any depth. It knows three layouts:

    train/<class>/…  test/<class>/…    also training, val, valid, validation, Test_set, …
    <class>/…                          a fifth is kept for testing, by the hash of an image's name
    anything else                      images without labels; a tenth is kept to judge features by

unlabeled/ and loose images in train/ join the pretraining. Where two readings of the names are
equally good, `layout` refuses instead of guessing.
"""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from plumbing.command_line import UserError
from plumbing.outputs import RUN_FILES

KEPT = 1 / 5  # the share of class folders that is kept for testing
ASIDE, MOST, FEW = 1 / 10, 1000, 200  # the same without labels, at most, and from how many images on
LINKS = 3  # in a row: folders that link to one another make paths without number

# Formats that Pillow opens, but draws only with the help of other programs.
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_KINDS = {"tr": "train", "te": "test", "va": "validation", "un": "unlabelled"}
_PART = re.compile(r"((train|test)(ing)?|val(id|idation)?|unlabell?ed)([ _-]?(set|data|images|split|\d+))*", re.I)


@dataclass(frozen=True)
class Layout:
    """train and test hold (name, class) pairs, class None for an image without a label.

    Labelled images come first, each class in the order of its names. Without classes, test holds
    images that are kept to judge features by. said tells in a line what was
    recognised, and what is not used and why. lacks says why there are no labels to evaluate with
    ("": there are).
    """

    train: tuple[tuple[str, str | None], ...]
    test: tuple[tuple[str, str | None], ...]
    classes: tuple[str, ...]
    said: str
    lacks: str


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of the image files that the installed Pillow reads."""
    Image.init()
    known = Image.registered_extensions().items()
    opened = Image.OPEN.keys() | {"MPO"}  # which the reader of JPEG opens
    return frozenset(suffix for suffix, kind in known if kind in opened - _NO_PIXELS)


def listing(root: Path) -> tuple[list[str], list[str]]:
    """The names below root of all files, and what is left out and why.

    Names are relative, with "/". Hidden files and folders are left out, and so is what a run wrote:
    pictures of it are no images. Links are followed, but not to a folder that the link lies in. A
    link that leads nowhere is a file. Raises UserError if root may not be listed.
    """
    names, closed, runs, far, waiting = [], [], [], 0, [("", (), 0)]
    while waiting:
        folder, around, links = waiting.pop()
        try:
            about = os.stat(root / folder)
            own = (about.st_dev, about.st_ino)
            if own in around or links > LINKS:
                far += own not in around
                continue
            kept = {name for name in RUN_FILES if os.path.exists(root / folder / name)}
            is_run = "config.json" in kept and bool(kept & {"last.pt", "metrics.jsonl"})  # either comes first
            if is_run and folder:
                runs.append(folder[:-1])
                continue
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith((".", "@eaDir", "__MACOSX")) or (is_run and entry.name in RUN_FILES):
                        continue
                    name = folder + entry.name
                    regular = entry.is_file(follow_symlinks=False)  # known without another look at the disk
                    if not regular and os.path.isdir(entry):
                        waiting.append((name + "/", (*around, own), links + entry.is_symlink()))
                    elif regular or entry.is_symlink():  # no pipe and the like
                        names.append(name)
        except OSError as error:
            if not folder:
                raise UserError(f"--data-dir {root}: may not be listed ({error.strerror})") from error
            closed.append(folder)
    unused = [f"{name} (may not be listed)" for name in sorted(closed)]
    unused += [f"{_listed(sorted(runs))} ({'a run' if len(runs) == 1 else f'{len(runs)} runs'})"] * bool(runs)
    return names, unused + [f"{far} folders behind more than {LINKS} links"] * bool(far)


def nfc(text: str) -> str:
    """One spelling for names that look the same: macOS may write é as e and an accent."""
    return unicodedata.normalize("NFC", text)


def chance(name: str) -> float:
    """A number in [0, 1) that looks random and follows from the name alone."""
    return int.from_bytes(digest(name)[:8], "big") / 2**64


def digest(name: str) -> bytes:
    return hashlib.blake2s(name.encode(errors="surrogateescape")).digest()


def layout(names, left_out=()) -> Layout:
    """The layout of a listing (`listing`). Raises UserError where two fit equally well."""
    images, kinds = [], Counter()
    for path in sorted(name.split("/") for name in names):
        suffix = os.path.splitext(path[-1])[1].lower()
        if suffix in suffixes():
            images.append(path)
        else:
            kinds[suffix or "without a suffix"] += 1
    named = kinds.most_common(4)
    unused = [f"{count} {suffix}" for suffix, count in named]
    unused += [f"{kinds.total() - sum(count for _, count in named)} other files"] * (len(kinds) > 4)
    unused += left_out
    if not images:
        wanted = "wanted are .jpg, .png and what else Pillow reads, in it, in train/ or in folders named after classes"
        raise UserError(f"no images found; seen: {', '.join(unused) or 'nothing'}; {wanted}")
    depth = _wrapped(images)
    loose, folders = _folders(images, depth)
    parts = {kind: [f for f in folders if part_of(f) == kind] for kind in _KINDS.values()}
    for kind in ("train", "test", "validation"):
        if len(parts[kind]) > 1 and _parts_are_meant(parts, folders, depth):
            raise UserError(f"{_listed(parts[kind])} can each be the {kind} set: rename all but one")
    if parts["train"] and _parts_are_meant(parts, folders, depth):
        return _in_parts(parts, folders, loose, depth, unused)
    classes = {f: paths for f, paths in folders.items() if part_of(f) != "unlabelled"}
    if len(classes) > 1 and "unlabelled" not in map(part_of, images[0][:depth]):
        return _in_classes(classes, folders, loose, depth, unused)
    said = f"{_images(len(images))} without labels" + f", {len(images) - len(loose)} of them in folders" * bool(folders)
    lacks = "all images lie in one folder, so there are no classes" if depth or folders else "no class folders"
    return _layout([(path, None) for path in images], [], depth, said, unused, lacks)


def part_of(folder: str) -> str:
    """What the folder's name says it is: train, test, validation, unlabelled, or "" for none."""
    match = _PART.fullmatch(folder)
    return _KINDS[match[0][:2].lower()] if match else ""


def _wrapped(images: list[list[str]]) -> int:
    """How many folders lie around everything: an archive often unpacks to one more."""
    depth = 0
    while True:
        heads = {path[depth] if len(path) > depth + 1 else "" for path in images}
        if len(heads) != 1 or heads == {""} or part_of(next(iter(heads))) == "train":
            return depth
        depth += 1


def unwrapped(names: list[str]) -> list[str]:
    """The names, counted from below the folders that lie around all of them."""
    depth = _wrapped([name.split("/") for name in names])
    return ["/".join(name.split("/")[depth:]) for name in names]


def _folders(images, depth: int):
    """The images that lie in no folder at this depth, and those of each folder."""
    loose, folders = [], {}
    for path in images:
        if len(path) == depth + 1:
            loose.append(path)
        else:
            folders.setdefault(nfc(path[depth]), []).append(path)
    return loose, folders


def _parts_are_meant(parts, folders, depth: int) -> bool:
    """Whether train/ is the training set, and not a class next to others.

    Raises UserError where it can be either.
    """
    if not parts["train"]:
        return False
    others = [folder for folder in folders if not part_of(folder)]
    deep = {folder: bool(_folders(paths, depth + 1)[1]) for folder, paths in folders.items()}
    tests, train = parts["test"] + parts["validation"], parts["train"][0]
    if not others or (deep[train] and (tests or not any(deep[folder] for folder in others))):
        return True
    if len(others) > 1 and not tests and not any(deep.values()):
        return False
    advice = f"rename it, or move {_listed(others)} elsewhere"
    raise UserError(f"{train}/ can be the training set or a class next to {_listed(others)}: {advice}")


def _in_parts(parts, folders, loose, depth: int, unused: list[str]) -> Layout:
    tests = parts["test"] or parts["validation"]
    train_name, test_name = parts["train"][0], tests[0] if tests else ""
    train, test = (_labelled(folders[name], depth + 1) if name else [] for name in (train_name, test_name))
    train += [(path, None) for name in parts["unlabelled"] for path in folders[name]]
    unused += _left_out(len(loose), "beside the folders")
    if parts["test"]:
        for name in parts["validation"]:
            unused += _left_out(len(folders[name]), f"in {name}/ ({test_name}/ is the test set)")
    for name in folders:
        unused += _left_out(len(folders[name]) if not part_of(name) else 0, f"in {name}/")
    unused += _left_out(sum(label is None for _, label in test), f"in {test_name}/ (not in class folders)")
    test = [(path, label) for path, label in test if label is not None]
    labelled = sum(label is not None for _, label in train)
    said = [f"{labelled} labelled images in {train_name}/"] * bool(labelled)
    said += [f"{len(test)} in {test_name}/"] * bool(test)
    said += [f"{_images(len(train) - labelled)} without labels"] * (len(train) > labelled)
    lacks = ""
    if not labelled:
        lacks = f"{train_name}/ has no class folders"
    elif not test:
        lacks = f"{test_name}/ has no class folders" if test_name else "there is train/, but no test/ next to it"
    return _layout(train, test, depth, ", ".join(said), unused, lacks)


def _in_classes(classes, folders, loose, depth: int, unused: list[str]) -> Layout:
    _refuse_other_classes(classes, depth)
    total = sum(map(len, classes.values()))
    if len(loose) > total:
        advice = "move them to unlabeled/, or the folders elsewhere"
        raise UserError(f"{len(loose)} images lie beside folders with {total}, which can be classes or not: {advice}")
    unused += _left_out(len(loose), "beside the class folders")
    train, test = [], []
    for name, paths in classes.items():
        for path in paths:
            (test if chance("/".join(path[depth:])) < KEPT else train).append((path, name))
    said = f"{_images(total)} in class folders, {len(test)} of them kept for testing"
    bare = [(path, None) for name in folders if name not in classes for path in folders[name]]
    said += f", {_images(len(bare))} without labels" if bare else ""
    lacks = "" if test else "there are too few images to keep some for testing"
    return _layout(train + bare, test, depth, said, unused, lacks)


def _refuse_other_classes(classes, depth: int) -> None:
    """Raises UserError if the folders below the folders can as well be the classes, or parts."""
    below = {}
    for name, paths in classes.items():
        direct, folders = _folders(paths, depth + 1)
        below[name] = [] if direct else list(folders)
        kinds = {part_of(folder) for folder in folders}
        if "train" in kinds and kinds & {"test", "validation"}:
            raise UserError(f"{name}/ has a training and a test set of its own: name it with --data-dir")
        if part_of(name) in ("test", "validation") and set(folders) & (classes.keys() - {name}):
            advice = f"move the class folders beside {name}/ into train/"
            raise UserError(f"{name}/ can be the test set, or a class next to others: {advice}")
    if all(len(folders) > 1 for folders in below.values()):
        first, second = next(iter(below)), next(iter(below.values()))[0]
        advice = "for the upper ones, move them into train/; for the lower ones, move them up"
        advice += "; without classes, move all into unlabeled/"
        raise UserError(f"the classes can be folders like {first}/ or like {first}/{second}/: {advice}")


def _labelled(paths, depth: int):
    """(path, class) of each image of a part: loose images have no class and come last."""
    while True:
        loose, folders = _folders(paths, depth)
        if loose or len(folders) != 1:
            break
        ((name, inside),) = folders.items()
        direct, below = _folders(inside, depth + 1)
        if not part_of(name) and (direct or len(below) < 2):
            break
        depth += 1
    labelled = [(path, name) for name, inside in folders.items() for path in inside]
    return labelled + [(path, None) for path in loose]


def _layout(train, test, depth: int, said: str, unused: list[str], lacks: str) -> Layout:
    classes = sorted({label for _, label in (*train, *test) if label is not None})
    if len(classes) == 1:
        lacks = f"all images are of one class, {classes[0]}"
        unused += _left_out(len(test), "kept for testing, of the only class")
        train, test, classes, said = [(path, None) for path, _ in train], [], [], f"{_images(len(train))}, {lacks}"
    if not classes:
        train, test = _aside(train, depth)
        said += f", {len(test)} of them kept to judge features by" if test else ""
    if classes:
        said += f"; {len(classes)} classes: {', '.join(classes[:4])}{', …' * (len(classes) > 4)}"
    train, test = (tuple(("/".join(path), label) for path, label in pairs) for pairs in (train, test))
    return Layout(train, test, tuple(classes), said + (f"; not used: {', '.join(unused)}" if unused else ""), lacks)


def _aside(pairs, depth: int):
    """The images without labels, and a tenth of them that is kept, at most 1 000.

    Those with the smallest hashes: so new files move few others. Of few images none is kept.
    """
    chances = sorted((chance("/".join(path[depth:])), path) for path, _ in pairs)
    kept = {tuple(path) for number, path in chances[:MOST] if number < ASIDE and len(pairs) >= FEW}
    return tuple([pair for pair in pairs if (tuple(pair[0]) in kept) == inside] for inside in (False, True))


def _left_out(count: int, where: str) -> list[str]:
    return [f"{_images(count)} {where}"] * bool(count)


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _listed(folders: list[str]) -> str:
    shown = [f"{folder}/" for folder in folders[:3]] + ["…"] * (len(folders) > 3)
    return ", ".join(shown)
