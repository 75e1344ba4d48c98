"""The command ``models``."""

from __future__ import annotations

from moeprune.cli import output
from moeprune.cli.options import AsJson


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
