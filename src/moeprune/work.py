"""What a long stage keeps on disk until its output has appeared, so that it can go on.

``<out>.<stage>`` stands beside the output. It says in ``run.json`` of which inputs it was made, and
every file in it is written whole and has a checksum, so that a file which a power cut made short,
or a disk changed, is made again and never used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moeprune.errors import OutputError
from moeprune.files import (
    disk_errors,
    fsync,
    is_partial,
    json_bytes,
    load_json,
    locked,
    mend,
    move_into_place,
    refuse_existing,
    remove_partial,
    sha256_bytes,
    sha256_file,
    write_together,
)

FORMAT = "moeprune.work/1"
STAGES = ("calibration", "plan", "writing", "evaluation", "pruning", "recipe", "report")
RUN, SUMS, OUTPUT, _PUBLISHING = "run.json", "sums", "output", "publishing"
_MOST = 1 << 24
_SHOWN = 3
_AGAIN = "run the same command again"
_LOG = logging.getLogger(__name__)


class WorkFolder:
    """A resumable directory that this process has for itself; see ``work_folder``.

    Attributes:
        path: the directory.
        out: the output.
        note: told, in a line, what was found damaged.
    """

    def __init__(self, path: Path, out: Path, note: Callable[[str], None] = _LOG.warning) -> None:
        self.path, self.out, self.note = path, out, note

    @property
    def output(self) -> Path:
        """What ``publish`` makes the output; files in it are kept as ``output/name``, or not."""
        return self.path / OUTPUT

    @property
    def published(self) -> bool:
        """Whether the run was cut after its output had appeared, so that nothing is to be done."""
        return self.announced and not self.output.exists() and self.out.is_dir()

    @property
    def announced(self) -> bool:
        """Whether the output was about to appear, or did, when the run was cut."""
        return (self.path / _PUBLISHING).exists()

    def announce(self) -> None:
        """Note that the output is about to appear, and that nothing is in its way."""
        write_together({self.path / _PUBLISHING: b""}, force=True)

    def retract(self) -> None:
        """The output is not about to appear after all: more has to be done before."""
        (self.path / _PUBLISHING).unlink(missing_ok=True)

    def clean_output(self) -> Path:
        """Make ``output`` a directory with kept files and nothing else; returns it."""
        self.output.mkdir(exist_ok=True)
        kept = {self.path / name for name in self.names()}
        for entry in self.output.rglob("*"):
            if entry not in kept and not entry.is_dir():
                entry.unlink()
        return self.output

    def publish(self, force: bool = False) -> None:
        """Make ``output`` the output of the run; see ``move_into_place``."""
        self.announce()
        move_into_place(self.output, self.out, force)

    def names(self) -> list[str]:
        """The names of the files that were kept, sorted; whether they are whole is not checked."""
        sums = self.path / SUMS
        found = (file.relative_to(sums).as_posix() for file in sums.rglob("*.json"))
        return sorted(name.removesuffix(".json") for name in found if not is_partial(Path(name)))

    def find(self, name: str) -> Path | None:
        """The kept file of that name if every byte of it is as it was written, else None.

        A file that is cut, changed or was never finished is removed; of the former two there is a
        note. Reads the whole file.
        """
        file, record = self.path / name, self._record(name)
        try:
            found = load_json(record, _MOST)
            whole = found["bytes"] == file.stat().st_size and found["sha256"] == sha256_file(file)
        except FileNotFoundError:
            whole = False
            if not record.exists():  # it was not kept, perhaps begun
                self.remove(name)
                return None
        except (OSError, ValueError, TypeError, KeyError):
            whole = False
        if whole:
            return file
        self.note(f"{file} is damaged, and is made again")
        self.remove(name)
        return None

    def read(self, name: str) -> bytes | None:
        """The content of a kept file, as ``find`` finds it."""
        file = self.find(name)
        return None if file is None else file.read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Keep ``content`` as a file; it is on the disk, whole, when this returns."""
        with self.new_file(name) as part:
            part.write_bytes(content)

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """A temporary file to write; it is kept as ``name`` when the block succeeds.

        Args:
            name: with slashes for directories within this one.
        """
        part = self.temporary(name)
        try:
            yield part
            self.keep(name, part)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def temporary(self, name: str) -> Path:
        """A new empty file beside where ``name`` will stand, to be given to ``keep``."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".partial", dir=file.parent)
        os.close(handle)
        os.chmod(part, 0o644)
        return Path(part)

    def keep(self, name: str, part: Path, sha256: str | None = None) -> None:
        """Keep a temporary file as ``name``, replacing an older one.

        Args:
            name: as in ``new_file``.
            part: of ``temporary``.
            sha256: its checksum, if that was taken while it was written.
        """
        file, record = self.path / name, self._record(name)
        fsync(part)
        size, checksum = part.stat().st_size, sha256 or sha256_file(part)
        record.unlink(missing_ok=True)  # killed between the two: not kept, and not damaged
        os.replace(part, file)
        fsync(file.parent)
        told = json_bytes({"bytes": size, "sha256": checksum})
        write_together({record: told}, force=True)

    def checksum(self, name: str) -> str | None:
        """The SHA-256 that was recorded for a kept file; the file itself is not read."""
        try:
            found = load_json(self._record(name), _MOST)["sha256"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return found if isinstance(found, str) else None

    def remove(self, name: str) -> None:
        """Forget a kept file."""
        self._record(name).unlink(missing_ok=True)
        (self.path / name).unlink(missing_ok=True)

    def forget(self) -> None:
        """Forget all kept files, so that the folder goes if an error ends the run."""
        for name in self.names():
            self.remove(name)

    def _record(self, name: str) -> Path:
        return self.path / SUMS / f"{name}.json"


def refuse_finished(
    out: Path,
    *stages: str,
    force: bool = False,
    refuse: Callable[[Path, bool], None] = refuse_existing,
) -> None:
    """``refuse``, but for the rest of a run that was cut just after its output appeared.

    To be called first; inside ``work_folder`` then follows ``published``, or ``refuse``.
    """
    if not all(folder_of(out, stage).is_dir() for stage in stages):
        refuse(out, force)


def folder_of(out: Path, stage: str) -> Path:
    """Where the work folder of a stage stands, or would."""
    return out.parent / f"{out.name}.{stage}"


@contextmanager
def work_folder(
    out: Path,
    stage: str,
    identity: Mapping[str, Any],
    force: bool = False,
    note: Callable[[str], None] = _LOG.warning,
    afresh: str = "start afresh with --force",
) -> Iterator[WorkFolder]:
    """The directory ``<out>.<stage>``: a new one, or the one in which such a run was interrupted.

    It is removed when the block succeeds, that is after the output has appeared. After an error or
    an interruption it stays if anything was kept in it.

    Args:
        out: the output.
        stage: one of ``STAGES``.
        identity: all that decides a byte of the output, by name: fingerprints, options, versions.
        force: whether a directory of another identity may be thrown away.
        note: told, in a line, what was found damaged, and what is kept after an error.
        afresh: what else to do if it is of another identity, in words.

    Raises:
        OutputError: another process works in it, or it was made from other inputs; the message
            says which. Also for any error of the disk inside the block.
    """
    path = folder_of(out, stage)
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    before = path.is_dir()
    if not before and (path.exists() or path.is_symlink()):
        raise OutputError(f"{path} is in the way: what is kept until {out} is made stands there")
    if before and not _ours(path):
        raise OutputError(
            f"{path} is in the way, and does not look like ours", "remove it yourself"
        )
    folder = WorkFolder(path, out, note)
    try:
        with locked(path):
            mend(out)  # an old output that was replaced, and not yet deleted
            _enter(folder, stage, json.loads(json_bytes(dict(identity))), force, afresh)
            with _told(folder), disk_errors(out):
                yield folder
            _delete(path)
    except BaseException:
        for parent in (path, *missing):
            with suppress(OSError):
                parent.rmdir()
        raise


def _ours(path: Path) -> bool:
    """Whether a directory is a work folder, or one whose making was interrupted."""
    return (path / RUN).is_file() or all(
        entry.name in (".lock", _PUBLISHING) or is_partial(entry) for entry in path.iterdir()
    )


def _enter(
    folder: WorkFolder, stage: str, identity: dict[str, Any], force: bool, afresh: str
) -> None:
    """Take what is there if it is of the same inputs, or make it so."""
    file = folder.path / RUN
    if file.is_file():
        before = _identity(file, stage)
        if before is None:
            folder.note(f"{file} is damaged: {folder.path} begins anew")
        elif differences := _differences(before, identity):
            if not force:
                raise OutputError(
                    f"{folder.path} was begun with other inputs: {differences}",
                    f"run it as it was begun, or {afresh}",
                )
        else:
            _drop_partial(folder.path)
            return
    # killed meanwhile: it is still known whose this is, and no output was about to appear
    (folder.path / _PUBLISHING).unlink(missing_ok=True)
    _clear(folder.path, spared=(".lock", RUN))
    told = {"format": FORMAT, "stage": stage, "identity": identity}
    told["sha256"] = sha256_bytes(json_bytes(identity))
    try:
        write_together({file: json_bytes(told)}, force=True)
    except BaseException:
        _clear(folder.path)  # it may stand there already: nothing was begun
        raise


def _identity(file: Path, stage: str) -> dict[str, Any] | None:
    """What ``run.json`` says of the inputs; None if it is damaged."""
    try:
        found = load_json(file, _MOST)
        told = found["identity"]
        whole = found["sha256"] == sha256_bytes(json_bytes(told))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    ours = found.get("format") == FORMAT and found.get("stage") == stage
    return told if whole and ours and isinstance(told, dict) else None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words; empty if nothing does."""
    names = [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]
    told = [f"{n} was {_short(before.get(n))}, now {_short(now.get(n))}" for n in names[:_SHOWN]]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "; ".join(told + more)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _delete(path: Path) -> None:
    """Remove a work folder; what says whose it is goes last, for whoever is killed meanwhile."""
    with suppress(OSError):
        _clear(path, spared=(".lock", RUN, _PUBLISHING))
    shutil.rmtree(path, ignore_errors=True)


def drop_finished(out: Path, stage: str) -> None:
    """Remove what a run left that was killed while it removed it."""
    path = folder_of(out, stage)
    with suppress(OSError):
        path.rmdir()  # if it is empty
    if (path / _PUBLISHING).exists() and out.exists():
        with locked(path):
            _delete(path)


def _clear(path: Path, spared: tuple[str, ...] = (".lock",)) -> None:
    for entry in sorted(path.iterdir()):
        if entry.name in spared:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def _told(folder: WorkFolder) -> Iterator[None]:
    """After an error: drop what is not finished, and say what is kept and how to go on."""
    try:
        yield
    except BaseException as error:
        _drop_partial(folder.path)
        if not folder.names():
            _delete(folder.path)
            raise
        if any(map(is_partial, folder.path.absolute().parents)):
            raise  # all of that goes
        if isinstance(error, OutputError):
            if error.hint.endswith(_AGAIN):
                raise  # of a folder in this one
            problem = error.problem.removesuffix("; nothing was kept")
            hint = "" if error.hint == "nothing was kept" else f"{error.hint}; "
            kept = f"what is done is kept in {folder.path}: {_AGAIN}"
            raise OutputError(problem, hint + kept) from error
        folder.note(f"what is done is kept in {folder.path}: the same command goes on from it")
        raise


def _drop_partial(path: Path) -> None:
    for place in (path, *sorted(path.rglob("*"))):
        if place.is_dir():  # and was not in one that has just gone
            remove_partial(place)
