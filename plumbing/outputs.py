"""Where results go: an output is checked before the work starts, and replaced only by a whole one.

One check (`checked`), one writer (`replacing`) and one lock (`locked`) serve every script.
"""

import errno
import os
import tempfile
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
HELD: dict[str, int] = {}  # the open files of the locks that this process holds


def checked(place, name: str, inputs=()) -> Path:
    """The path of an output, checked as well as can be before the work.

    Raises UserError that starts with `name` for what is no regular file, cannot be written, belongs
    to a run or is one of inputs.
    """
    try:
        problem = _problem(Path(os.path.realpath(place)), Path(place).parent, inputs)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    if problem:
        raise UserError(f"{name} {place}: {problem}")
    return Path(place)


def _problem(path: Path, folder: Path, inputs) -> str:
    if path.is_dir():
        return "a folder; name a file in it"
    if not path.parent.is_dir():
        return f"the folder {folder} does not exist; make it first"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return "no regular file (a device, a pipe or a link that leads nowhere); name another"
    if path.name in RUN_FILES and (path.parent / "last.pt").exists():
        return "belongs to a run, which needs it; name another file"
    if any(os.path.realpath(p) == str(path) for p in inputs if isinstance(p, Path) or os.path.exists(p)):
        return "another option names the same file; name another"
    if path.exists():
        if not os.access(path, os.W_OK):
            return "cannot be written (it is read-only)"
        if any(os.path.samestat(path.stat(), os.fstat(number)) for number in (1, 2)):
            return "this program prints there already; name another file"
    _beside(path).exists()  # a name that is too long raises OSError
    tempfile.TemporaryFile(dir=path.parent).close()
    return ""


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".part")


@contextmanager
def locked(path: Path, problem: str = "", folder: bool = False):
    """Hold the lock of a file or folder, which is made if need be; it ends with the process too.

    Waits while another process holds it, or raises UserError(problem). A lock that this process
    holds already is no obstacle.
    """
    known = os.path.realpath(path)
    if known in HELD or fcntl is None:
        yield
        return
    while known not in HELD:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if problem else 0))
        except BlockingIOError:
            os.close(file)
            raise UserError(problem) from None
        except OSError:  # a file system without locks
            pass
        with suppress(FileNotFoundError):  # it may have been renamed or removed while this process waited
            if os.path.samestat(os.stat(path), os.fstat(file)):
                HELD[known] = file
        if known not in HELD:
            os.close(file)
    try:
        yield
    finally:
        os.close(HELD.pop(known))


def _leave_locks_to_the_parent() -> None:
    for file in HELD.values():
        os.close(file)
    HELD.clear()


if hasattr(os, "register_at_fork"):  # a worker that outlives its parent must not keep its locks
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


@contextmanager
def replacing(path: Path, name: str):
    """Yields a place next to `path` to write to, which replaces `path` only if all went well.

    So a full disk or an interruption leaves the old file whole. Links are followed. Another process
    that replaces the same file waits. Raises UserError that starts with `name`.
    """
    path = Path(os.path.realpath(path))
    beside = _beside(path)
    try:
        with locked(beside):
            try:
                yield beside
                beside.replace(path)
            except BaseException:
                with suppress(OSError):  # a read-only folder: the first error counts
                    beside.unlink(missing_ok=True)
                raise
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        full = getattr(error, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason, kept = str(error).splitlines()[0], "; what was there before is untouched" if path.is_file() else ""
        asked = ": is the disk full?" if full else ""
        raise UserError(f"{name} {path} cannot be written ({reason}){asked}{kept}") from error


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
