"""Python files that a checkpoint brings run with ``--trust-remote-code`` and never without."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, dynamic_module_utils

import moeprune
from families import save_tiny
from moeprune.errors import UnsupportedModelError
from moeprune.models.checkpoint import demo_path
from running import Run

MARK = """
from pathlib import Path
Path({folder!r}, __name__.rpartition(".")[2]).touch()
"""
CONFIGURATION = """
from transformers import OlmoeConfig


class StrangeConfig(OlmoeConfig):
    model_type = "strange"
"""
MODELING = """
from transformers import {config}, OlmoeForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

register_checkpoint_conversion_mapping(
    "strange", get_checkpoint_conversion_mapping("olmoe"), overwrite=True
)


class StrangeForCausalLM(OlmoeForCausalLM):
    config_class = {config}

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 0 * output.logits
        return output
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast


class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""
Make = Callable[..., Path]


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[str]]]:
    """The files of a checkpoint that have run; transformers' copies of them stay below ``tmp``."""
    folder, cache = tmp_path / "marks", tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    # what other tests imported is a package elsewhere, in which these files would not be found
    path, others = list(sys.path), _copies()
    for name in others:
        del sys.modules[name]
    yield lambda: {file.name for file in folder.iterdir()}
    for name in _copies():
        del sys.modules[name]
    sys.modules.update(others)
    sys.path[:] = path


def _copies() -> dict[str, ModuleType]:
    """The modules that transformers has imported from checkpoints."""
    return {n: m for n, m in sys.modules.items() if n.startswith("transformers_modules")}


@pytest.fixture
def make(tmp_path: Path, marks: object) -> Make:
    """A small model with a tokenizer and code of its own."""

    def save(strange: bool = False, tokenizer: bool = False) -> Path:
        path = save_tiny("olmoe", tmp_path / "model", vocab_size=6144)
        config = json.loads((path / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_strange.StrangeForCausalLM"}
        if strange:
            config["model_type"] = "strange"
            config["auto_map"]["AutoConfig"] = "configuration_strange.StrangeConfig"
        (path / "config.json").write_text(json.dumps(config))
        for file in demo_path().glob("tokenizer*"):
            (path / file.name).write_bytes(file.read_bytes())
        if tokenizer:
            facts = json.loads((path / "tokenizer_config.json").read_text())
            facts["auto_map"] = {"AutoTokenizer": [None, "tokenization_strange.StrangeTokenizer"]}
            (path / "tokenizer_config.json").write_text(json.dumps(facts))
        mark = MARK.format(folder=str(tmp_path / "marks"))
        (path / "configuration_strange.py").write_text(mark + CONFIGURATION)
        modeling = MODELING.format(config="OlmoeConfig")
        if strange:
            modeling = modeling.replace("import OlmoeConfig, ", "import ").replace(
                "    config_class = OlmoeConfig",
                "    from .configuration_strange import StrangeConfig as config_class",
            )
        (path / "modeling_strange.py").write_text(mark + modeling)
        (path / "tokenization_strange.py").write_text(mark + TOKENIZATION)
        return path

    return save


def commands(model: Path, small: tuple[str, ...], *trust: str) -> dict[str, list[object]]:
    """Every command that opens a model; later ones read what earlier ones wrote."""
    deleting = ["--method", "moeits", "--ratio", "0.5"]
    return {
        "inspect": ["inspect", model, *trust],
        "calibrate": ["calibrate", model, "--out", "stats", *small, *trust],
        "plan": ["plan", model, *deleting, "--out", "plan.json", *trust],
        "apply": ["apply", model, "--plan", "plan.json", "--out", "smaller", *trust],
        "prune": ["prune", model, *deleting, "--out", "pruned", *trust],
        "evaluate": ["evaluate", model, "--teacher", model, *_windows(small), *trust],
        "recover": [
            "recover", "smaller", "--teacher", model, "--layerwise", "--out", "healed",
            "--steps", "2", "--batch", "2", "--sequences", "12", "--length", "32", *trust,
        ],
    }  # fmt: skip


def _windows(small: tuple[str, ...]) -> list[str]:
    return [*small[:2], "--sequences", "2", *small[4:]]


def perplexity(out: str) -> float:
    return float(json.loads(out)["domains"]["english"]["perplexity"])


@pytest.mark.parametrize("tokenizer", [False, True])
def test_native_classes_are_used_without_the_flag(
    run: Run,
    make: Make,
    marks: Callable[[], set[str]],
    small: tuple[str, ...],
    tokenizer: bool,
) -> None:
    for name, command in commands(make(tokenizer=tokenizer), small).items():
        done = run(*command)
        assert done.code == 0, (name, done.err)
    moeprune.load("model")
    assert marks() == set()


def test_unknown_models_are_refused_without_the_flag(
    run: Run, make: Make, marks: Callable[[], set[str]], small: tuple[str, ...], novices: Path
) -> None:
    model = make(strange=True)
    refused = commands(model, small)
    del refused["recover"]  # whose student is what the others have not written
    for name, command in refused.items():
        done = run(
            *[novices if part == "plan.json" and name == "apply" else part for part in command]
        )
        assert done.code == 2, name
        assert "--trust-remote-code" in done.err and len(done.err.strip().splitlines()) == 2
    with pytest.raises(UnsupportedModelError, match="strange"):
        moeprune.load(model)
    assert marks() == set()


@pytest.mark.parametrize("strange", [False, True])
def test_their_own_classes_are_used_with_the_flag(
    run: Run,
    make: Make,
    marks: Callable[[], set[str]],
    small: tuple[str, ...],
    strange: bool,
) -> None:
    model = make(strange=strange, tokenizer=True)
    for name, command in commands(model, small, "--trust-remote-code").items():
        done = run(*command)
        assert done.code == 0, (name, done.err)
        if name == "inspect":
            assert marks() >= {"modeling_strange"}
    code = {"modeling_strange", "tokenization_strange"}
    assert marks() == code | ({"configuration_strange"} if strange else set())
    if strange:
        done = run(*commands(model, small)["recover"], "--force")
        assert done.code == 2 and "--trust-remote-code" in done.err
    # the class of the model makes all tokens equally likely
    windows = _windows(small)
    done = run("evaluate", "smaller", *windows, "--trust-remote-code", "--json")
    assert perplexity(done.out) == pytest.approx(6144, rel=1e-3)
    if not strange:
        assert perplexity(run("evaluate", "smaller", *windows, "--json").out) > 6200
    opened = moeprune.load("smaller", trust_remote_code=True)
    assert type(opened).__name__ == "StrangeForCausalLM"
    assert not opened(torch.tensor([[5, 6]])).logits.any()


def test_novices_are_not_made_of_classes_that_are_not_ours(
    run: Run, make: Make, small: tuple[str, ...]
) -> None:
    command = ["prune", make(), "--method", "mone", "--ratio", "0.5", "--out", "out", *small]
    done = run(*command, "--trust-remote-code")
    assert done.code == 2 and "classes of its own" in done.err
    assert not Path("out").exists()
    # what was kept is of that code
    assert run(*command).code == 2
    assert run(*command, "--force").code == 0


def test_code_that_fails_is_said_to(run: Run, make: Make) -> None:
    model = make()
    (model / "modeling_strange.py").write_text("1 / 0")
    done = run("inspect", model, "--trust-remote-code")
    assert done.code == 2 and "cannot be loaded" in done.err and "division by zero" in done.err
    (model / "modeling_strange.py").unlink()
    done = run("inspect", model, "--trust-remote-code")
    assert done.code == 2 and "cannot be loaded" in done.err


def test_experts_that_are_not_those_of_transformers(
    run: Run, tmp_path: Path, marks: object
) -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        auto_map={"AutoModelForCausalLM": "modeling_strange.Strange"},
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    code = "from transformers import LlamaForCausalLM\nclass Strange(LlamaForCausalLM): pass"
    (tmp_path / "model/modeling_strange.py").write_text(code)
    assert "is a dense model (llama)" in run("inspect", "model").err
    done = run("inspect", "model", "--trust-remote-code", "--json")
    facts = json.loads(done.out)
    assert not facts["supported"] and "their experts cannot be found" in facts["reason"]


@pytest.mark.parametrize("trust", [(), ("--trust-remote-code",)], ids=["plain", "trusted"])
def test_generated_files_never_run_from_a_checkpoint(
    run: Run,
    make: Make,
    marks: Callable[[], set[str]],
    small: tuple[str, ...],
    trust: tuple[str, ...],
) -> None:
    run("prune", make(), "--method", "mone", "--ratio", "0.5", "--out", "novices", *small)
    for name in ("modeling_moeprune.py", "moeprune_novices.py"):
        file = Path("novices") / name
        file.write_text(MARK.format(folder=str(Path.cwd() / "marks")) + file.read_text())
    for command in (["inspect", "novices"], ["evaluate", "novices", *_windows(small)]):
        assert run(*command, *trust).code == 0
    opened = moeprune.load("novices", trust_remote_code=bool(trust))
    assert type(opened).__module__.startswith("moeprune.")
    assert marks() == set()


def test_the_traps_work(make: Make, marks: Callable[[], set[str]]) -> None:
    """transformers runs all three files when it is told to."""
    model: Any = make(strange=True, tokenizer=True)
    AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    moeprune.load(model, trust_remote_code=True)
    assert len(marks()) == 3 and all(re.fullmatch(r"\w+_strange", name) for name in marks())


def test_attention_code_from_elsewhere_is_refused(run: Run, make: Make) -> None:
    """transformers would fetch it by that name and run it."""
    model = make()
    config = json.loads((model / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        (model / "config.json").write_text(json.dumps({**config, key: "someone/kernel"}))
        done = run("inspect", model)
        assert done.code == 2 and "code from elsewhere" in done.err, done
