"""The options of ``evaluate`` that concern tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from moeprune.pipeline.evaluating import Section

Tasks = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Tasks of lm-evaluation-harness, comma-separated; **blimp_sample** (in the package); "
        "or a protocol: **moe-pruner**, **mone**, **moeits**."
    ),
]
Limit = Annotated[Optional[int], typer.Option(help="The first so many questions of every task.")]  # noqa: UP045
TaskData = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder with the tasks' data as **NAME.jsonl**; nothing is fetched then."),
]
IncludePath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder with task files of the harness's form."),
]
NumFewshot = Annotated[Optional[int], typer.Option(help="Examples before each question.")]  # noqa: UP045
Door = Annotated[
    str,
    typer.Option(
        help="**streamed**: a layer at a time, teacher and student in one pass. **whole**: models "
        "in memory, one after the other; generates text as well."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Rows that go through together.")]


def task_sections(
    tasks: str | None,
    limit: int | None,
    data: Path | None,
    include: Path | None,
    shots: int | None,
    door: str,
    batch_size: int,
) -> dict[str, Section]:
    """What an evaluation is to measure besides text; what is wrong with it shows here."""
    if tasks is None:
        return {}
    from moeprune.pipeline.tasks import TaskOptions
    from moeprune.pipeline.tasks import Tasks as Measured

    names = tuple(name for part in tasks.split(",") if (name := part.strip()))
    measured = Measured(TaskOptions(names, limit, data, include, shots, door, batch_size))
    return {"tasks": measured.tasks, "protocols": measured.protocols}
