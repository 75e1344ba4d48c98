"""Rules about quantised weights: every block has its scale, and every scale its block."""

from __future__ import annotations

from collections.abc import Iterator

from moeprune.models.checkpoint import TensorInfo
from moeprune.verification.finding import ERROR, Finding, Found, Rule, Skip
from moeprune.verification.subject import CONFIG, Subject

_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_INVERSE, _PLAIN = "_scale_inv", "_scale"
_BLOCKS, _SCALES = "_blocks", "_scales"
_SLICE = "slice scales together with the weights that they belong to, from the original"


def _fp8(subject: Subject) -> dict[str, TensorInfo]:
    """Matrices in 8 bits; single numbers and rows in that type are scales of something else."""
    return {k: t for k, t in subject.tensors.items() if t.dtype in _FP8 and len(t.shape) >= 2}


def _block(subject: Subject) -> tuple[int, int] | None:
    entry = subject.config.get("quantization_config")
    size = entry.get("weight_block_size") if isinstance(entry, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n for n in size):
        return size[0], size[1]
    return None


def fp8_scales(subject: Subject) -> Found:
    """weight_scale_inv, or weight_scale."""
    subject.require_all()
    weights = _fp8(subject)
    orphans = [
        key
        for key in subject.tensors
        if key.endswith(_INVERSE) and key.removesuffix(_INVERSE) not in weights
    ]
    if not weights and not orphans:
        raise Skip("no weights are stored in 8-bit floating point")
    for key, info in weights.items():
        scale = subject.tensors.get(key + _INVERSE)
        if scale is not None:
            yield from _fp8_shape(subject, key, info, scale)
        elif key + _PLAIN not in subject.tensors:
            problem = f"it is stored as {info.dtype}, and no scale stands beside it"
            yield subject.at("fp8-scales", ERROR, key + _INVERSE, problem, _SLICE)
    for key in orphans:
        base = key.removesuffix(_INVERSE)
        stored = subject.tensors.get(base)
        problem = f"it scales {base}, which is " + (
            "not stored" if stored is None else f"stored as {stored.dtype}"
        )
        yield subject.at("fp8-scales", ERROR, key, problem, "delete it, or copy its weight as well")


def _fp8_shape(
    subject: Subject, key: str, info: TensorInfo, scale: TensorInfo
) -> Iterator[Finding]:
    block = _block(subject)
    if block is None:
        return
    *lead, rows, columns = info.shape
    expected = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != expected:
        problem = (
            f"{list(scale.shape)} scales for {list(info.shape)} weights in blocks of "
            f"{block[0]} x {block[1]}; expected {list(expected)}"
        )
        yield subject.at("fp8-scales", ERROR, key + _INVERSE, problem, _SLICE)


def mxfp4_scales(subject: Subject) -> Found:
    """Blocks [..., B, 16] and scales [..., B]."""
    subject.require_all()
    blocks = {k.removesuffix(_BLOCKS) for k in subject.tensors if k.endswith(_BLOCKS)}
    scales = {
        k.removesuffix(_SCALES)
        for k, info in subject.tensors.items()
        if k.endswith(_SCALES) and (info.dtype == "U8" or k.removesuffix(_SCALES) in blocks)
    }
    if not blocks and not scales:
        raise Skip("no weights are stored in 4-bit blocks")
    for base in sorted(blocks | scales):
        data, scale = (subject.tensors.get(base + ending) for ending in (_BLOCKS, _SCALES))
        if data is None or scale is None:
            lost, there = (_BLOCKS, _SCALES) if data is None else (_SCALES, _BLOCKS)
            problem = f"{base}{there} is stored, but this is not"
            yield subject.at("mxfp4-scales", ERROR, base + lost, problem, _SLICE)
        elif scale.shape != data.shape[:-1]:
            problem = f"{list(scale.shape)} scales for blocks of shape {list(data.shape)}"
            yield subject.at("mxfp4-scales", ERROR, base + _SCALES, problem, _SLICE)


def declared(subject: Subject) -> Found:
    """quantization_config against the tensors."""
    entry = subject.config.get("quantization_config")
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    stored = {
        "fp8": min(_fp8(subject), default=None),
        "mxfp4": min((k for k in subject.tensors if k.endswith(_BLOCKS)), default=None),
    }
    if method is None and not any(stored.values()):
        raise Skip("nothing is quantised")
    for kind, key in stored.items():
        if key is not None and entry is None:
            problem = f"it is quantised ({kind}), but config.json has no quantization_config"
            yield subject.at("quantised", ERROR, key, problem, "copy the original's entry")
    if method in stored and stored[str(method)] is None:
        problem = f"quantization_config says {method}, but no such tensor is stored"
        remedy = "delete the entry if the weights were dequantised"
        yield Finding("quantised", ERROR, CONFIG, None, problem, remedy)


RULES = (
    Rule("quantised", "quantization_config says how the tensors are stored", declared),
    Rule("fp8-scales", "every 8-bit matrix has a scale for each of its blocks", fp8_scales),
    Rule("mxfp4-scales", "every 4-bit block has its scale", mxfp4_scales),
)
