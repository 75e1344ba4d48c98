"""A model that only code in its own directory knows: refused, and that code does not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from running import Run
from support import tree
from vendor_configs import DEEPSEEK_MOE


@pytest.mark.parametrize("command", ["inspect", "calibrate", "plan", "prune", "evaluate"])
def test_refused(command: str, run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(DEEPSEEK_MOE))
    save_file({"a": torch.zeros(1)}, model / "model.safetensors")
    for name in ("configuration_deepseek", "modeling_deepseek"):
        (model / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').touch()\n")
    before = tree(tmp_path)
    options: tuple[object, ...] = ("--method", "moeits", "--keep", 6)
    options = options if command in ("plan", "prune") else ()
    options += () if command in ("inspect", "evaluate") else ("--out", tmp_path / "out")
    done = run(command, model, *options)
    assert done.code == 2
    problem, hint = done.err.splitlines()
    assert problem.startswith("error: transformers ")
    assert "'deepseek'" in problem
    assert "is not run" in problem
    assert "deepseek_v2" in hint
    assert tree(tmp_path) == before
