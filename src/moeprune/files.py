"""Outputs appear whole or not at all: write under a temporary name, fsync, rename.

Also the hashes that tie statistics, plans and checkpoints together.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from moeprune.errors import MoepruneError, OutputError

_CHUNK = 1 << 22
_PLAN_WEIGHTS = re.compile(r"layer-\d{5}\.safetensors")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def refuse_existing(path: Path, force: bool, directory: bool = True) -> None:
    """Raise ``OutputError`` if ``path`` exists and ``force`` was not given, or cannot be made.

    ``force`` replaces a file by a file and a directory by a directory. A directory is only ever
    replaced as a whole, so one that holds something else than an output of ours is refused.

    Args:
        path: the output.
        force: whether an existing output may be replaced.
        directory: whether the output is a directory, and not a file.
    """
    if not path.exists() and not path.is_symlink():
        _refuse_parent(path)
        return
    if not force:
        raise OutputError(f"output exists: {path}", "choose another --out, or add --force")
    if directory and path.is_file():
        raise OutputError(
            f"{path} is a file, and the output is a directory",
            "remove it yourself, or choose another --out",
        )
    if not directory and path.is_dir():
        raise OutputError(f"{path} is a directory, and the output is a file", "name a file in it")
    if path.is_dir() and any(path.iterdir()) and not _looks_like_ours(path):
        raise OutputError(
            f"--force would delete {path}, which does not look like an output of moeprune",
            "remove it yourself, or choose another --out",
        )


def _refuse_parent(path: Path) -> None:
    """Raise ``OutputError`` if ``path`` could not be made, so that it shows before the work."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise OutputError(f"cannot write {path}: {parent} is a file", "choose another --out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {parent}")


def _looks_like_ours(path: Path) -> bool:
    names = ("moeprune.json", "manifest.json", "demo.json", "compare.json", "audit.json")
    if any((path / name).is_file() for name in names):
        return True
    return all(_PLAN_WEIGHTS.fullmatch(file.name) for file in path.iterdir())


def fsync(path: Path) -> None:
    """Have a file or directory on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot sync a directory
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def leave_cache(handle: int, start: int, size: int) -> None:
    """Have the system write bytes of an open file, and forget them; not all can (macOS cannot)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, size, os.POSIX_FADV_DONTNEED)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk refuses while ``path`` is made into an ``OutputError``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path) from error
        culprit = f" ({error.filename})" if error.filename else ""
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}{culprit}", "nothing was kept"
        ) from error
    except MoepruneError:
        raise
    except Exception as error:
        # safetensors reports a failed write as its own exception type that only carries text
        if "os error 28" in str(error) or "No space left" in str(error):
            raise _disk_full(path) from error
        raise


def _disk_full(path: Path) -> OutputError:
    return OutputError(
        f"disk full while writing {path}; nothing was kept",
        "free some space or choose another --out",
    )


@contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Make the missing parents of ``path``; if the block fails they are removed again."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def new_directory(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` when the block succeeds.

    Whatever goes wrong inside, ``path`` is as it was before and the temporary directory is gone.
    """
    mend(path)
    refuse_existing(path, force)
    with disk_errors(path), _parents_of(path), ExitStack() as held:
        work = _temporary(path, ".partial", held, directory=True)
        try:
            yield work
            move_into_place(work, path, force)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def move_into_place(work: Path, path: Path, force: bool = False) -> None:
    """Make a directory that is finished the output ``path``; both are on one disk.

    Raises:
        OutputError: ``path`` has appeared while ``work`` was made, and ``force`` was not given.
    """
    for entry in (*sorted(work.rglob("*")), work):
        fsync(entry)
    os.chmod(work, 0o755)
    mend(path)
    refuse_existing(path, force)  # hours may have passed
    _replace(work, path)


def _replace(work: Path, path: Path) -> None:
    """Rename ``work`` to ``path``; an old ``path`` is moved aside first and deleted last."""
    with ExitStack() as held:
        old: Path | None = None
        if path.exists() or path.is_symlink():
            old = _temporary(path, ".old", held, directory=True)
            os.rename(path, old / "content")
        try:
            os.rename(work, path)
        except OSError:
            if old is not None:
                os.rename(old / "content", path)
                old.rmdir()
            raise
        fsync(path.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def write_together(contents: Mapping[Path, bytes], force: bool = False) -> None:
    """Write files of one directory: no old one is touched before all new ones are on the disk."""
    for path in contents:
        mend(path)
        refuse_existing(path, force, directory=False)
    written: dict[Path, Path] = {}
    path = next(iter(contents))
    with disk_errors(path), _parents_of(path), ExitStack() as held:
        try:
            for path, content in contents.items():
                written[path] = _temporary(path, ".partial", held, directory=False)
                with written[path].open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(written[path], 0o644)
            for path, name in written.items():
                os.replace(name, path)
        except BaseException:
            for name in written.values():
                name.unlink(missing_ok=True)
            raise
        fsync(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a directory, which is made if it is missing, for oneself until the block ends.

    The kernel frees the lock when its process dies, however it dies.

    Raises:
        OutputError: another process has it.
    """
    file = folder / ".lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if not _claim(handle):
            os.close(handle)
            raise OutputError(
                f"another process works in {folder}", "wait for it, or choose another --out"
            )
        if _is(handle, file):
            break
        os.close(handle)  # its last owner has just removed it
    try:
        yield
    finally:
        if _is(handle, file):
            file.unlink()  # while it is held: nobody can lock what is about to go
        os.close(handle)


def _claim(handle: int) -> bool:
    """Lock an open file or directory; False if another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some file systems of clusters have no locks
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise
    return True


def _is(handle: int, path: Path) -> bool:
    """Whether an open file is the one that stands at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _temporary(path: Path, suffix: str, held: ExitStack, directory: bool) -> Path:
    """A new file or directory beside ``path`` that ``mend`` spares until ``held`` is closed."""
    prefix = f".{path.name}."
    while True:
        if directory:
            name = tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=path.parent)
            handle = os.open(name, os.O_RDONLY)
        else:
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        if _claim(handle) and _is(handle, Path(name)):
            held.callback(os.close, handle)
            return Path(name)
        os.close(handle)  # another process took it for abandoned, and sweeps it away


def mend(path: Path) -> None:
    """Mend what processes that were killed left beside ``path`` while they made it.

    An old output that was moved aside comes back if no new one has taken its place.
    """
    for suffix in (".old", ".partial"):
        # not those of path.other, whose names begin with this one's
        ours = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\{suffix}")
        for left in sorted(path.parent.glob(f".{glob.escape(path.name)}.*{suffix}")):
            if not ours.fullmatch(left.name):
                continue
            with suppress(OSError):
                handle = os.open(left, os.O_RDONLY)
                try:
                    if not _claim(handle):
                        continue
                    if os.path.lexists(left / "content") and not path.exists():
                        os.rename(left / "content", path)
                    _remove(left)
                finally:
                    os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether ``path`` is what a process that was killed left of a file or directory of ours."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def remove_partial(folder: Path) -> None:
    """Take away what killed processes left in ``folder``; only for whoever has it to himself."""
    for path in filter(is_partial, sorted(folder.iterdir())):
        _remove(path)


def json_bytes(value: Any) -> bytes:
    """``value`` as UTF-8 JSON: same value, same bytes. NaN and infinity are refused."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_json(content: bytes, finite: bool = True) -> Any:
    """The value that ``content`` spells, read as strictly as it is written here.

    Args:
        content: UTF-8 without a byte order mark.
        finite: whether NaN and infinity, which Python reads and JSON has not, are refused.

    Raises:
        ValueError: it is not JSON, names something twice, holds halves of characters, or is nested
            too deeply; the message says which.
    """
    strictly: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    text = content.decode()
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition, **strictly)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def is_plain_name(name: str) -> bool:
    """Whether ``name`` can be a file's in a given directory, and of nothing anywhere else."""
    return (
        name.isprintable()
        and Path(name).name == name not in ("", ".", "..")
        and len(name.encode()) < 256
    )


def load_json(file: Path, most: int, finite: bool = True) -> Any:
    """``parse_json`` of a file of at most ``most`` bytes.

    What is read from JSON takes up to thirty times its size in memory, hence the limit.

    Raises:
        ValueError: see ``parse_json``, or the file is larger.
        OSError: it cannot be read.
    """
    with file.open("rb") as handle:
        content = handle.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    return parse_json(content, finite)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def sha256_bytes(content: bytes) -> str:
    """The SHA-256 of ``content``, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
