"""What a run needs to go on exactly where it was, on disk, whole or not at all.

Nothing is pickled: values stand in safetensors files, numbers in JSON. Sequences and random numbers
are functions of the seed and the step and need no state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeprune.errors import MoepruneError, OutputError
from moeprune.files import (
    fsync,
    json_bytes,
    load_json,
    locked,
    mend,
    new_directory,
    sha256_bytes,
    sha256_file,
)

FORMAT = "moeprune.recovery/1"
SUMS = "sha256"
_MOST = 1 << 26
_SEAL = "numbers_sha256"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class DamagedState(MoepruneError):
    """What a run kept was cut or changed."""


class StateFolder:
    """The directory ``<out>.recovery`` of a run: its state, its best weights and its log."""

    def __init__(self, out: Path) -> None:
        self.path = out.parent / f"{out.name}.recovery"

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.path / "log.jsonl"

    def exists(self) -> bool:
        """Whether a run has begun."""
        return self.path.is_dir()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the directory for this process; it goes if nothing is in it in the end.

        Raises:
            OutputError: another process has it.
        """
        try:
            with locked(self.path):
                for name in ("state", "best"):
                    mend(self.path / name)  # a state that was moved aside is one
                yield
        finally:
            with suppress(OSError):
                self.path.rmdir()

    def reached(self) -> str:
        """How far the run came, in words."""
        progress = (self.numbers() or {}).get("progress") or {}  # a run layer by layer has none
        return f"step {progress.get('step', 0)}"

    def clear(self) -> None:
        """Forget what was trained, not what is beside it."""
        for name in ("state", "best"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def delete(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.path, ignore_errors=True)

    def save(
        self,
        numbers: Mapping[str, Any],
        weights: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """Save the state, replacing the last one only when this one is whole.

        Raises:
            OutputError: see ``writing``.
        """
        with self.writing():
            if self.log.is_file():
                fsync(self.log)  # a state is never ahead of its log
        values = {f"weight.{name}": _plain(p) for name, p in weights.items()}
        for name, p in weights.items():
            for key in _MOMENTS:
                if p in optimiser.state:
                    values[f"{key}.{name}"] = _plain(optimiser.state[p][key])
        self._write("state", numbers, values)

    def save_best(self, numbers: Mapping[str, Any], weights: Mapping[str, nn.Parameter]) -> None:
        """Save the weights that measured best."""
        self._write("best", numbers, {f"weight.{name}": _plain(p) for name, p in weights.items()})

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A block that writes into this directory, or what is made of it.

        Raises:
            OutputError: the disk is full, or cannot be written; the last state is still there.
        """
        try:
            yield
        except (OSError, OutputError) as error:
            problem = getattr(error, "problem", f"cannot write {self.path}: {error}")
            saved = self.numbers()
            kept = "no state was saved before"
            if saved is not None:
                kept = f"the state of {self.reached()} is kept in {self.path}"
            raise OutputError(
                f"{problem.removesuffix('; nothing was kept')}; {kept}",
                "make room, then go on with --resume",
            ) from error

    def _write(self, name: str, numbers: Mapping[str, Any], values: dict[str, Tensor]) -> None:
        with self.writing(), new_directory(self.path / name, force=True) as work:
            save_file(values, work / "values.safetensors")
            told = {"format": FORMAT, **numbers, SUMS: sha256_file(work / "values.safetensors")}
            (work / "manifest.json").write_bytes(sealed(told))

    def numbers(self, name: str = "state") -> dict[str, Any] | None:
        """What was saved beside the values; None if nothing was.

        Raises:
            MoepruneError: it is damaged.
        """
        file = self.path / name / "manifest.json"
        if not file.is_file():
            return None
        found = self._unsealed(file)
        if found.get("format") != FORMAT:
            raise self._damaged(file)
        return found

    def _unsealed(self, file: Path) -> dict[str, Any]:
        """What ``sealed`` wrote.

        Raises:
            MoepruneError: it is damaged.
        """
        try:
            found = load_json(file, _MOST)
        except (ValueError, OSError) as error:
            raise self._damaged(file) from error
        if not isinstance(found, dict):
            raise self._damaged(file)
        if found.pop(_SEAL, None) not in (None, sha256_bytes(json_bytes(found))):
            raise self._damaged(file)
        return found

    def restore(
        self,
        name: str,
        weights: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer | None = None,
    ) -> None:
        """Put saved weights, and the optimiser's moments, back.

        Raises:
            MoepruneError: they are damaged, or of another run.
        """
        file = self.path / name / "values.safetensors"
        told = (self.numbers(name) or {}).get(SUMS)
        try:
            if told not in (None, sha256_file(file)):
                raise self._damaged(file)
            values = load_file(file)
            with torch.no_grad():
                for key, p in weights.items():
                    p.copy_(values[f"weight.{key}"])
                    if optimiser is not None and f"exp_avg.{key}" in values:
                        optimiser.state[p] = {
                            m: values[f"{m}.{key}"].to("cpu" if m == "step" else p.device)
                            for m in _MOMENTS
                        }
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise self._damaged(file) from error

    def _damaged(self, file: Path) -> DamagedState:
        return DamagedState(f"{file} is damaged, or of another run", "begin again with --force")

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def cut_log(self, step: int) -> list[dict[str, Any]]:
        """Drop what a run noted after the step from which it goes on; returns what stays."""
        if not self.log.is_file():
            return []
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while it wrote
            if entry.get("step", 0) <= step:
                kept.append(entry)
        part = self.log.with_suffix(".partial")
        with self.writing():
            part.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
            fsync(part)
            os.replace(part, self.log)
        return kept


def sealed(told: Mapping[str, Any]) -> bytes:
    """JSON with its own checksum in it: numbers decide what comes as much as values do."""
    return json_bytes({**told, _SEAL: sha256_bytes(json_bytes(dict(told)))})


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
