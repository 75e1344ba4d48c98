"""What every stage is told: which model, which text, where to compute, whom to tell."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moeprune.core.profile import Profile
from moeprune.errors import DataError, MoepruneError, OutputError
from moeprune.files import sha256_bytes, sha256_file
from moeprune.models import data
from moeprune.models.bounds import Limits, check
from moeprune.models.checkpoint import INDEX, OF_THIS_ONE, REPORT_FILES, Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.ranks import ALONE, Ranks

Source = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]
"""Called with (what, steps done, steps in all)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Note = Callable[[str], None]
"""Told, in a line, what a person should know while it happens."""

_POOL = 4
"""A dataset may have no end: sequences are drawn from the first so many times those wanted."""
_LONG = 256  # tokens of a sequence, where a sample is small


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


say: Note = logging.getLogger("moeprune").warning
"""Notes on stderr, unless the program that calls has set up its logging otherwise."""


def unheard(text: str) -> None:
    """Nobody to tell."""


@dataclass(frozen=True)
class Text:
    """What to read, for calibration or evaluation.

    Attributes:
        sources: ``path`` or ``dataset:NAME[:CONFIG][:SPLIT][#FIELD]``, or either after ``name=``;
            none takes the embedded text.
        sequences: how many in all (calibration), or per domain (evaluation).
        length: tokens per sequence; clipped to what the model was built for.
        seed: of the draw.
        mix: weights of domains in the draw, for calibration; 1 where none is given.
    """

    sources: tuple[str, ...] = ()
    sequences: int = 128
    length: int = 2048
    seed: int = 0
    mix: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Compute:
    """Where and how to compute.

    Attributes:
        device: a torch device.
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``.
        workers: batches that compute at once; 0 takes one per core.
        trust_remote_code: run the Python files that a checkpoint brings; never without this.
        ranks: the processes that share the work (``moeprune.models.ranks.joined``).
        memory: bytes that the process is to stay below; None is no limit. Results do not depend
            on it.
        memory_dir: where hidden states go that it has no room for; None takes the system's.
        tell: gets a line on what was given up for it.
        profile: counts where time goes.
    """

    device: str = "cpu"
    dtype: str = "auto"
    workers: int = 0
    trust_remote_code: bool = False
    ranks: Ranks = ALONE
    memory: int | None = None
    memory_dir: Path | None = None
    tell: Callable[[str], None] = field(default=unheard, compare=False, repr=False)
    profile: Profile | None = field(default=None, compare=False, repr=False)

    @property
    def limits(self) -> Limits:
        """What walks are held to."""
        profile = Profile() if self.profile is None else self.profile
        return Limits(self.memory, self.memory_dir, tell=self.tell, profile=profile)

    def open(self, checkpoint: Checkpoint) -> LayeredModel:
        """The model, ready to walk.

        Raises:
            MoepruneError: no such dtype or device.
        """
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise MoepruneError(f"unknown dtype {self.dtype!r}", f"auto, {', '.join(DTYPES)}")
        if self.workers < 0:
            raise MoepruneError(f"--workers must be at least 0 (got {self.workers})")
        check(self.limits)
        model = LayeredModel(checkpoint, DTYPES.get(self.dtype), self.usable_device())
        model.limits = self.limits
        return model

    def usable_device(self) -> torch.device:
        """The device, which has been tried.

        Raises:
            MoepruneError: no such device.
        """
        try:
            device = torch.device(self.ranks.device(self.device))
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise MoepruneError(
                f"device {self.device!r} cannot be used", "use --device cpu"
            ) from error
        return device


def describe_model(model: LayeredModel, name: str) -> dict[str, Any]:
    """The facts of a model that plans and statistics carry."""
    shape = next(iter(model.sites.values())).shape
    return {
        "name": name,
        "model_type": text_config(model.config).model_type,
        "fingerprint": model.checkpoint.fingerprint,
        "layers": len(model.layers),
        "moe_layers": sorted(model.sites),
        "experts": shape.experts,
        "top_k": shape.top_k,
    }


def refuse_source(checkpoint: Checkpoint, out: Path) -> None:
    """Replacing an output must not delete the model that is read."""
    if checkpoint.path.is_relative_to(out.resolve()):
        raise OutputError(
            f"the output {out} is the model itself, or holds it", "choose another --out"
        )


def model_name(source: Source) -> str:
    """A short name for tables and plans."""
    text = os.fspath(source)
    return Path(text).resolve().name if Path(text).exists() else text


def code_of(checkpoint: Checkpoint) -> str | None:
    """SHA-256 over the Python files that a checkpoint brings and that may run; None if none do."""
    return hash_beside(checkpoint, ".py") if checkpoint.trust_remote_code else None


def hash_beside(checkpoint: Checkpoint, *suffixes: str) -> str | None:
    """SHA-256 over the files of these kinds beside the weights; None if there are none.

    They decide numbers, and ``Checkpoint.fingerprint`` does not read them.
    """
    files = [
        f"{file.name} {sha256_file(file)}"
        for file in sorted(checkpoint.path.iterdir())
        if file.suffix in suffixes and file.is_file()
        if file.name not in (INDEX, *REPORT_FILES, *OF_THIS_ONE)
    ]
    return sha256_bytes("\n".join(files).encode()) if files else None


def hash_of_sources(sources: Sequence[str], kind: str) -> str:
    """What identifies calibration text before it is read: the bytes of files, names of datasets."""
    parts = [
        f"{name}={sha256_file(source) if isinstance(source, Path) else source}"
        for name, source in sorted(data.find_sources(sources, kind).items())
    ]
    return sha256_bytes("\n".join(parts).encode())


def read_calibration(checkpoint: Checkpoint, text: Text) -> list[data.Domain]:
    """Sequences for calibration.

    Raises:
        DataError: nothing to read, or less than one sequence.
    """
    if text.sequences < 1:
        raise DataError(f"--sequences must be at least 1 (got {text.sequences})")
    domains = _read(checkpoint, text, "calibration")
    return data.draw(domains, text.sequences, text.seed, dict(text.mix))


def read_beginnings(checkpoint: Checkpoint, text: Text, tokens: int) -> list[data.Domain]:
    """About ``tokens`` tokens: short sequences from the beginning of every calibration text.

    A file is read no further than that, where ``read_calibration`` draws from all of it.

    Raises:
        DataError: nothing to read, or less than one sequence.
    """
    length = min(_LONG, text.length)
    sources = len(data.find_sources(text.sources, "calibration"))
    each = max(1, math.ceil(tokens / length / max(1, sources)))
    return _read(checkpoint, replace(text, length=length), "calibration", each)


def _read(
    checkpoint: Checkpoint, text: Text, kind: str, most: int | None = None
) -> list[data.Domain]:
    if text.length < 2:
        raise DataError(f"--length must be at least 2 (got {text.length})")
    sources = data.find_sources(text.sources, kind)
    part = checkpoint.config.get("text_config")
    config = part if isinstance(part, dict) else checkpoint.config
    limit = config.get("max_position_embeddings")
    length = min(text.length, limit) if isinstance(limit, int) and limit > 1 else text.length
    tokenizer, pool = data.load_tokenizer(checkpoint), _POOL * text.sequences
    domains = data.load_domains(tokenizer, sources, length, most, pool)
    highest, known = max(int(d.ids_NL.max()) for d in domains), config.get("vocab_size")
    if isinstance(known, int) and highest >= known:
        raise DataError(
            f"the tokenizer in {checkpoint.path} gives token {highest}, the model knows {known}",
            "copy tokenizer.json and tokenizer_config.json of this model into its directory",
        )
    return domains


def read_heldout(checkpoint: Checkpoint, text: Text) -> list[data.Domain]:
    """Sequences for evaluation: ``text.sequences`` per domain from its beginning, 0 for all.

    Raises:
        DataError: nothing to read, or less than one sequence.
    """
    if text.sequences < 0:
        raise DataError(f"--sequences must be at least 0 (got {text.sequences})")
    return _read(checkpoint, text, "heldout", text.sequences or None)
