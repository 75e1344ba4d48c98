"""Prompts for generation: cut from held-out text, or a file of prompts and conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeprune.errors import DataError
from moeprune.evaluation.answers import Prompt
from moeprune.files import sha256_bytes
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.native import first_line
from moeprune.pipeline.inputs import Text, read_heldout

_FORM = 'a line each: {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True)
class Generate:
    """What to generate.

    Attributes:
        prompts: a JSONL file; None cuts prompts from held-out text.
        per_domain: prompts from each domain of the text, drawn by ``seed``.
        prompt_tokens: length of those.
        new_tokens: where an answer is cut.
        temperatures: one way of decoding each; 0 is greedy.
        seed: of the draw of prompts, and of sampling.
    """

    prompts: Path | None = None
    per_domain: int = 12
    prompt_tokens: int = 32
    new_tokens: int = 96
    temperatures: tuple[float, ...] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("per_domain", 1), ("prompt_tokens", 2), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise DataError(f"{name.replace('_', ' ')} must be at least {least}")
        if not self.temperatures or not all(0.0 <= t <= 100.0 for t in self.temperatures):
            raise DataError("a temperature lies between 0 (greedy) and 100")


def read_prompts(checkpoint: Checkpoint, text: Text, wanted: Generate) -> list[Prompt]:
    """The prompts, as tokens of the checkpoint's tokenizer.

    Raises:
        DataError: the file is not of its form, the tokenizer cannot format conversations, or there
            is no text.
    """
    if wanted.prompts is not None:
        return list(_from_file(checkpoint, wanted.prompts))
    windows = read_heldout(checkpoint, replace(text, sequences=0, length=wanted.prompt_tokens))
    drawn = data.draw(windows, wanted.per_domain * len(windows), wanted.seed)
    return [
        Prompt(domain.name, tuple(row)) for domain in drawn for row in domain.ids_NL.tolist()
    ]  # fmt: skip


def describe(prompts: list[Prompt]) -> dict[str, Any]:
    """Counts by domain, longest prompt, and the SHA-256 of all of them."""
    counts: dict[str, int] = {}
    for prompt in prompts:
        counts[prompt.domain] = counts.get(prompt.domain, 0) + 1
    spelled = json.dumps([[prompt.domain, prompt.ids] for prompt in prompts]).encode()
    return {
        "prompts": len(prompts),
        "domains": counts,
        "longest_prompt": max(len(prompt.ids) for prompt in prompts),
        "prompts_hash": sha256_bytes(spelled),
    }


def _from_file(checkpoint: Checkpoint, file: Path) -> Iterator[Prompt]:
    if not file.is_file():
        raise DataError(f"no such file of prompts: {file}", f"write JSONL, {_FORM}")
    tokenizer = data.load_tokenizer(checkpoint)
    known = checkpoint.config.get("vocab_size")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}", "convert it to UTF-8") from error
    entries = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not entries:
        raise DataError(f"{file} holds no prompts", f"write JSONL, {_FORM}")
    for number, line in entries:
        where = f"{file}, line {number}"
        entry = _entry(line, where)
        ids = _tokens(tokenizer, entry, where)
        if not ids:
            raise DataError(f"{where}: the prompt is empty", "leave it out")
        if isinstance(known, int) and max(ids) >= known:
            raise DataError(
                f"the tokenizer in {checkpoint.path} gives token {max(ids)}, the model knows "
                f"{known}",
                "copy tokenizer.json and tokenizer_config.json of this model into its directory",
            )
        yield Prompt(str(entry.get("domain", "prompts")), tuple(ids))


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON", _FORM) from error
    messages = entry.get("messages") if isinstance(entry, dict) else None
    chat = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if not isinstance(entry, dict) or not (isinstance(entry.get("prompt"), str) or chat):
        raise DataError(f"{where}: neither a prompt nor messages", _FORM)
    return entry


def _tokens(tokenizer: Any, entry: dict[str, Any], where: str) -> list[int]:
    if "messages" not in entry:
        ids: list[int] = tokenizer(entry["prompt"], verbose=False)["input_ids"]
        return ids
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} holds messages, and the tokenizer has no chat template",
            'give plain {"prompt": "..."} lines, or a tokenizer with a chat_template',
        )
    try:
        made: list[int] = tokenizer.apply_chat_template(
            entry["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates are programs of strangers
        raise DataError(
            f"{where}: the chat template refuses the messages: {first_line(error)}"
        ) from error
    return made
