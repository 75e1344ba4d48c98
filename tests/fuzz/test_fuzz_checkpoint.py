"""Hostile headers, indices and directories: a refusal, and what is accepted can be read."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fuzz.values import JSON, LEAVES, NUMBERS, TEXTS, damaged, mutations, spelled
from moeprune.errors import CheckpointError
from moeprune.models.checkpoint import INDEX, Checkpoint, read_header
from moeprune.models.surgery import apply_plan
from support import plan_for

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
DATA = bytes(range(32))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F31", "U8", "C64", ""]) | LEAVES,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)
Answered = Callable[[Callable[[], Any]], Any]


def write(file: Path, header: bytes, data: bytes = DATA, length: int | None = None) -> None:
    count = len(header) if length is None else length
    file.write_bytes(struct.pack("<Q", count) + header + data)


def is_read_alike(file: Path) -> None:
    """The library accepts what we accept, and finds the same tensors in it."""
    tensors, _ = read_header(file)
    with safe_open(file, "pt") as handle:
        assert set(handle.keys()) == set(tensors)
        for name, info in tensors.items():
            found = handle.get_slice(name)
            assert tuple(found.get_shape()) == info.shape and found.get_dtype() == info.dtype
    for info in tensors.values():
        assert all(type(n) is int and n >= 0 for n in (*info.shape, info.begin, info.end))
        assert 8 <= info.begin <= info.end <= file.stat().st_size


@given(header=mutations(HEADER))
def test_headers(header: Any, scratch: Path, answered: Answered) -> None:
    write(scratch / "model.safetensors", spelled(header))
    answered(lambda: is_read_alike(scratch / "model.safetensors"))
    answered(lambda: Checkpoint.open(scratch))


@given(header=st.dictionaries(TEXTS, ENTRIES, max_size=4), data=st.binary(max_size=40))
def test_headers_of_entries(
    header: dict[str, Any], data: bytes, scratch: Path, answered: Answered
) -> None:
    write(scratch / "model.safetensors", spelled(header), data)
    answered(lambda: is_read_alike(scratch / "model.safetensors"))


@given(content=damaged(struct.pack("<Q", len(spelled(HEADER))) + spelled(HEADER) + DATA))
def test_bytes(content: bytes, scratch: Path, answered: Answered) -> None:
    (scratch / "model.safetensors").write_bytes(content)
    answered(lambda: is_read_alike(scratch / "model.safetensors"))


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
    gap=st.integers(-4, 4),
)
def test_tensors_that_overlap_or_leave_gaps(
    shapes: list[list[int]], gap: int, scratch: Path, answered: Answered
) -> None:
    """Only the layout without overlap and gap is read, in whatever order it is spelled."""
    position, header = 0, {}
    for number, shape in enumerate(shapes):
        size = int(torch.Size(shape).numel())
        begin = max(0, position + (gap if number else 0))
        header[f"t{number}"] = {
            "dtype": "U8",
            "shape": shape,
            "data_offsets": [begin, begin + size],
        }
        position = begin + size
    file = scratch / "model.safetensors"
    write(file, spelled(dict(reversed(header.items()))), bytes(position))
    answered(lambda: is_read_alike(file))
    if not gap:
        assert set(read_header(file)[0]) == set(header)


SPELLINGS = {
    "byte order mark": b"\xef\xbb\xbf" + spelled(HEADER),
    "UTF-16": spelled(HEADER).decode().encode("utf-16"),
    "UTF-32": spelled(HEADER).decode().encode("utf-32"),
    "Latin-1": '{"é": 1}'.encode("latin-1"),
    "NaN": spelled(HEADER).replace(b"24, 32", b"NaN, 32"),
    "infinite": spelled(HEADER).replace(b"24, 32", b"1e999, 32"),
    "float": spelled(HEADER).replace(b"24, 32", b"24.0, 32"),
    "true": spelled(HEADER).replace(b"[4]", b"[true, 4]"),
    "text": spelled(HEADER).replace(b"[4]", b'"4"'),
    "sizes of 5000 digits": spelled(HEADER).replace(b"[4]", b"[" + b"9" * 5000 + b"]"),
    "2^63": spelled(HEADER).replace(b"[4]", b"[9223372036854775808, 0]"),
    "1000 axes": spelled(HEADER).replace(b"[4]", json.dumps([1] * 999 + [4]).encode()),
    "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "deep lists": b"[" * 200_000,
    "half a character": spelled(HEADER).replace(b'"b"', b'"\\ud800"'),
    "name of lines": spelled(HEADER).replace(b'"b"', b'"a\\nb"'),
    "name of 10 000 letters": spelled(HEADER).replace(b'"b"', b'"' + b"b" * 10_000 + b'"'),
    "metadata of numbers": spelled({**HEADER, "__metadata__": {"format": 1}}),
    "metadata of nothing": spelled({**HEADER, "__metadata__": []}),
    "nothing": b"",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, scratch: Path) -> None:
    write(scratch / "model.safetensors", SPELLINGS[name])
    with pytest.raises(CheckpointError, match="damaged file"):
        Checkpoint.open(scratch)


# ---- the index -----------------------------------------------------------------------------------


@given(index=mutations({"metadata": {"total_size": 32}, "weight_map": {"a": "model.safetensors"}}))
def test_indices(index: Any, scratch: Path, answered: Answered) -> None:
    (scratch / INDEX).write_bytes(spelled(index))
    found = answered(lambda: Checkpoint.open(scratch))
    if found is not None:
        assert all(file.parent == scratch.resolve() for file in found.shards)


@given(name=TEXTS)
def test_files_that_an_index_names(name: str, scratch: Path, answered: Answered) -> None:
    (scratch / INDEX).write_bytes(spelled({"weight_map": {"a": name}}))
    assert answered(lambda: Checkpoint.open(scratch)) is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x"])
def test_an_index_of_other_files(name: str, scratch: Path) -> None:
    (scratch / INDEX).write_bytes(spelled({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(scratch)


def test_names_twice_in_an_index(scratch: Path) -> None:
    (scratch / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="stands there twice"):
        Checkpoint.open(scratch)


@pytest.mark.parametrize(("file", "mib"), [(INDEX, 64), ("config.json", 16)])
def test_files_of_endless_text(file: str, mib: int, scratch: Path) -> None:
    """Refused by their size, without reading them: they are sparse, and larger than memory."""
    with (scratch / file).open("wb") as handle:
        handle.truncate(1 << 42)
    with pytest.raises(CheckpointError, match=f"larger than {mib} MiB"):
        _ = Checkpoint.open(scratch).config


# ---- directories ---------------------------------------------------------------------------------


def test_what_is_no_regular_file(scratch: Path) -> None:
    file = scratch / "model.safetensors"
    file.unlink()
    os.mkfifo(file)  # reading it would wait for ever
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(scratch)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(scratch)
    file.rmdir()
    file.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(scratch)
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(CheckpointError, match=r"cannot read|missing shard"):
        Checkpoint.open(scratch)


def test_links_to_weights_are_read_and_links_to_secrets_are_not_copied(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = copied("mixtral"), tmp_path / "out"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in model.glob("*.safetensors"):
        file.rename(elsewhere / file.name)
        file.symlink_to(elsewhere / file.name)
    (model / "NOTES.md").write_text("mine")
    (model / "README.md").symlink_to("NOTES.md")
    found = Checkpoint.open(model)
    apply_plan(found, plan_for(found, []), out)
    kept = out / "README.base.md"
    assert kept.read_text() == "mine" and not kept.is_symlink()
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (model / "tokenizer.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        apply_plan(found, plan_for(found, []), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_links_of_the_hub_cache_are_followed(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Its directories hold links into a folder beside them."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(copied("mixtral").iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    names = [file.name for file in Checkpoint.open(snapshot).other_files()]
    assert names == ["generation_config.json"]


class Marker:
    """Unpickling it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.file),))


PICKLES = ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "model.pkl"]


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_never_unpickled(name: str, copied: Callable[[str], Path]) -> None:
    model = copied("mixtral")
    marker = model.parent / "marker"
    content = pickle.dumps(Marker(marker))
    pickle.loads(content)
    marker.rmdir()
    (model / name).write_bytes(content)
    found = Checkpoint.open(model)  # beside safetensors: not read, and not copied
    apply_plan(found, plan_for(found, []), model.parent / "out")
    assert not (model.parent / "out" / name).exists()
    (model / INDEX).unlink()
    for file in model.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=f"no safetensors weights.*only {name}") as caught:
        Checkpoint.open(model)
    assert "save_pretrained" in caught.value.hint
    os.rename(model / name, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged file"):
        Checkpoint.open(model)
    assert not marker.exists()


# ---- memory and time -----------------------------------------------------------------------------


def test_headers_of_millions_of_brackets_take_bounded_memory(scratch: Path) -> None:
    """Nested as far as a file allows: refused with a few times its size."""
    file, size = scratch / "model.safetensors", 2_000_000
    write(file, b'{"a":[' + b"[]," * (size // 3) + b"1]}", b"")
    code = f"""
        import resource
        from pathlib import Path
        from moeprune.errors import CheckpointError
        from moeprune.models.checkpoint import read_header
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read_header(Path({str(file)!r}))
        except CheckpointError:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 50 * size


def test_many_tensors_are_read_quickly(scratch: Path) -> None:
    """Half as many as the largest published models have, and those in many files."""
    header = {
        f"model.layers.{n // 1000}.mlp.experts.{n % 1000}.down_proj.weight": {
            "dtype": "U8",
            "shape": [1],
            "data_offsets": [n, n + 1],
        }
        for n in range(50_000)
    }
    write(scratch / "model.safetensors", spelled(header), bytes(50_000))
    start = time.process_time()
    assert len(Checkpoint.open(scratch).tensors) == 50_000
    assert time.process_time() - start < 10


@pytest.mark.slow
@settings(max_examples=5000)
@given(header=mutations(HEADER) | st.dictionaries(TEXTS, ENTRIES, max_size=4))
def test_headers_at_length(header: Any, scratch: Path, answered: Answered) -> None:
    write(scratch / "model.safetensors", spelled(header))
    answered(lambda: is_read_alike(scratch / "model.safetensors"))


@pytest.mark.slow
@settings(max_examples=5000)
@given(content=damaged(struct.pack("<Q", len(spelled(HEADER))) + spelled(HEADER) + DATA))
def test_bytes_at_length(content: bytes, scratch: Path, answered: Answered) -> None:
    (scratch / "model.safetensors").write_bytes(content)
    answered(lambda: is_read_alike(scratch / "model.safetensors"))
