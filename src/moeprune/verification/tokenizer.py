"""Rules about the tokenizer and the chat template."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from moeprune.errors import DataError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import load_tokenizer
from moeprune.verification.finding import ERROR, NOTE, Finding, Found, Rule, Skip
from moeprune.verification.shards import read_json
from moeprune.verification.subject import Subject, number

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "spiece.model", "tiktoken.model", "tekken.json",
)  # fmt: skip
_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def _file(subject: Subject) -> str | None:
    return next((name for name in _FILES if (subject.path / name).is_file()), None)


def tokenizer(subject: Subject) -> Found:
    """It opens, and the model knows every token that it gives."""
    file = _file(subject)
    if file is None:
        problem = "there is no tokenizer"
        remedy = (
            "copy tokenizer.json and tokenizer_config.json of the original, to use it with text"
        )
        yield Finding("tokenizer", NOTE, _FILES[0], None, problem, remedy)
        return
    settings = read_json(subject.path / _SETTINGS)
    if isinstance(settings, dict) and "auto_map" in settings:
        raise Skip("the tokenizer is remote code, which is never run")
    if "model_type" not in subject.config:
        raise Skip("config.json has no model_type")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = load_tokenizer(Checkpoint(subject.path))
    except DataError as error:
        problem = error.problem.replace(f"{subject.path}: ", "")
        yield Finding(
            "tokenizer", ERROR, file, None, problem, "copy the original's tokenizer files"
        )
        return
    highest, size = max(opened.get_vocab().values()), number(subject.text, "vocab_size")
    if size is not None and highest >= size:
        problem = f"it gives token {highest}, but the model knows {size}"
        remedy = "copy the tokenizer of this model, or correct vocab_size and the embeddings"
        yield Finding("tokenizer", ERROR, file, None, problem, remedy)


class _Generation(Extension):
    """transformers' own tag around what a model says; parsed and dropped."""

    tags = {"generation"}  # noqa: RUF012  (jinja reads it from the class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body, without the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _templates(subject: Subject) -> Iterator[tuple[str, Any]]:
    settings = read_json(subject.path / _SETTINGS)
    entry = settings.get("chat_template") if isinstance(settings, dict) else None
    for part in entry if isinstance(entry, list) else [entry]:
        text = part.get("template") if isinstance(part, dict) else part
        if text is not None:
            yield _SETTINGS, text
    files = [subject.path / _TEMPLATE, *subject.path.glob("additional_chat_templates/*.jinja")]
    for file in files:
        if file.is_file():
            yield str(file.relative_to(subject.path)), file.read_bytes().decode(errors="replace")


def chat_template(subject: Subject) -> Found:
    """Jinja that can be parsed; it is never rendered."""
    templates = list(_templates(subject))
    if not templates:
        raise Skip("there is no chat template")
    environment = Environment(autoescape=False, extensions=[loopcontrols, _Generation])
    for file, text in templates:
        try:
            environment.parse(text if isinstance(text, str) else "{% not a text %}")
        except TemplateSyntaxError as error:
            problem = f"the chat template cannot be parsed: line {error.lineno}: {error.message}"
            yield Finding("chat-template", ERROR, file, None, problem, "copy the original's")


RULES = (
    Rule("tokenizer", "the tokenizer opens, and the model knows all its tokens", tokenizer),
    Rule("chat-template", "the chat template can be parsed; it is never rendered", chat_template),
)
