"""Text that the teacher writes: ``--data teacher-samples``, to be learnt from by its student."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune.errors import DataError
from moeprune.files import sha256_bytes, sha256_file, write_together
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.runtime import load
from moeprune.pipeline.inputs import DTYPES, Compute, Progress, Text, read_calibration
from moeprune.recovery.state import StateFolder

PROMPT = 32
"""Tokens of every sequence that are of the text, not the teacher's."""

_ROWS = 32  # that are continued at once; part of what a seed means


@dataclass(frozen=True)
class Samples:
    """What is asked for.

    Attributes:
        name: of the domain.
        temperature: of the teacher's probabilities.
    """

    name: str
    temperature: float

    @classmethod
    def parse(cls, source: str) -> Samples | None:
        """``[name=]teacher-samples[:TEMPERATURE]``; None for another source.

        Raises:
            DataError: the temperature is no number above 0.
        """
        name, _, asked = source.rpartition("=")
        kind, _, number = asked.partition(":")
        if kind != data.SAMPLES:
            return None
        try:
            temperature = float(number or 1)
        except ValueError:
            temperature = 0.0
        if not 0.0 < temperature < 100.0:
            raise DataError(f"bad temperature {number!r}", f"write --data {data.SAMPLES}:0.8")
        return cls(name or data.SAMPLES, temperature)


def with_samples(
    text: Text,
    student: Checkpoint,
    teacher: Checkpoint | None,
    folder: StateFolder,
    compute: Compute,
    writes: bool,
    progress: Progress,
) -> Text:
    """``text`` with the file that the teacher wrote in place of ``teacher-samples``.

    The teacher continues the first tokens of sequences drawn from the other sources, or from the
    embedded text, each to a whole sequence. The file stands in ``folder``; it is a function of the
    teacher, the prompts, the temperature and the seed, and is written once.

    Args:
        text: what to read.
        student: whose tokenizer reads it; the teacher's has to be the same.
        teacher: None if there is none.
        folder: of the run.
        compute: where to, and in which type.
        writes: whether this process is the one that writes.
        progress: told how many sequences are done.

    Raises:
        DataError: samples are asked for twice, or without a teacher, or there are no prompts.
        OutputError: the file cannot be written.
    """
    asked = [found for source in text.sources if (found := Samples.parse(source)) is not None]
    if not asked:
        return text
    if teacher is None or len(asked) > 1:
        problem = "are asked for twice" if teacher is not None else "are written by a teacher"
        hint = "once is enough" if teacher is not None else "give --teacher MODEL"
        raise DataError(f"{data.SAMPLES} {problem}", hint)
    [samples] = asked
    others = tuple(source for source in text.sources if Samples.parse(source) is None)
    names = [*(data.find_sources(others, "calibration") if others else ()), samples.name]
    data.shares(names, text.sequences, dict(text.mix))  # refuses before anything is written
    count = -(-text.sequences // (len(others) + 1))
    domains = read_calibration(student, replace(text, sources=others, sequences=count, mix=()))
    start_NL = torch.cat([domain.ids_NL for domain in domains])
    file = folder.path / f"samples-{_key(start_NL, samples, teacher, text.seed, compute)}.jsonl"
    told = file.with_suffix(".sha256")
    if writes and not _whole(file, told):
        written = _write_samples(student, teacher, start_NL, samples, text.seed, compute, progress)
        lines = "".join(json.dumps({"text": one}) + "\n" for one in written).encode()
        with folder.writing():
            write_together({file: lines, told: sha256_bytes(lines).encode()}, force=True)
    return replace(text, sources=(*others, f"{samples.name}={file}"))


def _whole(file: Path, told: Path) -> bool:
    """Whether samples are there as they were written; others are written again."""
    try:
        return told.read_bytes() == sha256_file(file).encode()
    except OSError:
        return False


def _key(
    start_NL: Tensor, samples: Samples, teacher: Checkpoint, seed: int, compute: Compute
) -> str:
    facts = [teacher.fingerprint, samples.temperature, PROMPT, seed, compute.dtype]
    facts.append(data.describe([data.Domain("prompts", start_NL, 1.0)])["hash"])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _write_samples(
    student: Checkpoint,
    teacher: Checkpoint,
    start_NL: Tensor,
    samples: Samples,
    seed: int,
    compute: Compute,
    progress: Progress,
) -> Sequence[str]:
    """What the teacher makes of the beginnings of some sequences, as long as they are."""
    device, kind = torch.device(compute.device), DTYPES.get(compute.dtype, torch.float32)
    model: Any = load(teacher.path, kind, device, teacher.trust_remote_code)
    tokenizer = data.load_tokenizer(student)
    length = start_NL.shape[1]
    prompt = min(PROMPT, length // 2)
    written: list[str] = []
    for number, ids_BL in enumerate(torch.split(start_NL, _ROWS)):
        progress("teacher samples", len(written), len(start_NL))
        torch.manual_seed(seed * 1_000_003 + number)
        ids_BP = ids_BL[:, :prompt].to(device)
        found_BL = model.generate(
            ids_BP,
            attention_mask=torch.ones_like(ids_BP),
            do_sample=True,
            temperature=samples.temperature,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - prompt,  # no end of text
            max_new_tokens=length - prompt,
            pad_token_id=0,
        )
        written += tokenizer.batch_decode(found_BL, skip_special_tokens=True)
    progress("teacher samples", len(written), len(start_NL))
    return written
