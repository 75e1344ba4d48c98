"""Outputs appear whole or not at all: write under a temporary name, fsync, rename.

Also the hashes that tie statistics, plans and checkpoints together.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeprune.errors import MoepruneError, OutputError

_CHUNK = 1 << 22


def refuse_existing(path: Path, force: bool) -> None:
    """Raise ``OutputError`` if ``path`` exists and ``force`` was not given.

    A directory is only ever replaced as a whole, so ``--force`` on one that holds something else
    than our outputs (no ``config.json``, ``plan.json`` or ``manifest.json``) is refused as well.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise OutputError(f"output exists: {path}", "choose another --out, or add --force")
    if path.is_dir() and any(path.iterdir()) and not _looks_like_ours(path):
        raise OutputError(
            f"--force would delete {path}, which does not look like an output of moeprune",
            "remove it yourself, or choose another --out",
        )


def _looks_like_ours(path: Path) -> bool:
    return any((path / name).is_file() for name in ("moeprune.json", "manifest.json", "demo.json"))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot sync a directory
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"disk full while writing {path}; nothing was kept",
                "free some space or choose another --out",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        raise
    except MoepruneError:
        raise
    except Exception as error:
        # safetensors reports a failed write as its own exception type that only carries text
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OutputError(
                f"disk full while writing {path}; nothing was kept",
                "free some space or choose another --out",
            ) from error
        raise


@contextmanager
def new_directory(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` when the block succeeds.

    Whatever goes wrong inside, ``path`` is as it was before and the temporary directory is gone.
    """
    refuse_existing(path, force)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            yield work
            for entry in sorted(work.rglob("*")):
                _fsync(entry)
            os.chmod(work, 0o755)
            _replace(work, path)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _replace(work: Path, path: Path) -> None:
    """Rename ``work`` to ``path``; an old ``path`` is moved aside first and deleted last."""
    old: Path | None = None
    if path.exists() or path.is_symlink():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.rename(path, old / "content")
    try:
        os.rename(work, path)
    except OSError:
        if old is not None:
            os.rename(old / "content", path)
            old.rmdir()
        raise
    _fsync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_atomic(path: Path, content: bytes, force: bool = False) -> None:
    """Write ``content`` to ``path`` through a temporary file in the same directory."""
    refuse_existing(path, force)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def json_bytes(value: Any) -> bytes:
    """``value`` as UTF-8 JSON: same value, same bytes. NaN and infinity are refused."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


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
