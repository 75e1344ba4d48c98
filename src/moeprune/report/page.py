"""What every page has: templates that escape, and scripts that are named by their hash."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def environment() -> Environment:
    """Templates in which everything is escaped and nothing may be missing."""
    return Environment(
        loader=PackageLoader("moeprune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def scripts(*names: str) -> dict[str, object]:
    """``scripts``, the texts of our own scripts, and ``policy``, which lets only these run.

    Nothing may be fetched: ``default-src 'none'``. Scripts are named by their SHA-256, so that a
    name that slipped through as markup could still not run. Styles are inline.
    """
    folder = files("moeprune.report") / "templates"
    texts = ["\n" + (folder / name).read_text(encoding="utf-8") for name in names]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in texts
    )
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    return {"scripts": [Markup(text) for text in texts], "policy": policy}
