"""Rules about values and their types."""

from __future__ import annotations

from collections import Counter

from moeprune.models.scan import FLOAT_DTYPES
from moeprune.verification.finding import ERROR, WARNING, Finding, Found, Rule, Skip
from moeprune.verification.subject import CONFIG, Subject

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def finite(subject: Subject) -> Found:
    """NaN and infinity."""
    for key, found in subject.scans.items():
        if found.nonfinite:
            problem = f"{found.nonfinite} of its {subject.tensors[key].numel} values are not finite"
            remedy = "write it again; to rule an expert out, use a large negative bias instead"
            yield subject.at("finite", ERROR, key, problem, remedy)


def dtype(subject: Subject) -> Found:
    """The configured dtype against what most of the bytes are."""
    said = subject.entry("dtype") or subject.entry("torch_dtype")
    if said not in _NAMES:
        raise Skip("config.json names no floating-point dtype")
    sizes: Counter[str] = Counter()
    for info in subject.tensors.values():
        if info.dtype in FLOAT_DTYPES and FLOAT_DTYPES[info.dtype].itemsize > 1:
            sizes[info.dtype] += info.nbytes
    if not sizes:
        raise Skip("no tensor is stored in floating point of 16 bits or more")
    most = sizes.most_common(1)[0][0]
    if most != _NAMES[str(said)]:
        name = next(name for name, code in _NAMES.items() if code == most)
        problem = f"dtype is {said}, but most of the weights are {name}"
        remedy = f"set dtype to {name!r}: loaders take their precision from it"
        yield Finding("dtype", WARNING, CONFIG, None, problem, remedy)


RULES = (
    Rule("finite", "every value is finite", finite),
    Rule("dtype", "dtype is what most of the weights are stored as", dtype),
)
