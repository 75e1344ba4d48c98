"""Plans that were interrupted and go on: the bytes of a run that was not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.conftest import batch_of
from methods.test_resume import COMPUTE, Tiny, behind_a_layer, in_pieces
from moeprune import work
from moeprune.core.budget import Budget
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.targets import Target
from moeprune.errors import BudgetError, OutputError
from moeprune.models import walk_state
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.pipeline import stages
from moeprune.pipeline.inputs import code_of
from moeprune.pipeline.kept_plan import KeptLayers
from moeprune.pipeline.pruning_place import inputs_of
from support import tree

HALF = Budget(ratio=0.5)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(walk_state, "_SHARE", 1e9)
    with batch_of(monkeypatch, 12 * 32):
        yield


def planning(
    source: Path, method: str, out: Path, text: stages.Text, budget: Any = HALF, **options: Any
) -> Callable[..., Any]:
    def run(progress: Any = lambda *step: None, note: Any = print) -> Any:
        return stages.plan(
            source, method, budget, None, text, options, COMPUTE, 0, progress, out=out, note=note
        )

    return run


@pytest.mark.parametrize(
    ("method", "model_type", "options"),
    [
        ("ream", "mixtral", {}),
        pytest.param("naee", "olmoe", {"mode": "progressive"}, marks=pytest.mark.slow),
        pytest.param("sparsegpt", "deepseek_v3", {}, marks=pytest.mark.slow),
    ],
)
def test_a_method_that_edits_as_it_walks_goes_on(
    method: str,
    model_type: str,
    options: dict[str, Any],
    tiny: Tiny,
    text: stages.Text,
    tmp_path: Path,
) -> None:
    for name in ("whole", "pieces"):
        (tmp_path / name).mkdir()
    planning(tiny(model_type), method, tmp_path / "whole" / "p.json", text, **options)()
    run = planning(tiny(model_type), method, tmp_path / "pieces" / "p.json", text, **options)
    notes = in_pieces(run, behind_a_layer)
    assert tree(tmp_path / "pieces") == tree(tmp_path / "whole")
    assert [n for n in notes if n.startswith("going on after 3 of 4 layers (planning")]


def test_text_of_other_length_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """All tokens in all: their hash is the same however they are cut into sequences."""
    file = tmp_path / "few.txt"
    file.write_text("0123456789abcdef" * 48, encoding="utf-8")
    text = stages.Text((str(file),), sequences=24, length=32)
    with pytest.raises(KeyboardInterrupt):
        planning(tiny("mixtral"), "ream", tmp_path / "p.json", text)(behind_a_layer())
    other = stages.Text((str(file),), sequences=48, length=16)
    with pytest.raises(OutputError, match="length was 32, now 16"):
        planning(tiny("mixtral"), "ream", tmp_path / "p.json", other)()


def test_what_the_fingerprint_does_not_read_is_an_input(tiny: Tiny, tmp_path: Path) -> None:
    """Code that may run, and a tokenizer where statistics are found before text is read."""
    source = tmp_path / "model"
    shutil.copytree(tiny("mixtral"), source)
    (source / "own.py").write_text("one = 1\n", encoding="utf-8")
    own, theirs = Checkpoint.open(source, True), Checkpoint.open(source)
    before = code_of(own), inputs_of(own, stages.Text(), COMPUTE)["tokenizer"]
    assert before[0] is not None and code_of(theirs) is None
    (source / "own.py").write_text("one = 2\n", encoding="utf-8")
    tokenizer = source / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    after = code_of(own), inputs_of(own, stages.Text(), COMPUTE)["tokenizer"]
    assert before[0] != after[0] and before[1] != after[1]


def behind_a_decision() -> Callable[[str, int, int], None]:
    """Progress that interrupts a run behind the first layer that it computes something for."""
    computed: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("layer"):
            computed.append(what)
        elif computed:
            raise KeyboardInterrupt

    return progress


def test_a_long_search_goes_on_layer_by_layer(
    tiny: Tiny, tmp_path: Path, text: stages.Text
) -> None:
    """A target is met by several plans; layers that were decided are not decided again."""
    for name in ("whole", "pieces"):
        (tmp_path / name).mkdir()
    target = Target(bytes=260_000)
    planning(tiny("olmoe"), "moeits", tmp_path / "whole" / "p.json", text, target)()
    run = planning(tiny("olmoe"), "moeits", tmp_path / "pieces" / "p.json", text, target)
    notes = in_pieces(run, behind_a_decision)
    assert tree(tmp_path / "pieces") == tree(tmp_path / "whole")
    assert "3 of 4 layers were planned before" in notes


def test_a_budget_that_cannot_be_met_leaves_nothing(
    tiny: Tiny, tmp_path: Path, text: stages.Text
) -> None:
    with pytest.raises(BudgetError, match="cannot be reached"):
        planning(tiny("olmoe"), "random", tmp_path / "p.json", text, Target(bytes=1000))()
    assert not tree(tmp_path)


def test_commands_that_were_cut_after_their_output_had_appeared(
    tiny: Tiny, text: stages.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planning(tiny("olmoe"), "random", tmp_path / "p.json", text)

    def pruning() -> None:
        stages.prune(tiny("olmoe"), "mone", HALF, tmp_path / "out", text, compute=COMPUTE)

    rmtree = work.shutil.rmtree

    def killed(path: Path, *more: Any, **named: Any) -> None:
        if Path(path).name in ("p.json.plan", "out.writing"):
            raise KeyboardInterrupt
        rmtree(path, *more, **named)

    for command in (run, pruning):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(work.shutil, "rmtree", killed)
            command()
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"p.json", "p.json.plan", "out", "out.writing", "out.pruning"}
    run()
    pruning()
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "out"}
    with pytest.raises(OutputError, match="output exists"):
        run()


def test_pruning_goes_on_in_each_of_its_stages(
    tiny: Tiny, text: stages.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in its walk, before it plans and before it writes; what is done is not redone."""
    source = tiny("olmoe")

    def pruning(out: Path, progress: Any = lambda *step: None, ratio: float = 0.5) -> None:
        budget = Budget(ratio=ratio)
        stages.prune(source, "mone", budget, out, text, compute=COMPUTE, progress=progress)

    (tmp_path / "whole").mkdir()
    pruning(tmp_path / "whole" / "out")
    out = tmp_path / "pieces" / "out"
    seen: list[str] = []

    def stop(what: str) -> Callable[[str, int, int], None]:
        def progress(name: str, done: int, total: int) -> None:
            seen.append(name)
            if name == what and done > 2:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        pruning(out, stop("walking"))
    with pytest.raises(KeyboardInterrupt):
        pruning(out, stop("planning"))
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        pruning(out, stop("writing"))
    assert "walking" not in seen and "planning" in seen
    with pytest.raises(KeyboardInterrupt):
        pruning(out, stop("planning"), ratio=0.25)  # other experts, the same statistics
    seen.clear()
    pruning(out, stop("nothing"))
    assert not {"walking", "planning"} & {*seen}
    assert tree(tmp_path / "pieces") == tree(tmp_path / "whole")


def test_a_report_that_was_cut_in_its_walk_is_finished_by_the_same_command(
    tiny: Tiny, text: stages.Text, tmp_path: Path
) -> None:
    """The checkpoint is there; nothing but routing is measured again."""
    seen: list[str] = []

    def pruning(
        place: str, stop: str = "", ratio: float = 0.5, force: bool = False, **named: Any
    ) -> stages.Pruned:
        def progress(what: str, done: int, total: int) -> None:
            seen.append(what)
            if what == stop:
                raise KeyboardInterrupt

        return stages.prune(
            tiny("olmoe"), "mone", Budget(ratio=ratio), tmp_path / place / "out", text,
            compute=COMPUTE, progress=progress, command="moeprune prune", force=force, **named,
        )  # fmt: skip

    def cut(**named: Any) -> None:
        with pytest.raises(KeyboardInterrupt):
            pruning("pieces", stop="routing before and after", **named)
        assert {path.name for path in (tmp_path / "pieces").iterdir()} == {"out", "out.report"}

    whole = pruning("whole")
    cut()
    with pytest.raises(OutputError, match=r'budget was {"ratio": 0.5.*, now {"ratio": 0.25'):
        pruning("pieces", ratio=0.25)
    seen.clear()
    done = pruning("pieces")
    assert {*seen} == {"routing before and after"}
    assert (done.sizes, done.plan.method) == (whole.sizes, "mone")
    assert done.plan.statistics == whole.plan.statistics
    files = [tree(tmp_path / place) for place in ("pieces", "whole")]
    results = [_told(tmp_path / place / "out/moeprune_run.json") for place in ("pieces", "whole")]
    for file in ("out/moeprune_run.json", "out/report.html"):  # which say how long it took
        assert all(names.pop(file) for names in files)
    assert files[0] == files[1] and results[0] == results[1]
    assert set(results[0]["atlas"]["routing"]["rows"]) == {"original", "out"}

    cut(force=True)
    (tmp_path / "pieces/out/moeprune.json").write_text("{}")  # another checkpoint is there now
    with pytest.raises(OutputError, match="output exists"):
        pruning("pieces")
    assert {path.name for path in (tmp_path / "pieces").iterdir()} == {"out"}


def _told(file: Path) -> dict[str, Any]:
    """A result without what it says of time and place."""
    found: dict[str, Any] = json.loads(file.read_bytes())
    for row in (found, *found["rows"], found["calibration"]):
        row.pop("seconds")
        row.pop("path", None)
    found.pop("warnings")  # one names the path
    return found


@pytest.mark.parametrize("kill", [False, True])
def test_a_decision_whose_vectors_were_damaged_is_made_again(
    tiny: Tiny, tmp_path: Path, kill: bool
) -> None:
    """Also if whoever finds the damage is killed before it is made again."""
    model = LayeredModel(Checkpoint.open(tiny("olmoe")))
    layer = LayerPlan(0, 4, (0, 1, 2), replaced=(3,), novices_NH=torch.ones(1, 8))
    notes: list[str] = []
    with (
        pytest.raises(KeyboardInterrupt),
        work.work_folder(tmp_path / "p.json", "plan", {}, note=notes.append) as folder,
    ):
        kept = KeptLayers(folder, model, HALF)
        kept.save(layer, ["a warning"])
        assert kept.load(0) is not None
        [vectors] = [name for name in folder.names() if name.endswith(".safetensors")]
        file = folder.path / vectors
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        if kill:
            assert folder.find(vectors) is None  # all that the killed one did
        assert kept.load(0) is None and kept.load(0) is None
        assert folder.names() == [] and "damaged" in notes[0]
        raise KeyboardInterrupt
