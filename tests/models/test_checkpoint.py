"""The lazy reader: what it reads, and how it refuses what is damaged or hostile."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeprune.errors import CheckpointError
from moeprune.models import checkpoint as module
from moeprune.models.checkpoint import INDEX, Checkpoint, read_header


@pytest.fixture
def copy(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint of several shards that a test may damage."""
    return Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))


def shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[1]


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


# ---- reading -------------------------------------------------------------------------------------


def test_reads_what_safetensors_reads(copy: Path) -> None:
    found = Checkpoint.open(copy)
    expected = {name: tensor for file in found.shards for name, tensor in load_file(file).items()}
    assert len(found.shards) > 3
    assert set(found.tensors) == set(expected)
    for name, tensor in expected.items():
        info = found.tensors[name]
        assert info.shape == tuple(tensor.shape) and info.dtype == "F32"
        assert info.numel == tensor.numel() and info.nbytes == tensor.nbytes
        assert torch.equal(found.read(name), tensor)
    assert found.numel == sum(tensor.numel() for tensor in expected.values())
    assert found.nbytes == 4 * found.numel
    assert found.config == json.loads((copy / "config.json").read_text())
    assert [file.name for file in found.other_files()] == ["generation_config.json"]


def test_order_is_that_of_the_files(copy: Path) -> None:
    infos = list(Checkpoint.open(copy).tensors.values())
    assert infos == sorted(infos, key=lambda info: (info.file, info.begin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_read_row(dtype: torch.dtype, copy: Path) -> None:
    tensor = (torch.randn(5, 3, 4) * 9).to(dtype)
    save_file({"x": tensor}, copy / "model.safetensors")
    (copy / INDEX).unlink()
    for file in copy.glob("model-*"):
        file.unlink()
    found = Checkpoint.open(copy)
    for row in range(5):
        one = found.read_row("x", row)
        assert one.shape == (3, 4) and one.dtype == dtype
        assert torch.equal(one.view(torch.uint8), tensor[row].view(torch.uint8))


def test_what_was_read_may_be_changed(copy: Path) -> None:
    found = Checkpoint.open(copy)
    before = shard(copy).read_bytes()
    name = next(name for name, info in found.tensors.items() if info.file == shard(found.path))
    found.read(name).zero_()
    found.read_row(name, 0).zero_()
    assert shard(copy).read_bytes() == before
    assert found.read(name).any()


def test_without_an_index_all_files_count(copy: Path) -> None:
    before = set(Checkpoint.open(copy).tensors)
    (copy / INDEX).unlink()
    assert set(Checkpoint.open(copy).tensors) == before


def test_files_that_are_not_in_the_index_do_not_count(copy: Path) -> None:
    before = set(Checkpoint.open(copy).tensors)
    save_file({"adapter": torch.ones(2)}, copy / "adapter.safetensors")
    assert set(Checkpoint.open(copy).tensors) == before


def test_a_path_may_have_a_trailing_slash_or_be_relative(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    assert Checkpoint.open("model/").path == Checkpoint.open("./model").path == copy.resolve()


# ---- not a checkpoint ----------------------------------------------------------------------------


def test_not_a_model_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint.open(file)
    for name in (tmp_path / "none", "./none", "none", "a/b/c"):
        with pytest.raises(CheckpointError, match="does not exist"):
            Checkpoint.open(name)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\xff", "[" * 100_000])
def test_config_that_is_no_object(text: str, copy: Path) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json is not"):
        _ = Checkpoint.open(copy).config


def test_no_weights(copy: Path) -> None:
    for file in [*copy.glob("*.safetensors"), copy / INDEX]:
        file.unlink()
    with pytest.raises(CheckpointError, match="no weights in"):
        Checkpoint.open(copy)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin") as caught:
        Checkpoint.open(copy)
    assert "save_pretrained" in caught.value.hint


# ---- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_file(keep: int, copy: Path) -> None:
    shard(copy).write_bytes(shard(copy).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"damaged file .*{shard(copy).name}") as caught:
        Checkpoint.open(copy)
    assert "again" in caught.value.hint


def test_missing_shard(copy: Path) -> None:
    name = shard(copy).name
    shard(copy).unlink()
    with pytest.raises(CheckpointError, match=f"missing shard .*{name}"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", ""]
)
def test_index_that_points_outside(name: str, copy: Path) -> None:
    (copy.parent / "x.safetensors").write_bytes(shard(copy).read_bytes())
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, [], "{"])
def test_index_without_a_map(index: object, copy: Path) -> None:
    (copy / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint.open(copy)


def test_index_names_a_tensor_that_no_shard_has(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.more"] = shard(copy).name
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'model\.more' is in the index"):
        Checkpoint.open(copy)


def test_tensor_in_two_shards(copy: Path) -> None:
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.ones(2)}, second)
    with pytest.raises(CheckpointError, match=f"{name}.* stands in"):
        Checkpoint.open(copy)


def test_name_twice_in_one_header(tmp_path: Path) -> None:
    """JSON readers keep the last entry silently; two answers are none."""
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = "{" + entry % (0, 4) + "," + entry % (4, 8) + "}"
    join(tmp_path / "a.safetensors", header.encode(), bytes(8))
    with pytest.raises(CheckpointError, match="stands there twice"):
        read_header(tmp_path / "a.safetensors")


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "larger shape": (lambda e: e.update(shape=[e["shape"][0] + 1, *e["shape"][1:]]), "shape"),
    "smaller shape": (lambda e: e.update(shape=[1]), "shape"),
    "negative shape": (lambda e: e.update(shape=[-n for n in e["shape"]] * 2), "damaged"),
    "other dtype": (lambda e: e.update(dtype="F64"), "shape"),
    "unknown dtype": (lambda e: e.update(dtype="F31"), "bad header entry"),
    "no dtype": (lambda e: e.pop("dtype"), "bad header entry"),
    "no offsets": (lambda e: e.pop("data_offsets"), "bad header entry"),
    "one offset": (lambda e: e.update(data_offsets=[0]), "bad header entry"),
    "offsets backwards": (lambda e: e.update(data_offsets=e["data_offsets"][::-1]), "shape"),
    "offsets before the data": (
        lambda e: e.update(data_offsets=[n - 10**6 for n in e["data_offsets"]]),
        "damaged",
    ),
    "offsets behind the end": (
        lambda e: e.update(data_offsets=[n + 10**6 for n in e["data_offsets"]]),
        "truncated",
    ),
    "shape is text": (lambda e: e.update(shape="ab"), "bad header entry"),
    "shape is missing": (lambda e: e.pop("shape"), "bad header entry"),
}


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies(lie: str, copy: Path) -> None:
    change, message = LIES[lie]
    header, data = split(shard(copy))
    change(header[next(name for name in header if name != "__metadata__")])
    join(shard(copy), header, data)
    with pytest.raises(CheckpointError, match="damaged file") as caught:
        Checkpoint.open(copy)
    assert message in caught.value.problem


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"x": 1}',
        b'{"x": []}',
        b'{"__metadata__": 3}',
        b"\xff\xfe",
        b"[" * 10**5,
    ],
)
def test_header_that_is_none(header: bytes, tmp_path: Path) -> None:
    join(tmp_path / "a.safetensors", header, b"")
    with pytest.raises(CheckpointError, match="damaged file"):
        read_header(tmp_path / "a.safetensors")


def test_bytes_that_belong_to_two_tensors_or_none(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for other in ([0, 8], [4, 12], [12, 20]):
        header = {"a": one, "b": {**one, "data_offsets": other}}
        join(tmp_path / "x", header, bytes(max(other)))
        with pytest.raises(CheckpointError, match="overlaps another tensor, or there is a gap"):
            read_header(tmp_path / "x")
    join(tmp_path / "x", {"a": one, "b": {**one, "data_offsets": [8, 16]}}, bytes(17))
    with pytest.raises(CheckpointError, match="1 bytes belong to no tensor"):
        read_header(tmp_path / "x")
    join(tmp_path / "x", {"a": one, "b": {**one, "data_offsets": [8, 16]}}, bytes(16))
    assert set(read_header(tmp_path / "x")[0]) == {"a", "b"}


def test_header_that_claims_to_be_huge(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="truncated, or not a safetensors file"):
        read_header(file)


def test_header_and_metadata(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2, 3), "a": torch.ones(())}, tmp_path / "x", {"format": "pt"})
    tensors, metadata = read_header(tmp_path / "x")
    assert metadata == {"format": "pt"}
    assert {name: info.shape for name, info in tensors.items()} == {"a": (), "b": (2, 3)}


def test_data_that_vanishes_after_opening(copy: Path) -> None:
    found = Checkpoint.open(copy)
    last = list(found.tensors)[-1]
    file = found.tensors[last].file
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged file"):
        found.read(last)
    with pytest.raises(CheckpointError, match="damaged file"):
        found.read_row(last, 0)


# ---- fingerprint ---------------------------------------------------------------------------------


def test_fingerprint_is_that_of_the_content(copy: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(copy).fingerprint
    assert len(first) == 64 and int(first, 16) >= 0
    other = shutil.copytree(copy, tmp_path / "elsewhere")
    (other / "README.md").write_text("a card is not the model")
    assert Checkpoint.open(other).fingerprint == first


def _config(copy: Path) -> None:
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"vocab_size": 128', '"vocab_size": 129'))


def _header(copy: Path) -> None:
    header, data = split(shard(copy))
    name = next(name for name in header if name != "__metadata__")
    join(shard(copy), {f"{k}x" if k == name else k: v for k, v in header.items()}, data)
    (copy / INDEX).unlink()


def _metadata(copy: Path) -> None:
    content = shard(copy).read_bytes()
    shard(copy).write_bytes(content.replace(b'"format":"pt"', b'"format":"px"', 1))


def _data(at: int) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        content = bytearray(shard(copy).read_bytes())
        content[at] ^= 1
        shard(copy).write_bytes(content)

    return change


CHANGES = {
    "config": _config,
    "header": _header,
    "metadata": _metadata,
    "last byte": _data(-1),
    "middle byte": _data(-50_000),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_shows_changes(change: str, copy: Path) -> None:
    before, content = Checkpoint.open(copy).fingerprint, shard(copy).read_bytes()
    config = (copy / "config.json").read_bytes()
    CHANGES[change](copy)
    assert (shard(copy).read_bytes(), (copy / "config.json").read_bytes()) != (content, config)
    assert Checkpoint.open(copy).fingerprint != before


def test_fingerprint_reads_little(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes per shard at most, whatever its size."""
    big = torch.zeros(2_000_000)
    save_file({"x": big}, copy / "model.safetensors")
    (copy / INDEX).unlink()
    for file in copy.glob("model-*"):
        file.unlink()
    total = 0
    sha256 = module.hashlib.sha256

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            nonlocal total
            total += len(data)
            self._digest = sha256(data)

        def update(self, data: bytes) -> None:
            nonlocal total
            total += len(data)
            self._digest.update(data)

        def hexdigest(self) -> str:
            return str(self._digest.hexdigest())

    expected = Checkpoint.open(copy).fingerprint
    monkeypatch.setattr(module.hashlib, "sha256", Counting)
    assert Checkpoint.open(copy).fingerprint == expected
    assert total < 300_000 < big.nbytes
