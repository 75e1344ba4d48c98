"""``verify``: exit codes, pure JSON, and lines that a person can act on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from moeprune.verification.run import RULES
from running import Run


def test_a_clean_checkpoint_exits_0(run: Run, smaller: Path) -> None:
    done = run("verify", smaller, "--against", "demo", "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert result["format"] == "moeprune.verification/1"
    assert result["passed"] is True and result["findings"] == []
    assert result["errors"] == result["warnings"] == 0
    assert result["comparison"]["logits"]["equal"] is True
    assert list(result["rules"]) == [rule.id for rule in RULES]
    assert "groups" in result["skipped"]


def test_findings_exit_1(run: Run, tiny: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny, tmp_path / "copy"))
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"num_experts": 8', '"num_experts": 6'))
    done = run("verify", directory, "--no-values", "--json")
    assert (done.code, done.err) == (1, "")
    result = json.loads(done.out)
    assert result["passed"] is False and result["errors"] == len(
        [f for f in result["findings"] if f["severity"] == "error"]
    )
    assert {f["rule"] for f in result["findings"]} == {"expert-count", "router-rows", "tokenizer"}
    assert result["findings"][0].keys() == {
        "rule", "severity", "file", "tensor", "problem", "remedy"
    }  # fmt: skip
    assert "finite" in result["skipped"]
    done = run("verify", directory, "--no-values")
    assert done.code == 1
    assert "error: [expert-count] model-" in done.out
    assert "    -> set num_experts in config.json" in done.out
    assert "not checked: zero-experts, finite: values were not to be read" in done.out


def test_warnings_exit_0_unless_strict(run: Run, tiny: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    assert run("verify", directory).code == 0
    done = run("verify", directory, "--strict")
    assert done.code == 1 and "warning: [leftover-files] pytorch_model.bin" in done.out


def test_what_is_no_checkpoint_exits_2(run: Run, smaller: Path) -> None:
    for args in (["nowhere"], [smaller, "--plan", "plan.json"], [smaller, "--against", "./no"]):
        done = run("verify", *args, "--json")
        assert done.code == 2 and done.out == ""
        assert done.err.startswith("error: ")
    assert run("verify").code == 2


def test_many_findings_are_counted(run: Run, tmp_path: Path, tiny: Path) -> None:
    directory = Path(shutil.copytree(tiny, tmp_path / "copy"))
    index = directory / "model.safetensors.index.json"
    data = json.loads(index.read_bytes())
    data["weight_map"] = dict.fromkeys(data["weight_map"], sorted(data["weight_map"].values())[0])
    index.write_text(json.dumps(data))
    done = run("verify", directory)
    assert done.code == 1
    assert done.out.count("error: [index]") == 5
    assert "more of [index]; all of them: --json" in done.out
