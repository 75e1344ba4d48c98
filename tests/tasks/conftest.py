"""A folder of a few questions of our own, in the columns of the harness's data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "grey")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def arc(colour: str, at: int) -> dict[str, Any]:
    other = [c for c in COLOURS if c != colour][: 2 + at % 2]
    texts = [*other[:1], f"It is {colour}.", *other[1:]]
    labels = list("ABCD")[: len(texts)]
    return {
        "id": str(at),
        "question": f"Which colour has a {colour} house number {at}?",
        "choices": {"text": texts, "label": labels},
        "answerKey": "B",
    }


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME.jsonl of six tasks, a training file of one, one file for a whole group."""
    folder = tmp_path_factory.mktemp("questions")
    write(folder / "arc_easy.jsonl", [arc(c, i) for i, c in enumerate(COLOURS)])
    write(folder / "arc_easy_train.jsonl", [arc(c, i + 50) for i, c in enumerate(COLOURS)])
    write(
        folder / "hellaswag.jsonl",
        [
            {
                "ind": i,
                "activity_label": "Painting",
                "ctx_a": f"A man takes {colour} paint.",
                "ctx_b": "he",
                "ctx": f"A man takes {colour} paint. he",
                "endings": ["paints [step] a wall.", "eats it.", "sings a very long song.", "goes"],
                "source_id": "own",
                "split": "val",
                "split_type": "own",
                "label": str(i % 4),
            }
            for i, colour in enumerate(COLOURS[:5])
        ],
    )
    write(
        folder / "winogrande.jsonl",
        [
            {
                "sentence": f"Ann gave Mary the {colour} ball because _ wanted to play.",
                "option1": "Ann",
                "option2": "Mary",
                "answer": "12"[i % 2],
            }
            for i, colour in enumerate(COLOURS[:5])
        ],
    )
    write(
        folder / "boolq.jsonl",
        [
            {"question": f"is the sky {colour}", "passage": "The sky is blue.", "label": i % 2}
            for i, colour in enumerate(COLOURS[:5])
        ],
    )
    write(folder / "wikitext.jsonl", [{"page": " = Colours = \n" + "Red and green . " * 40}])
    write(folder / "gsm8k.jsonl", [{"question": "One and one?", "answer": "#### 2"}])
    pair = {"sentence_good": "The dogs bark.", "sentence_bad": "The dogs barks."}
    write(
        folder / "mmlu.jsonl",
        [
            {"question": f"{s}?", "subject": s, "choices": ["1", "2", "3", "4"], "answer": i % 4}
            for i, s in enumerate(("anatomy", "astronomy", "virology"))
        ],
    )
    write(folder / "blimp_adjunct_island.jsonl", [pair])
    return folder
