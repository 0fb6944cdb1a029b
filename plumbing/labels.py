"""A few labels from a file: `path,class` in each line, for pictures of a folder without labels."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import torch

from plumbing.command_line import UserError
from plumbing.files import Dataset, Images, say
from plumbing.layout import KEPT, chance, nfc


def read_labels(file: Path) -> dict[str, str]:
    """{path: class} from a CSV file of two columns; a first line `path,class` is a heading.

    Raises UserError, which names the line, for what is none, and for a path with two classes.
    """
    classes = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, strict=True)
            for row in reader:
                place = f"--labels {file}, line {reader.line_num}"
                words = tuple(nfc(word.strip()) for word in row)
                if not any(words) or (reader.line_num == 1 and tuple(map(str.lower, words)) == ("path", "class")):
                    continue
                if len(words) != 2 or not all(words):
                    raise UserError(f"{place}: {','.join(row)[:80]!r} is not path,class")
                path = os.path.normpath(words[0])
                if classes.setdefault(path, words[1]) != words[1]:
                    raise UserError(f"{place}: {path} has two classes, {classes[path]} and {words[1]}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {file}: {getattr(error, 'strerror', None) or error}") from error
    return classes


def with_labels(dataset: Dataset, file: Path | None) -> Dataset:
    """The dataset with the labels of the file (None: as it is), and no others.

    The pictures that it names are the labelled ones. A fifth of them, chosen by the hash of their
    names, is for testing. Paths are below the dataset's folder, or absolute. Those that are not
    among the pictures are named in a line. Raises UserError if none is.
    """
    if file is None:
        return dataset
    asked = read_labels(file)
    pools = [images for images in (dataset.train, dataset.test) if images]
    if any(images.paths is None for images in pools):
        raise UserError(f"--labels {file}: names files, so it needs --dataset folder")
    root = Path(nfc(os.path.abspath(dataset.train.root)))
    asked = _of(root, asked, file)
    unknown = sorted(asked.keys() - {nfc(name) for images in pools for name in images.names()})
    if unknown:
        named = ", ".join(unknown[:5]) + ", …" * (len(unknown) > 5)
        problem = f"--labels {file}: {len(unknown)} of its {len(asked)} paths are not among the pictures: {named}"
        if len(unknown) == len(asked):
            raise UserError(f"{problem}; paths count from {root}")
        say(problem)
    classes = tuple(sorted({name for path, name in asked.items() if path not in set(unknown)}))
    labelled, test = (_joined([_labelled(images, asked, classes, kept) for images in pools]) for kept in (False, True))
    lacks = "" if len(test) and len(labelled) else f"--labels {file} names too few pictures to keep some for testing"
    return replace(dataset, labelled=labelled, test=test if len(test) else None, classes=classes, lacks=lacks)


def _of(root: Path, asked: dict[str, str], file: Path) -> dict[str, str]:
    """The classes by names below root. A picture can have an absolute name in the file, too."""
    classes = {}
    for path, name in asked.items():
        if classes.setdefault(_below(root, path), name) != name:
            raise UserError(f"--labels {file}: {path} has two classes, {classes[_below(root, path)]} and {name}")
    return classes


def _below(root: Path, path: str) -> str:
    try:
        return Path(os.path.relpath(root / path, root)).as_posix()
    except ValueError:  # on another drive of Windows
        return path


def _labelled(images: Images, asked: dict[str, str], classes: tuple[str, ...], kept: bool) -> Images:
    """The images that have a label, of the kept fifth or of the others."""
    names = images.names()
    chosen = [i for i, name in enumerate(names) if nfc(name) in asked and (chance(name) < KEPT) == kept]
    labels = torch.tensor([classes.index(asked[nfc(names[i])]) for i in chosen], dtype=torch.long)
    return replace(images.take(torch.tensor(chosen, dtype=torch.long)), labels=labels)


def _joined(pools: list[Images]) -> Images:
    first = pools[0]
    pixels = None if first.pixels is None else torch.cat([images.pixels for images in pools])
    paths = [path for images in pools for path in images.paths]
    return replace(first, pixels=pixels, paths=paths, labels=torch.cat([images.labels for images in pools]))
