"""Decoded images kept as files in --cache-dir, which the next start maps into memory.

A file's name is a hash of the paths, sizes, times of change and inodes of all images in it. Files
that cannot be read are not part of what is kept: the next start tries them again.
"""

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import torch

from plumbing.command_line import UserError
from plumbing.outputs import check_zip, replacing

KEPT = re.compile(r"[0-9a-f]{24}(\.pt|(\.pt)?\.\d+\.part)")


def place_of(paths: list[Path], how, folder: str) -> Path:
    """The file of these images, decoded as `how` says (anything with a repr)."""
    known = hashlib.blake2s(repr(how).encode(), digest_size=12)
    for path in paths:
        try:
            about = os.stat(path)
            state = about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino
        except OSError:  # a link that leads nowhere is an image that cannot be read
            state = ()
        known.update(f"\0{path.absolute()}\0{state}".encode(errors="surrogateescape"))
    return Path(folder) / f"{known.hexdigest()}.pt"


def kept(file: Path) -> dict | None:
    """What `keep` wrote, mapped into memory and read as it is used; None if it is not whole."""
    try:
        check_zip(file)
        content = torch.load(file, mmap=True, weights_only=True)
    except Exception:  # torch's readers raise a dozen kinds for a file that is not what they expect
        return None
    with suppress(OSError):
        os.utime(file)  # used now: `trim` removes what was not used for longest
    return content


def keep(file: Path, content: dict, most: float) -> str:
    """Write content there, and remove older files beyond `most` bytes in the folder.

    Returns why it could not be kept: a full disk is no reason not to train.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, "--cache-dir:") as place:
            torch.save(content, place)
    except (OSError, UserError) as error:
        return str(error)
    trim(file.parent, most)
    return ""


def trim(folder: Path, most: float, day: float = 86_400) -> None:
    """Keep the files used last, up to `most` bytes but at least two (training and test images).

    What a process that died left half-written goes after a day. Other files are left alone.
    """
    files = []
    for path in folder.iterdir():
        with suppress(OSError):
            if KEPT.fullmatch(path.name):
                about = path.stat()
                files.append((about.st_mtime, about.st_size, path))
    total, whole = 0, 0
    for used, size, path in sorted(files, reverse=True):
        half = path.suffix == ".part"
        total, whole = total + size * (not half), whole + (not half)
        if used < time.time() - day if half else (total > most and whole > 2):
            with suppress(OSError):  # another process may use or remove it
                path.unlink()
