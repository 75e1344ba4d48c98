"""Answers of a transformers model to prompts: batches, padded on the left, the same noise for all.

Axes: B prompts of a batch, L tokens of the longest of them, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from moeprune.errors import DataError, UnsupportedModelError
from moeprune.models.native import quiet_transformers, text_config

PROMPTS_PER_BATCH = 16
"""Fixed: rounding depends on what is computed together."""


@dataclass(frozen=True)
class Prompt:
    """What a model is to continue or answer.

    Attributes:
        domain: for tables.
        ids: its tokens.
    """

    domain: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise softmax(logits / temperature) is drawn
            from, without top-k or top-p.
        new_tokens: where an answer is cut.
        seed: of the draw.
    """

    temperature: float = 0.0
    new_tokens: int = 96
    seed: int = 0

    @property
    def name(self) -> str:
        """For tables."""
        return f"temperature {self.temperature:g}" if self.temperature else "greedy"


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        ids: new tokens, without the end token.
        ended: whether it ended by itself; otherwise it was cut.
    """

    ids: tuple[int, ...]
    ended: bool


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Says that a model is broken where torch would speak of a probability tensor."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, unchanged."""
        if bool(scores.isnan().any()) or bool((scores == torch.inf).any()):
            raise UnsupportedModelError(
                "the model's logits are not finite: it cannot generate",
                "moeprune verify MODEL says what is wrong; float16 overflows: try --dtype bfloat16",
            )
        return scores


def end_tokens(model: Any) -> tuple[int, ...]:
    """The tokens that end an answer, by the model's generation settings or its configuration."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = getattr(text_config(model.config), "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)


def refuse_too_long(model: Any, prompts: Sequence[Prompt], new_tokens: int) -> None:
    """Raise ``DataError`` if prompts and answers do not fit what the model was built for."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    longest = max(len(prompt.ids) for prompt in prompts)
    if isinstance(limit, int) and longest + new_tokens > limit > 1:
        raise DataError(
            f"a prompt of {longest} tokens and {new_tokens} new ones are more than the {limit} "
            "positions of the model",
            f"--new-tokens {limit - longest}" if limit > longest else "give shorter prompts",
        )


@torch.no_grad()
def answer(
    model: Any,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Answers to all prompts, through transformers' ``generate`` with its cache.

    Sampled answers of two models to the same prompts, with the same decoding, share their random
    numbers: models that are the same give the same answers, and differences are less noisy.

    Args:
        model: a transformers model; its generation settings are left out of account, but for the
            end tokens.
        prompts: what to answer.
        decoding: how.
        progress: told (prompts done, prompts in all).

    Raises:
        DataError: a prompt is empty, or too long for the model.
        UnsupportedModelError: the logits are not finite.
    """
    if not all(prompt.ids for prompt in prompts):
        raise DataError("a prompt is empty", "leave it out")
    refuse_too_long(model, prompts, decoding.new_tokens)
    ends, before = end_tokens(model), model.generation_config
    model.generation_config = _settings(decoding, ends)
    found: list[Answer] = []
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        for start in range(0, len(prompts), PROMPTS_PER_BATCH):
            part = prompts[start : start + PROMPTS_PER_BATCH]
            ids_BL, mask_BL = _padded(part, ends[0] if ends else 0, model.device)
            with quiet_transformers(), torch.random.fork_rng(devices):
                torch.manual_seed(decoding.seed * 1_000_003 + start)
                made = model.generate(
                    ids_BL,
                    attention_mask=mask_BL,
                    logits_processor=LogitsProcessorList([_Finite()]),
                )
            found += [_cut(row, ends) for row in made[:, ids_BL.shape[1] :].tolist()]
            progress(len(found), len(prompts))
    finally:
        model.generation_config = before
    return found


def _settings(decoding: Decoding, ends: tuple[int, ...]) -> GenerationConfig:
    chosen: dict[str, Any] = {"do_sample": False}
    if decoding.temperature:
        chosen = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=decoding.new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
        **chosen,
    )


def _padded(prompts: Sequence[Prompt], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask; the mask tells pads from an end token inside a prompt."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids_BL = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask_BL[row, longest - len(prompt.ids) :] = 1
    return ids_BL.to(device), mask_BL.to(device)


def _cut(row: list[int], ends: tuple[int, ...]) -> Answer:
    """Up to the first end token; what follows it is padding."""
    for place, token in enumerate(row):
        if token in ends:
            return Answer(tuple(row[:place]), True)
    return Answer(tuple(row), False)
