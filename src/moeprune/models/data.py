"""Text becomes sequences of token ids: concatenated documents, cut into equal lengths, no padding.

The same reader serves calibration and evaluation. Sequences are drawn without replacement by a
seed, the same number from every domain.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.resources import files as resource_files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from moeprune.core.served import WATCHED
from moeprune.errors import DataError, nearest
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.documents import PREFIX as DATASET
from moeprune.models.documents import Dataset, document_text
from moeprune.models.native import quiet_transformers
from moeprune.models.walk import Batch

SAMPLES = "teacher-samples"
"""A source that only recovery can make."""

TOKENS_PER_BATCH = 4096
"""Fixed, so that results do not depend on the machine."""


@dataclass(frozen=True)
class Domain:
    """Sequences of one source of text.

    Attributes:
        name: for tables.
        ids_NL: token ids, one sequence a row.
        bytes_per_token: of the text that the tokens came from.
        document_N: the document in the middle of each sequence; None if all is one document.
    """

    name: str
    ids_NL: Tensor
    bytes_per_token: float
    document_N: Tensor | None = None


def demo_text(kind: str) -> dict[str, Path]:
    """The embedded text: ``calibration`` (six domains) or ``heldout`` (ten), by domain."""
    folder = Path(str(resource_files("moeprune.assets"))) / "demo" / "text"
    found = sorted(folder.glob(f"*.{kind}.jsonl*"))
    return {file.name.split(".", 1)[0]: file for file in found}


def parse_sources(sources: Sequence[str], kind: str) -> dict[str, Path]:
    """``find_sources`` where only files will do.

    Raises:
        DataError: as there, or one is a dataset.
    """
    found = find_sources(sources, kind)
    for source in found.values():
        if isinstance(source, Dataset):
            raise DataError(f"{source} is not a file", "write its text as JSONL first")
    return {name: source for name, source in found.items() if isinstance(source, Path)}


def find_sources(sources: Sequence[str], kind: str) -> dict[str, Path | Dataset]:
    """``name=`` or nothing, then a path or a dataset; none takes the embedded text of ``kind``.

    Raises:
        DataError: a file does not exist, or two sources share a name.
    """
    if not sources:
        return dict(demo_text(kind))
    found: dict[str, Path | Dataset] = {}
    for source in sources:
        name, made = _source(source)
        if name in found:
            raise DataError(f"two sources are called {name!r}", "name them: --data a=x --data b=y")
        found[name] = made
    return found


def _source(source: str) -> tuple[str, Path | Dataset]:
    """The name of a source, and what it is."""
    name, separator, path = source.partition("=")
    if not separator or Path(source).is_file() or source.startswith(DATASET):
        name, path = "", source  # a path may have an = in it
    if path.startswith(DATASET):
        dataset = Dataset.parse(path)
        return name or dataset.domain, dataset
    file = Path(path)
    if path.partition(":")[0] == SAMPLES and not file.is_file():
        raise DataError(f"{path} is text for moeprune recover, of the whole model", "give a file")
    if not file.is_file():
        raise DataError(
            f"no such text file: {file}",
            "give JSONL with a 'text' field a line, or plain text: --data english=file.jsonl",
        )
    return name or file.name.split(".", 1)[0], file


def read_documents(file: Path, tokenizer: Any = None) -> Iterator[str]:
    """Documents of a JSONL file (``text`` field), optionally gzipped, or one plain text file.

    A line with ``messages`` is a conversation, which the tokenizer's chat template renders.

    Raises:
        DataError: a line is not JSON with a text, or the file is not UTF-8.
    """
    suffixes = file.suffixes
    try:
        opener = gzip.open if suffixes[-1:] == [".gz"] else open
        with opener(file, "rt", encoding="utf-8") as lines:
            if ".jsonl" not in suffixes:
                yield lines.read()
                return
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                yield _text_of(line, f"{file}, line {number}", tokenizer)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}", "convert it to UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} is damaged or not gzip: {error}", "compress it again") from error


def _text_of(line: str, where: str, tokenizer: Any) -> str:
    try:
        record = json.loads(line)
        if isinstance(record, dict) and "text" not in record and "messages" in record:
            return document_text(record, tokenizer, where)
        text = record["text"]
        if not isinstance(text, str):
            raise TypeError("not a string")
        text.encode()  # JSON can spell halves of characters
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{where}: not a JSON object with a 'text' field",
            'write one {"text": "..."} a line, or give plain text as .txt',
        ) from error
    return text


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; its own code runs only if it was opened with that consent.

    Raises:
        DataError: there is none.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.path, trust_remote_code=checkpoint.trust_remote_code
            )
        # without files, some classes make a tokenizer of nothing but special tokens
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("its vocabulary is empty")
    except Exception as error:
        why = [*str(error).splitlines(), type(error).__name__][0]
        raise DataError(
            f"no usable tokenizer in {checkpoint.path}: {why[:120]}",
            "copy tokenizer.json and tokenizer_config.json of the model into its directory",
        ) from error
    return tokenizer


def tokenise(
    tokenizer: Any, name: str, file: Path | Dataset, length: int, most: int | None = None
) -> Domain:
    """All whole sequences of ``length`` tokens in a file; at most ``most`` from its beginning.

    Documents follow each other, each started by the tokenizer's beginning-of-sequence token, or
    its end-of-sequence token where it has no other.

    Raises:
        DataError: the text is empty or shorter than one sequence.
    """
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    ids = array("q")  # of long text a list would take four times as much
    ends: list[int] = []
    size = 0
    read = file.documents if isinstance(file, Dataset) else partial(read_documents, file)
    for text in read(tokenizer):
        if most is not None and len(ids) >= most * length:
            break
        new = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # a chat template may have begun with it
        ids.extend(([] if start is None or new[:1] == [start] else [start]) + new)
        ends.append(len(ids))
        size += len(text.encode())
    if len(ids) < length:
        what = "is empty" if not size else f"has {len(ids)} tokens, shorter than one sequence"
        raise DataError(
            f"{name}: {file} {what} of {length}" if size else f"{name}: {file} is empty",
            f"give more text, or a smaller --length (at most {len(ids)})" if size else "give text",
        )
    count = min(len(ids) // length, most or len(ids))
    table = torch.frombuffer(ids, dtype=torch.int64, count=count * length).view(count, length)
    middle_N = torch.arange(count) * length + length // 2
    document_N = torch.searchsorted(torch.tensor(ends), middle_N, right=True)
    one = len(ends) < 2
    return Domain(name, table, size / len(ids), None if one else document_N)


def load_domains(
    tokenizer: Any,
    sources: Mapping[str, Path | Dataset],
    length: int,
    most: int | None = None,
    pool: int | None = None,
) -> list[Domain]:
    """``tokenise`` every source, in order of name; of a dataset at most ``pool`` sequences."""
    return [
        tokenise(
            tokenizer,
            name,
            source,
            length,
            most if isinstance(source, Path) else most or pool or None,
        )
        for name, source in sorted(sources.items(), key=lambda item: item[0])
    ]


def shares(names: Sequence[str], sequences: int, mix: Mapping[str, float]) -> list[int]:
    """How many sequences each domain gives, in proportion to its weight; 1 where none is given.

    What is left after rounding down goes to the largest fractions, of equal ones to the first.

    Raises:
        DataError: a weight of an unknown domain, or of all of them 0.
    """
    for name in mix:
        if name not in names:
            raise DataError(f"--mix: no text is called {name!r}", nearest(name, names))
    weights = [mix.get(name, 1.0) for name in names]
    total = sum(weights)
    if not total > 0:
        raise DataError("--mix gives every domain a weight of 0")
    exact = [Fraction(weight) * sequences / Fraction(total) for weight in weights]
    counts = [int(part) for part in exact]
    order = sorted(range(len(names)), key=lambda i: (counts[i] - exact[i], i))
    for place in order[: sequences - sum(counts)]:
        counts[place] += 1
    return counts


def draw(
    domains: Sequence[Domain], sequences: int, seed: int, mix: Mapping[str, float] | None = None
) -> list[Domain]:
    """``sequences`` in all, seeded; equally from every domain or by weight, as far as they go."""
    drawn = []
    wanted = shares([domain.name for domain in domains], sequences, mix or {})
    for domain, share in zip(domains, wanted, strict=True):
        count = min(share, len(domain.ids_NL))
        rows = sorted(
            random.Random(f"{seed}:{domain.name}").sample(range(len(domain.ids_NL)), count)
        )
        document_N = None if domain.document_N is None else domain.document_N[rows]
        drawn.append(Domain(domain.name, domain.ids_NL[rows], domain.bytes_per_token, document_N))
    return [domain for domain in drawn if len(domain.ids_NL)]


def batches(domains: Sequence[Domain], seed: int = 0) -> list[Batch]:
    """Batches of ``TOKENS_PER_BATCH`` tokens or one sequence; ``seed`` is that of the sample."""
    domains = [domain for domain in domains if len(domain.ids_NL)]
    if not domains:
        return []
    ids_NL = torch.cat([domain.ids_NL for domain in domains])
    rows = max(1, TOKENS_PER_BATCH // ids_NL.shape[1])
    keys = [domain_key(domain.name) for domain in domains for _ in domain.ids_NL]
    watched_M = _most_frequent(ids_NL, WATCHED)
    parts = zip(ids_NL.split(rows), torch.tensor(keys).split(rows), strict=True)
    return [
        Batch(part, token_keys(part, seed), domain_B=domain_B, watched_M=watched_M)
        for part, domain_B in parts
    ]


def domain_key(name: str) -> int:
    """A number that stands for the name of a domain: 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def _most_frequent(ids_NL: Tensor, most: int) -> Tensor:
    """The ids that occur most often, ascending; of equally frequent ones the lower."""
    ids, counts = ids_NL.unique(return_counts=True)
    chosen: Tensor = ids[torch.argsort(counts, descending=True, stable=True)[:most]].sort().values
    return chosen


def token_keys(ids_BL: Tensor, seed: int = 0) -> Tensor:
    """A pseudo-random int64 per token that depends on its sequence, its position and the seed."""
    keys = np.empty(tuple(ids_BL.shape), dtype=np.uint64)
    steps = np.arange(ids_BL.shape[1], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for row, ids_L in enumerate(ids_BL.numpy()):
        digest = hashlib.sha256(b"%d:" % seed + ids_L.astype("<i8").tobytes()).digest()
        mixed = steps + np.uint64(int.from_bytes(digest[:8], "little"))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        keys[row] = mixed ^ (mixed >> np.uint64(31))
    return torch.from_numpy(keys.view(np.int64))


def describe(domains: Sequence[Domain]) -> dict[str, Any]:
    """What a manifest says about the text: hash of all token ids, counts, domains."""
    digest = hashlib.sha256()
    for domain in domains:
        digest.update(domain.name.encode() + domain.ids_NL.numpy().astype("<i8").tobytes())
    return {
        "hash": digest.hexdigest(),
        "tokens": sum(domain.ids_NL.numel() for domain in domains),
        "sequences": sum(len(domain.ids_NL) for domain in domains),
        "length": int(domains[0].ids_NL.shape[1]) if domains else 0,
        "domains": {domain.name: len(domain.ids_NL) for domain in domains},
    }
