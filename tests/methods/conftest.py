"""Tiny models that can read text, and slow but obvious ways to look inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from families import VOCABULARY, experts_modules, save_tiny, token_ids
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.pipeline import stages
from moeprune.pipeline.inputs import read_calibration
from support import layer_of

LENGTH = 32
SEQUENCES = 24


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> stages.Text:
    """Random printable characters, which the tokenizer that ``readable`` adds reads one by one."""
    file = tmp_path_factory.mktemp("text") / "characters.txt"
    ids = token_ids(1, LENGTH * (SEQUENCES + 16), vocab=94, seed=5)[0] + 32
    file.write_text("".join(chr(i) for i in ids.tolist()), encoding="utf-8")
    return stages.Text(sources=(str(file),), sequences=SEQUENCES, length=LENGTH, seed=1)


def readable(directory: Path) -> Path:
    """Add a tokenizer to a checkpoint: a character's id is its ASCII code."""
    plain = Tokenizer(WordLevel({chr(i): i for i in range(VOCABULARY)}, unk_token=chr(0)))
    plain.pre_tokenizer = Split(Regex("."), "isolated")  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="~").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint with a tokenizer; tests must not write there."""
    saved: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in saved:
            saved[model_type] = readable(save_tiny(model_type, tmp_path_factory.mktemp(model_type)))
        return saved[model_type]

    return get


def calibration_ids(model: Path, text: stages.Text) -> Tensor:
    """The token ids [N, L] that calibration reads."""
    checkpoint = Checkpoint.open(model)
    return torch.cat([domain.ids_NL for domain in read_calibration(checkpoint, text)])


@contextmanager
def batch_of(monkeypatch: pytest.MonkeyPatch, tokens: int) -> Iterator[None]:
    """Walks in batches of about ``tokens`` tokens."""
    with monkeypatch.context() as patch:
        patch.setattr(data, "TOKENS_PER_BATCH", tokens)
        yield


@dataclass
class Seen:
    """What one experts module was called with and what it gave back."""

    x_TH: Tensor
    index_TK: Tensor
    gate_TK: Tensor
    y_TH: Tensor


def watch(model: PreTrainedModel, ids_NL: Tensor) -> dict[int, Seen]:
    """Run the whole model, note what every experts module saw, by layer."""
    seen: dict[int, Seen] = {}
    handles = []
    for name, module in experts_modules(model).items():

        def note(
            _: Any, args: tuple[Tensor, ...], output: Tensor, layer: int = layer_of(name)
        ) -> None:
            x_TH, index_TK, gate_TK = args
            seen[layer] = Seen(x_TH.clone(), index_TK.clone(), gate_TK.float(), output.clone())

        handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(ids_NL, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def experts_of(model: PreTrainedModel, layer: int) -> Any:
    """The experts module of one layer."""
    return next(m for n, m in experts_modules(model).items() if layer_of(n) == layer)


def hidden_and_output(experts: Any, expert: int, x_nH: Tensor) -> tuple[Tensor, Tensor]:
    """act(G x) * (U x) and D of it, for experts without biases stored as [out, in]."""
    gate_nI, up_nI = (x_nH @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
    h_nI = torch.nn.functional.silu(gate_nI) * up_nI
    return h_nI, h_nI @ experts.down_proj[expert].T
