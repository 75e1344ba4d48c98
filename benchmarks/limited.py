"""Runs a command under a hard memory limit and measures what it took.

Three ways, the first that works: a group of the memory controller of version 1 or 2 of Linux'
control groups, made in the current one (as root, as in most containers), and ``systemd-run --user
--scope -p MemoryMax=``. An address-space limit (``ulimit -v``) is none of them: mapped files count
in it although their pages can be dropped at any time.

Pages of files that were read count against the limit as well. The kernel drops them when they are
in the way, so a group that has read more than its limit is always full: ``peak_of_group`` says
nothing about what was needed. Here ``anonymous`` is memory that cannot be dropped (the figure to
judge by), ``resident`` is what ``top`` shows, mapped pages of files included.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_STEP = 0.02


class NoLimitError(Exception):
    """There is no way to limit memory here."""


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        wall: seconds.
        cpu: seconds of all threads.
        anonymous: largest sum of memory of its processes that is no file's, bytes, sampled.
        resident: largest resident size of its processes, mapped files included, bytes, sampled.
        peak_of_group: largest usage of the group, file cache included, bytes; None if not known.
        read: bytes that came from the disk.
        written: bytes that were written.
        how: what held the limit.
        code: exit code; -9 is what a process gets that needs more than the limit.
        output: its stdout.
    """

    wall: float
    cpu: float
    anonymous: int
    resident: int
    peak_of_group: int | None
    read: int
    written: int
    how: str
    code: int
    output: str


@dataclass(frozen=True)
class _Group:
    """A control group; ``folder`` is None where systemd makes it."""

    how: str
    folder: Path | None
    prefix: tuple[str, ...] = ()
    peak: str = ""

    def peak_of_group(self) -> int | None:
        try:
            return int((self.folder / self.peak).read_text()) if self.folder is not None else None
        except OSError:
            return None


@contextmanager
def _group(limit: int) -> Iterator[_Group]:
    name = f"moeprune-{os.getpid()}"
    version_1 = _ROOT / "memory" / name
    version_2 = _ROOT / _own_group() / name
    for folder, how, files, peak in (
        (
            version_1,
            "cgroup v1",
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
            "memory.max_usage_in_bytes",
        ),
        (version_2, "cgroup v2", ("memory.max", "memory.swap.max"), "memory.peak"),
    ):
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            try:
                if not (folder / files[0]).is_file():
                    continue
                (folder / files[0]).write_text(str(limit))
                if (folder / files[1]).is_file():  # no swap
                    (folder / files[1]).write_text("0" if "swap" in files[1] else str(limit))
            except OSError:
                continue
            join = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs"))
            yield _Group(how, folder, join, peak)
            return
        finally:
            folder.rmdir()
    if shutil.which("systemd-run"):
        prefix = ("systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={limit}")
        works = subprocess.run(
            [*prefix, "-p", "MemorySwapMax=0", "true"], check=False, capture_output=True
        )
        if works.returncode == 0:
            yield _Group("systemd-run", None, (*prefix, "-p", "MemorySwapMax=0"))
            return
    raise NoLimitError("no control group can be made here, and systemd-run --user does not work")


def _own_group() -> str:
    """The path of this process's group in version 2, below the root."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:].strip("/")
    return ""


def forget_files(folder: Path) -> None:
    """Drop the cached pages of a folder's files, so that they are read from the disk again."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)  # pages that are not yet written stay
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def run(command: Sequence[str], limit: int) -> Cost:
    """Run ``command`` with at most ``limit`` bytes of memory.

    Raises:
        NoLimitError: there is no way to limit memory here.
    """
    with _group(limit) as group:
        start = time.perf_counter()
        process = subprocess.Popen([*group.prefix, *command], stdout=subprocess.PIPE, text=True)
        watch = _Watch(process.pid)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        watch.stop()
        return Cost(
            wall,
            usage.ru_utime + usage.ru_stime,
            watch.anonymous,
            watch.resident,
            group.peak_of_group(),
            usage.ru_inblock * 512,
            usage.ru_oublock * 512,
            group.how,
            os.waitstatus_to_exitcode(status),
            output,
        )


class _Watch(threading.Thread):
    """Samples the memory of a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._stopped = pid, threading.Event()
        self.anonymous = self.resident = 0
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(_STEP):
            found = [_memory(pid) for pid in _family(self._pid)]
            self.anonymous = max(self.anonymous, sum(anonymous for anonymous, _ in found))
            self.resident = max(self.resident, sum(resident for _, resident in found))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found.extend(int(child) for child in children.read_text().split())
            except OSError:
                continue  # it ended
    return found


def _memory(pid: int) -> tuple[int, int]:
    """(anonymous, resident) bytes."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    kib = [int(fields.get(key, "0").split()[0]) for key in ("RssAnon", "VmRSS")]
    return kib[0] * 1024, kib[1] * 1024
