"""Where results go: an output is checked before the work starts, and replaced only by a whole one.

One check (`output`), one writer (`replacing`) and one lock (`locked`) serve every script.
"""

import errno
import os
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from plumbing.command_line import UserError

try:
    import fcntl
except ImportError:  # Windows: without locks
    fcntl = None

RUN_FILES = {"last.pt", "config.json", "metrics.jsonl", "progress.png"}
WAITS = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between attempts to replace a file
HELD: dict[str, int] = {}  # the open folders whose locks this process holds


def output(place: str | Path) -> Path:
    """The `type` of an option that names a file to write: all that can be checked before the work.

    Raises UserError for what is no regular file, cannot be written or belongs to a run.
    """
    path, problem = Path(os.path.realpath(place)), ""
    try:
        if path.is_dir():
            problem = "a folder; name a file in it"
        elif not path.parent.is_dir():
            problem = f"the folder {Path(place).parent} does not exist; make it first"
        elif path.is_symlink() or (path.exists() and not path.is_file()):
            problem = "a device, a pipe or a link in a circle; name a file"
        elif path.name in RUN_FILES and (path.parent / "last.pt").exists():
            problem = "belongs to a run, which needs it; name another file"
        elif path.exists() and any(os.path.samestat(path.stat(), os.fstat(number)) for number in (1, 2)):
            problem = "this program prints there already; name another file"
        else:
            _try(path)
            if path.exists():
                open(path, "r+").close()
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    if problem:
        raise UserError(f"{place}: {problem}")
    return Path(place)


def check_folder(folder: Path) -> None:
    """Raises UserError if a run's folder cannot be made or written: known before the work."""
    try:
        above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        _try(above / "run")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error.strerror})") from error


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _try(path: Path) -> None:
    """Raises OSError if no file can be made next to path."""
    _beside(path).touch()
    _beside(path).unlink()


def _replace(beside: Path, path: Path) -> None:
    """Put a file in the place of another. Windows refuses while a reader holds that one."""
    for seconds in WAITS:
        with suppress(PermissionError):
            beside.replace(path)
            return
        time.sleep(seconds)
    beside.replace(path)


@contextmanager
def replacing(path: Path, name: str):
    """Yields a place next to `path` to write to, which replaces `path` only if all went well.

    So a full disk or an interruption leaves the old file whole. Links are followed. Raises
    UserError that starts with `name`.
    """
    path = Path(os.path.realpath(path))
    beside = _beside(path)
    try:
        yield beside
        _replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        full = getattr(error, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason, kept = str(error).splitlines()[0], "; what was there before is untouched" if path.is_file() else ""
        asked = ": is the disk full?" if full else ""
        raise UserError(f"{name} {path} cannot be written ({reason}){asked}{kept}") from error
    finally:
        with suppress(OSError):  # a read-only folder: the first error counts
            beside.unlink(missing_ok=True)


def save_tensors(content, path: Path, name: str) -> None:
    with replacing(path, name) as place, open(place, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def save_text(text: str, path: Path, name: str) -> None:
    with replacing(path, name) as place:
        place.write_text(text)


def check_zip(path: Path) -> None:
    """Raises ValueError for a file of torch.save that is damaged: torch does not check the sums."""
    with zipfile.ZipFile(path) as file:
        if any(item.compress_type != zipfile.ZIP_STORED for item in file.infolist()) or file.testzip():
            raise ValueError("its sums do not match")


@contextmanager
def locked(folder: Path, busy: str = ""):
    """Hold the lock of a folder, which is made if need be; it ends with the process too.

    Waits while another process holds it, or raises UserError(busy). A lock that this process holds
    already is no obstacle.
    """
    known = os.path.realpath(folder)
    own = known not in HELD
    folder.mkdir(parents=True, exist_ok=True)
    while fcntl and known not in HELD:
        file = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            os.close(file)
            raise UserError(busy) from None
        except OSError:  # a file system without locks
            pass
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.samestat(folder.stat(), os.fstat(file)):
            HELD[known] = file
        else:  # the folder was removed while this process waited: this is a new one
            os.close(file)
    try:
        yield
    finally:
        if own and fcntl:
            os.close(HELD.pop(known))


if fcntl:  # a worker that outlives its parent must not keep its locks
    os.register_at_fork(after_in_child=lambda: [os.close(HELD.pop(known)) for known in list(HELD)])
