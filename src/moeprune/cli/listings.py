"""The commands that tell what there is: of a model, of all architectures, of the methods."""

from __future__ import annotations

from moeprune.cli import output
from moeprune.cli.options import (
    AsJson,
    Model,
    Trust,
)


def inspect(model: Model, trust_remote_code: Trust = False, as_json: AsJson = False) -> None:
    """Say what a checkpoint is, without reading its weights.

    Example: `moeprune inspect demo`
    """
    from moeprune.pipeline import stages

    facts = stages.inspect(model, trust_remote_code)
    if as_json:
        output.print_json(facts)
    else:
        hidden = ("name", "can", "reason", "supported")
        shown = {name: value for name, value in facts.items() if name not in hidden}
        output.print_facts(facts["name"], shown | facts["can"])


def methods(as_json: AsJson = False) -> None:
    """List the methods with their sources, budgets and options.

    Example: `moeprune methods`
    """
    from dataclasses import fields

    from moeprune.core.method import methods as known

    listed = [
        {
            "name": name,
            "summary": kind.summary,
            "source": kind.source,
            "budgets": list(kind.budgets),
            "needs": list(kind.needs),
            "options": {field.name: field.default for field in fields(kind)},
        }
        for name, kind in known().items()
    ]
    if as_json:
        output.print_json(listed)
        return
    for entry in listed:
        name = str(entry.pop("name"))
        output.print_facts(name, entry)
    output.OUT.print(
        "Methods that zero weights keep all tensors dense: no mainstream server is smaller or "
        "faster for zeros (2026). 'bytes' in tables is what is on disk, another column counts "
        "non-zeros.",
        soft_wrap=True,
    )


def models(as_json: AsJson = False) -> None:
    """List the architectures of transformers and what was measured about each.

    Example: `moeprune models`
    """
    from moeprune.pipeline.inspection import architectures

    result = architectures()
    if as_json:
        output.print_json(result)
        return
    rows = [
        {"model_type": name, **{column: text.partition(":")[0] for column, text in found.items()}}
        for name, found in result["architectures"].items()
    ]
    output.print_rows(f"tiny random models, transformers {result['transformers']}", rows)
    for column, text in result["columns"].items():
        output.OUT.print(f"{column}: {text}", soft_wrap=True)
    if result["transformers"] != result["installed"]:
        output.note(
            f"warning: measured with transformers {result['transformers']}, "
            f"{result['installed']} is installed"
        )
