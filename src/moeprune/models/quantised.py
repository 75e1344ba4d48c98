"""Quantised weights: which tensors on disk are one weight, and the values that they stand for.

Two formats are read: fp8 with one scale per block (``weight`` and ``weight_scale_inv``), and MXFP4
(``*_blocks``, two values per byte, and ``*_scales``, one exponent per 32 values). The decoding is
the package's own, and equal bit for bit to what transformers loads with ``dequantize=True``
wherever that is right: transformers 5.23 splits a dimension that is not a multiple of the block
into equal parts, and ignores the scales of experts that are stored together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moeprune.errors import UnsupportedModelError
from moeprune.models.checkpoint import Checkpoint, TensorInfo
from moeprune.models.staging import unwritten
from moeprune.models.writer import Piece, produced

SUPPORTED = ("fp8", "mxfp4")
"""Values of ``quant_method`` whose weights are read."""

KEYS = ("quantization_config", "compression_config")
"""config.json keys that describe a quantisation."""

ACTIVATION_SCALES = ("activation_scale", "input_scale")
"""Last words of the names of scales of a layer's input; weights do not depend on them."""

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_PACKED = (*_FP8, "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2", "I8", "U8")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32
_BF16 = "use the bf16 checkpoint"


@dataclass(frozen=True)
class Quantised:
    """One weight that is stored as two tensors.

    Attributes:
        name: what it is called where it is not quantised.
        stored: the tensor with its values.
        scale: the tensor with its scales.
        shape: of the weight; where experts are stored together, the first axis is theirs.
        block: rows and columns that share a scale; None for MXFP4.
        dtype: how the values are stored, for messages.
    """

    name: str
    stored: str
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    dtype: str

    def plain(self, key: str) -> str:
        """What ``key``, the name of ``stored`` under some expert's number, becomes unquantised."""
        return key.removesuffix(self.stored.removeprefix(self.name))


def decode_fp8(stored: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """``stored * scale`` as float32, where every block of ``stored`` [..., O, I] has one scale.

    ``scale`` is [..., ceil(O / block rows), ceil(I / block columns)]; the last blocks may be
    smaller. (Block-wise scaling: DeepSeek-V3, arXiv 2412.19437, section 3.3.)
    """
    rows, columns = stored.shape[-2:]
    spread = scale.to(torch.float32).repeat_interleave(block[0], dim=-2)[..., :rows, :]
    spread = spread.repeat_interleave(block[1], dim=-1)[..., :columns]
    return stored.to(torch.float32).mul_(spread)


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The values of MXFP4 ``blocks`` [..., G, 16] and ``scales`` [..., G] as float32 [..., 32 G].

    The low four bits of a byte come first; a value is ``E2M1 * 2 ** (scale - 127)`` (OCP
    Microscaling Formats specification 1.0).
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    pairs = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1)
    exponent = scales.to(torch.int32) - 127
    return torch.ldexp(pairs.flatten(-2), exponent[..., None]).flatten(-2)


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint is quantised.

    Attributes:
        method: ``quant_method`` of its config.json; None if it names none.
        parts: every quantised weight, under the names of both of its tensors.
        problem: why its weights cannot be read; None if they can.
    """

    method: str | None
    parts: Mapping[str, Quantised]
    problem: UnsupportedModelError | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Quantisation:
        """Look at names, dtypes and shapes; no weight is read."""
        described = _described(checkpoint.config)
        method = None if described is None else _method(described)
        if method is not None and method not in SUPPORTED:
            return cls(method, {}, _unsupported(checkpoint, f"is quantised as {method}"))
        try:
            return cls(method, _find(checkpoint, described))
        except UnsupportedModelError as error:
            return cls(method, {}, error)

    def refuse(self) -> None:
        """Raise ``UnsupportedModelError`` if weights cannot be read."""
        if self.problem is not None:
            raise self.problem

    @property
    def weights(self) -> dict[str, Quantised]:
        """The quantised weights by the names they would have unquantised."""
        return {part.name: part for part in self.parts.values()}

    def names(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Names of all weights as if nothing were quantised, in the order of the disk."""
        for key in checkpoint.tensors:
            part = self.parts.get(key)
            if part is None or key == part.stored:
                yield key if part is None else part.name

    def is_scale(self, key: str) -> bool:
        """Whether a tensor has no meaning beside unquantised weights."""
        part = self.parts.get(key)
        return key == part.scale if part is not None else key.endswith(ACTIVATION_SCALES)


def parameters_of(name: str, dtype: str, shape: Iterable[int]) -> int:
    """How many of a model's weights a stored tensor holds: of scales none, of nibbles twice."""
    if name.endswith("_scale_inv") or (dtype == "U8" and name.endswith("_scales")):
        return 0
    return math.prod(shape) * (2 if dtype == "U8" and name.endswith("_blocks") else 1)


def parameters(checkpoint: Checkpoint) -> int:
    """Weights in all tensors of a checkpoint."""
    return sum(
        parameters_of(name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()
    )


def read(
    checkpoint: Checkpoint,
    weight: Quantised,
    row: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight, or ``weight[row]`` where only that is read; computed as float32, then rounded."""
    if row is None and len(weight.shape) == 3:
        whole = unwritten(weight.shape, dtype, torch.device("cpu"))
        for expert in range(len(whole)):  # all of them as float32 could be twice what is kept
            whole[expert] = read(checkpoint, weight, expert)
        return whole
    take = checkpoint.read if row is None else lambda name: checkpoint.read_row(name, row)
    stored, scale = take(weight.stored), take(weight.scale)
    if weight.block is None:
        return decode_mxfp4(stored, scale).T.contiguous().to(dtype)
    grid = [-(-n // b) for n, b in zip(stored.shape, weight.block, strict=True)]
    return decode_fp8(stored, scale.reshape(grid), weight.block).to(dtype)


def bf16_piece(
    name: str, checkpoint: Checkpoint, weight: Quantised, rows: Iterable[int | None] | None = None
) -> Piece:
    """``weight``, or some of its rows along the first axis, as a bf16 tensor to write.

    A row that is None is zero.
    """
    chosen = None if rows is None else list(rows)
    shape = weight.shape if chosen is None else (len(chosen), *weight.shape[1:])

    def make() -> Iterator[Tensor]:
        if len(shape) == 2:
            whole = read(checkpoint, weight, dtype=torch.bfloat16)
            empty = torch.zeros_like(whole[0])
            yield (
                whole
                if chosen is None
                else torch.stack([empty if row is None else whole[row] for row in chosen])
            )
            return
        for row in range(shape[0]) if chosen is None else chosen:
            if row is None:
                yield torch.zeros(shape[1:], dtype=torch.bfloat16)
            else:
                yield read(checkpoint, weight, row, torch.bfloat16)

    return produced(name, torch.bfloat16, shape, make)


class _Decoded:
    """Stands for a slice of a safetensors file whose values are computed when it is indexed."""

    def __init__(self, checkpoint: Checkpoint, weight: Quantised, dtype: torch.dtype) -> None:
        self._checkpoint, self._weight, self._dtype = checkpoint, weight, dtype

    def __getitem__(self, index: Any) -> Tensor:
        # what is kept in float32 whatever the model's dtype is a matrix, never all the experts
        dtype = torch.float32 if len(self._weight.shape) == 2 else self._dtype
        return read(self._checkpoint, self._weight, dtype=dtype)[index]

    def rows(self, rows: range) -> Tensor:
        """Some experts' matrices of all that are stored together."""
        found = torch.empty(len(rows), *self._weight.shape[1:], dtype=self._dtype)
        for place, row in enumerate(rows):
            found[place] = read(self._checkpoint, self._weight, row)
        return found


class _Rows:
    """Stands for some rows, along the first axis, of what a slice of a file stands for."""

    def __init__(self, whole: Any, rows: range) -> None:
        self._whole, self._rows = whole, rows

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(self._whole, _Decoded):
            return self._whole.rows(self._rows)[index]
        # a view of the mapped file: at the address where the whole tensor has these rows
        rows: Tensor = self._whole[...][self._rows.start : self._rows.stop]
        return rows[index]


def lazy_state(
    checkpoint: Checkpoint,
    quantisation: Quantisation,
    names: Iterable[str],
    dtype: torch.dtype,
    rows: Mapping[str, range] | None = None,
) -> dict[str, Any]:
    """Weights by name for transformers' loader, each read (and decoded) when it is asked for.

    ``dtype`` is what the loader will turn decoded experts into. Of the names in ``rows`` only these
    rows are read.
    """
    weights = quantisation.weights
    handles: dict[Any, Any] = {}
    state: dict[str, Any] = {}
    for name in names:
        if name in weights:
            state[name] = _Decoded(checkpoint, weights[name], dtype)
            continue
        file = checkpoint.tensors[name].file
        if file not in handles:
            handles[file] = safe_open(file, "pt")
        state[name] = handles[file].get_slice(name)
    for name, some in (rows or {}).items():
        state[name] = _Rows(state[name], some)
    return state


def with_description(config: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A raw config.json with another description of the quantisation; None leaves it out."""
    found = {}
    for key, value in config.items():
        new = value
        if key in KEYS:
            new = change(value)
        elif key == "text_config" and isinstance(value, dict):
            new = with_description(value, change)
        if new is not None or key not in KEYS:
            found[key] = new
    return found


def without_description(config: dict[str, Any]) -> dict[str, Any]:
    """A raw config.json of the same model unquantised."""
    return with_description(config, lambda old: None)


def _described(config: Mapping[str, Any]) -> Any:
    for part in (config, config.get("text_config")):
        for key in KEYS:
            if isinstance(part, Mapping) and part.get(key) is not None:
                return part[key]
    return None


def _method(described: Any) -> str:
    if not isinstance(described, Mapping):
        return "an unknown format"
    if described.get("load_in_8bit") or described.get("load_in_4bit"):
        return "bitsandbytes"
    return str(described.get("quant_method") or "an unknown format")


def _unsupported(checkpoint: Checkpoint, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{checkpoint.path} {why}, which is not supported", _BF16)


def _find(checkpoint: Checkpoint, described: Any) -> dict[str, Quantised]:
    method = None if described is None else _method(described)
    block = None if described is None else described.get("weight_block_size")
    parts: dict[str, Quantised] = {}
    for key, info in checkpoint.tensors.items():
        found = None
        if method == "fp8" and info.dtype in _FP8 and key + "_scale_inv" in checkpoint.tensors:
            found = _fp8(key, info, checkpoint.tensors[key + "_scale_inv"], block)
        elif method == "mxfp4" and info.dtype == "U8" and key.endswith("_blocks"):
            found = _mxfp4(key, info, checkpoint)
        if found is not None:
            parts |= {found.stored: found, found.scale: found}
    for key, info in checkpoint.tensors.items():
        if key not in parts and _has_hidden_scale(key, info, method):
            what = "and config.json names no quantisation"
            if method is not None:
                what = f"without a counterpart that {method} knows"
            raise UnsupportedModelError(f"{key} is stored as {info.dtype} {what}", _BF16)
    return parts


def _has_hidden_scale(key: str, info: TensorInfo, method: str | None) -> bool:
    """Whether a tensor stands for other values than its own, by a rule that is not known."""
    if key.endswith(("_scale_inv", "weight_scale")):
        return True
    cast = method is None and info.dtype in _FP8  # a plain number in eight bits
    return len(info.shape) > 1 and info.dtype in _PACKED and not cast


def _fp8(key: str, info: TensorInfo, scale: TensorInfo, block: Any) -> Quantised:
    """One weight whose scales are per block, per matrix, or per expert's matrix."""
    rows, columns = info.shape[-2:] if len(info.shape) > 1 else (0, 0)
    sizes = tuple(block) if isinstance(block, list) and len(block) == 2 else (rows, columns)
    if not all(isinstance(n, int) and n > 0 for n in sizes) or len(info.shape) not in (2, 3):
        raise UnsupportedModelError(f"{key}: fp8 of {list(info.shape)} in blocks of {block}", _BF16)
    grid = tuple(-(-n // b) for n, b in zip((rows, columns), sizes, strict=True))
    if scale.numel == math.prod(info.shape[:-2]):
        sizes, grid = (rows, columns), (1, 1)  # one scale per matrix, whatever the block
    elif scale.shape != (*info.shape[:-2], *grid):
        raise UnsupportedModelError(
            f"{key}_scale_inv: {list(scale.shape)} are not the scales of {list(info.shape)} "
            f"in blocks of {list(sizes)}",
            _BF16,
        )
    if scale.dtype not in _SCALES or (len(info.shape) > 2 and scale.shape[:1] != info.shape[:1]):
        raise UnsupportedModelError(
            f"{key}_scale_inv is stored as {scale.dtype} {list(scale.shape)}", _BF16
        )
    return Quantised(key, key, key + "_scale_inv", info.shape, (sizes[0], sizes[1]), info.dtype)


def _mxfp4(key: str, info: TensorInfo, checkpoint: Checkpoint) -> Quantised | None:
    """All experts' matrices of a layer; transformers holds them as [E, inputs, outputs]."""
    stem = key.removesuffix("_blocks")
    scale = checkpoint.tensors.get(stem + "_scales")
    if scale is None or scale.dtype != "U8":
        return None
    if stem in checkpoint.tensors:
        raise UnsupportedModelError(f"both {stem} and {key} are stored", _BF16)
    if len(info.shape) != 4 or info.shape[3] * 2 != _GROUP or scale.shape != info.shape[:3]:
        raise UnsupportedModelError(
            f"{key}: {list(info.shape)} with scales {list(scale.shape)} is no MXFP4", _BF16
        )
    experts, outputs, groups, _ = info.shape
    shape = (experts, groups * _GROUP, outputs)
    return Quantised(stem, key, stem + "_scales", shape, None, "MXFP4")
