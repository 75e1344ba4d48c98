"""Nonsense in config.json: refused before anything is built, or of no consequence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from families import moe_model_types
from fuzz import absurd
from fuzz.values import JSON, mutations, spelled
from moeprune.core.budget import Budget
from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.models.checkpoint import INDEX, Checkpoint, demo_path
from moeprune.pipeline.inputs import Text, read_heldout
from moeprune.pipeline.inspection import inspect
from moeprune.pipeline.stages import apply, plan

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss", "granitemoe", "nemotron_h")
Answered = Callable[[Callable[[], Any]], Any]
Tiny = Callable[[str], Path]


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Callable[[str, bytes], Path]:
    """A directory with the weights of a family and this config.json."""

    def put(model_type: str, config: bytes) -> Path:
        folder = tmp_path / model_type
        if not folder.exists():
            folder.mkdir()
            absurd.linked(tiny(model_type), folder)
        (folder / "config.json").write_bytes(config)
        return folder

    return put


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def is_used(directory: Path, out: Path) -> None:
    """All that can be done without text."""
    facts = inspect(directory)
    if facts["supported"]:
        decided = plan(directory, "moeits", Budget(ratio=0.5))
        apply(directory, decided, out, force=True)


@given(data=st.data())
@settings(max_examples=80)
def test_configurations(
    data: st.DataObject, tiny: Tiny, place: Callable[..., Path], tmp_path: Path, answered: Answered
) -> None:
    model_type = data.draw(st.sampled_from(FAMILIES))
    config = data.draw(mutations(config_of(tiny(model_type))))
    folder = place(model_type, spelled(config))
    before = {*tmp_path.iterdir(), *folder.iterdir()}
    answered(lambda: is_used(folder, tmp_path / "out"))
    assert {*tmp_path.iterdir(), *folder.iterdir()} <= before | {tmp_path / "out"}


@given(name=st.sampled_from(FAMILIES), config=JSON)
@settings(max_examples=40)
def test_a_model_type_and_nonsense(
    name: str, config: Any, place: Callable[..., Path], answered: Answered
) -> None:
    config = {**config, "model_type": name} if isinstance(config, dict) else config
    folder = place("mixtral", spelled(config))
    answered(lambda: inspect(folder))


# ---- named lies ----------------------------------------------------------------------------------

LIES: dict[str, tuple[str, Any]] = {
    "a billion layers": ("num_hidden_layers", 10**9),
    "more layers than tensors": ("num_hidden_layers", 200),
    "layers of 19 digits": ("num_hidden_layers", 2**63),
    "a number of 400 digits": ("num_hidden_layers", 10**400),
    "a billion experts": ("num_local_experts", 10**9),
    "experts whose router is larger than all": ("num_local_experts", 8000),
    "a billion experts per token": ("num_experts_per_tok", 10**9),
    "width": ("hidden_size", 10**15),
    "width that no tensor has": ("hidden_size", 33),
    "vocabulary": ("vocab_size", 10**12),
    "vocabulary that no tensor has": ("vocab_size", 127),
    "heads": ("num_attention_heads", -(10**9)),
    "head": ("head_dim", 2**31),
    "positions": ("max_position_embeddings", 10**15),
    "rotated share": ("partial_rotary_factor", 1e9),
    "rotated share of text, which Python repeats": ("partial_rotary_factor", "8"),
    "inside a list": ("layer_widths", [1, [10**9]]),
    "inside an object": ("text_config", {"num_hidden_layers": 10**9}),
    "in an object inside an object": ("rope_parameters", {"a": {"dim": 10**9}}),
}


@pytest.mark.parametrize("name", LIES)
def test_absurd_sizes_are_refused_before_anything_is_built(
    name: str, tiny: Tiny, place: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value = LIES[name]
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **b: pytest.fail("was built"))
    folder = place("mixtral", spelled({**config_of(tiny("mixtral")), key: value}))
    with pytest.raises(CheckpointError, match=r"config\.json: .* is .*, but") as caught:
        inspect(folder)
    assert "do not belong together" in caught.value.hint


@pytest.mark.parametrize("names", [["config.4.0.0.json"], "../config.json", []])
def test_other_configuration_files(names: Any, tiny: Tiny, place: Callable[..., Path]) -> None:
    """transformers would read one of them instead of the one that was checked."""
    folder = place("mixtral", spelled({**config_of(tiny("mixtral")), "configuration_files": names}))
    with pytest.raises(UnsupportedModelError, match="other configuration files"):
        inspect(folder)


@pytest.mark.parametrize("dtype", ["int8", "load", "float99", "complex64", 5])
def test_dtypes_that_no_model_has(dtype: Any, tiny: Tiny, place: Callable[..., Path]) -> None:
    folder = place("mixtral", spelled({**config_of(tiny("mixtral")), "dtype": dtype}))
    with pytest.raises(UnsupportedModelError):
        inspect(folder)


@pytest.mark.parametrize("named", [5, [], {"a": 1}, "MixtralForCausalLM", None])
def test_architectures_of_any_kind(named: Any, tiny: Tiny, place: Callable[..., Path]) -> None:
    folder = place("mixtral", spelled({**config_of(tiny("mixtral")), "architectures": named}))
    assert inspect(folder)["architecture"] == "?"


@pytest.mark.parametrize("given", [-5, 0, 1])
def test_positions_that_are_no_limit(given: Any, tmp_path: Path) -> None:
    """The length of sequences is limited by what can be a limit."""
    text = tmp_path / "a.txt"
    text.write_text("many words " * 200)
    shutil.copytree(demo_path(), tmp_path / "model")
    config = {**config_of(tmp_path / "model"), "max_position_embeddings": given}
    (tmp_path / "model" / "config.json").write_bytes(spelled(config))
    [domain] = read_heldout(Checkpoint.open(tmp_path / "model"), Text((str(text),), 1, 16))
    assert domain.ids_NL.shape == (1, 16)


@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
def test_experts_that_are_missing_or_too_many(part: str, copied: Tiny) -> None:
    model = copied("mixtral")
    tensors = {
        name: tensor
        for file in model.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    for file in [*model.glob("*.safetensors"), model / INDEX]:
        file.unlink()
    name = f"model.layers.1.block_sparse_moe.experts.5.{part}.weight"
    for other in (None, name.replace("experts.5", "experts.8")):
        changed = {n: t for n, t in tensors.items() if n != name}
        save_file(changed | ({other: tensors[name]} if other else {}), model / "model.safetensors")
        with pytest.raises(CheckpointError, match="layer 1 has 8 experts"):
            plan(model, "moeits", Budget(ratio=0.5))


def absurdities(values: list[Any], folders: list[Path]) -> None:
    """One absurd number after the other, in a process with little memory."""
    command = [sys.executable, absurd.__file__, json.dumps(values), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["tried"] > 40 * len(folders)
    assert not found["wrong"]
    assert found["grown_mib"] < 100 + 20 * len(folders)


def test_absurd_numbers(tiny: Tiny) -> None:
    folders = [tiny(name) for name in ("mixtral", "deepseek_v2")]
    absurdities([10**9, -1], folders)


@pytest.mark.slow
@pytest.mark.parametrize("values", [[10**9, 10**15, -1, 0], [8192, 2**40, 1e300, "8"]], ids=str)
def test_absurd_numbers_in_every_family(values: list[Any], tiny: Tiny) -> None:
    names = moe_model_types()
    for some in (names[start : start + 10] for start in range(0, len(names), 10)):
        absurdities(values, [tiny(name) for name in some])


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=3000)
def test_configurations_at_length(
    data: st.DataObject, tiny: Tiny, place: Callable[..., Path], tmp_path: Path, answered: Answered
) -> None:
    model_type = data.draw(st.sampled_from(moe_model_types()))
    config = data.draw(mutations(config_of(tiny(model_type))))
    folder = place(model_type, spelled(config))
    answered(lambda: is_used(folder, tmp_path / "out"))
