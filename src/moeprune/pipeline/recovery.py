"""Recovery: a pruned student learns from the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeprune.errors import DataError, MoepruneError, OutputError, UnsupportedModelError
from moeprune.files import refuse_existing
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.quantised import Quantisation
from moeprune.models.runtime import load
from moeprune.models.store import versions
from moeprune.pipeline.inputs import Compute, Progress, Source, Text, model_name, read_calibration
from moeprune.pipeline.inputs import silent as quiet
from moeprune.recovery.experts import ExpertPairs
from moeprune.recovery.groups import Parameters, Zeros, choose, digests, parameters_of
from moeprune.recovery.learner import Learner, Noise
from moeprune.recovery.order import split
from moeprune.recovery.pairing import check_teacher, made_from, pair, provenance
from moeprune.recovery.recipe import Recipe, recipe
from moeprune.recovery.state import StateFolder
from moeprune.recovery.trainer import Status, Trainer, open_accelerator, trained
from moeprune.recovery.writing import Places, write_recovered

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moeprune.recovery.trainer import Progress as Run

__all__ = ["Recipe", "Recovered", "Status", "recipe", "recover"]

Listen = Callable[[Status], None]


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        path: the new checkpoint.
        steps, best_step: done, and of the weights that were written; 0 is the student as it was.
        held: the held-out measure (``measure``) before and after; None without held-out sequences.
        measure: ``kl`` with a teacher, ``ce`` without.
        lam: lambda of ``expert-kd``.
        gradients: norm of the first gradient, by group of parameters that trained.
        changed: by group, tensors on disk that changed, and in all.
        zeros: weights that were kept at zero.
        seconds: of training.
        ended: why it ended.
    """

    path: Path
    steps: int
    best_step: int
    held: tuple[float, float] | None
    measure: str
    lam: float | None
    gradients: Mapping[str, float]
    changed: Mapping[str, tuple[int, int]]
    zeros: int
    seconds: float
    ended: str

    def to_json(self) -> dict[str, Any]:
        """As the command prints it."""
        return {
            **vars(self),
            "path": str(self.path),
            "held": None if self.held is None else list(self.held),
            "gradients": dict(self.gradients),
            "changed": {name: list(counts) for name, counts in self.changed.items()},
        }


def ignore(status: Status) -> None:
    """Nobody watches."""


def recover(
    source: Source,
    teacher: Source | None,
    out: Source,
    chosen: Recipe | str = "expert-kd",
    text: Text = Text(sequences=600, length=512),
    compute: Compute = Compute(),
    resume: bool = False,
    force: bool = False,
    listen: Listen = ignore,
    progress: Progress = quiet,
) -> Recovered:
    """Train a pruned checkpoint and write it again, with the same files, names, types and zeros.

    A run that was cut leaves ``<out>.recovery`` behind; ``resume`` goes on from there, to the very
    weights that it would have had. Under ``accelerate launch`` every process calls this function.

    Args:
        source: the student, as ``apply`` or ``prune`` wrote it.
        teacher: the model that it was made from; only ``full`` and ``lora`` can do without.
        out: the new directory.
        chosen: what to do, or the name of a way whose defaults are taken.
        text: what to read; sequences are drawn as for calibration.
        compute: the device; weights that train are float32 whatever ``dtype`` says.
        resume: go on with a run that was cut.
        force: replace an existing output, and forget a run that was cut.
        listen: told after every step.
        progress: as in the other stages.

    Raises:
        MoepruneError: anything the user can mend; the output is there whole or not at all.
    """
    made = recipe(chosen) if isinstance(chosen, str) else chosen
    out = Path(out)
    folder = StateFolder(out)
    accelerator = open_accelerator(compute.device == "cpu", made)
    _refuse_output(out, folder, resume, force)
    student = Checkpoint.open(source, compute.trust_remote_code)
    if student.path.is_relative_to(out.resolve()):
        raise OutputError(f"the output {out} is the student itself, or holds it", "another --out")
    if Quantisation.of(student).method is not None:
        raise UnsupportedModelError(
            f"{student.path} is quantised, and quantised weights cannot be trained",
            "write it with --dequantize first: moeprune apply ... --dequantize",
        )
    record = provenance(student)
    master = _teacher(student, teacher, made, compute)
    domains = read_calibration(student, text)
    facts = data.describe(domains)
    header = {
        "student": student.fingerprint,
        "teacher": None if master is None else master.fingerprint,
        "data": facts["hash"],
        "recipe": made.to_json(),
    }
    if resume:
        _refuse_other_run(folder, header)
    elif accelerator.is_main_process:
        folder.delete()
    accelerator.wait_for_everyone()
    with ExitStack() as stack:
        run = _Run(student, master, made, compute, accelerator, stack)
        done = run.train(domains, folder, header, resume, listen)
        result = run.result(out, done)
        told = {
            "how": made.how,
            "teacher": None if master is None else model_name(teacher or ""),
            "teacher_fingerprint": header["teacher"],
            "data": {**facts, "seed": text.seed},
            "options": made.to_json(),
            **{k: v for k, v in result.to_json().items() if k != "path"},
            "versions": versions(),
        }
        if accelerator.is_main_process:
            earlier = record.get("recovered")
            steps = [*(earlier if isinstance(earlier, list) else []), told]

            def tell(done: int, total: int) -> None:
                progress("writing", done, total)

            write_recovered(
                run.places, out, {**record, "recovered": steps}, folder.log, force, tell
            )
            folder.delete()
        accelerator.wait_for_everyone()
    return result


def _refuse_output(out: Path, folder: StateFolder, resume: bool, force: bool) -> None:
    refuse_existing(out, force)
    if folder.exists() and not (resume or force):
        numbers = folder.numbers()
        step = 0 if numbers is None else numbers["progress"]["step"]
        raise OutputError(
            f"a run for {out} was cut after step {step}: {folder.path}",
            "go on with --resume, or begin again with --force",
        )


def _refuse_other_run(folder: StateFolder, header: Mapping[str, Any]) -> None:
    saved = folder.numbers()
    if saved is None:
        return
    for name, value in header.items():
        if saved.get(name) == value:
            continue
        if name == "recipe" and isinstance(saved.get(name), dict):
            name = next(key for key in value if saved["recipe"].get(key) != value[key])
        raise MoepruneError(
            f"the run in {folder.path} had another {name.replace('_', '-')}",
            "give the same options, or begin again with --force",
        )


def _teacher(
    student: Checkpoint, teacher: Source | None, made: Recipe, compute: Compute
) -> Checkpoint | None:
    if teacher is None:
        if made.how == "expert-kd" or made.kl_weight:
            raise MoepruneError(f"{made.how} learns from a teacher", "give --teacher MODEL")
        return None
    master = Checkpoint.open(teacher, compute.trust_remote_code)
    layers_matter = made.how == "expert-kd" or not made_from(student, master)
    check_teacher(student, master, same_layers=layers_matter)
    return master


class _Run:
    """The models of one recovery, loaded."""

    def __init__(
        self,
        student: Checkpoint,
        master: Checkpoint | None,
        made: Recipe,
        compute: Compute,
        accelerator: Accelerator,
        stack: ExitStack,
    ) -> None:
        device = accelerator.device if compute.device == "cpu" else torch.device(compute.device)
        trust = compute.trust_remote_code
        self.recipe, self.accelerator = made, accelerator
        self.master = master
        self.model: Any = load(student.path, torch.float32, device, trust)
        self.parameters: Parameters = parameters_of(self.model)
        self.teacher: Any = None
        if master is not None:
            kind = torch.bfloat16 if made.dtype == "bfloat16" else torch.float32
            self.teacher = load(master.path, kind, device, trust).requires_grad_(False)
        names = choose(self.model, self.parameters, made.train)
        self.places = Places(student, self.model, names)
        for name in names:  # weights that were not converted are still the mapped file
            p = self.model.get_parameter(name)
            p.data = p.data.clone()
        self.zeros = Zeros(self.model, self.parameters.masked)
        self.pairs = None
        if made.how == "expert-kd":
            assert master is not None
            taught = parameters_of(self.teacher).sites
            groups = pair(student, master, self.parameters.sites, taught)
            self.pairs = ExpertPairs(self.parameters.sites, taught, groups, made.target)
            stack.callback(self.pairs.close)
        self.groups = trained(self.model, self.parameters)
        frozen = [n for n, p in self.model.named_parameters() if not p.requires_grad]
        self._frozen = digests(self.model, frozen)

    def train(
        self,
        domains: list[data.Domain],
        folder: StateFolder,
        header: Mapping[str, Any],
        resume: bool,
        listen: Listen,
    ) -> Run:
        """Train to the end; the model then has the best weights."""
        made = self.recipe
        train, held = (_rows(part) for part in split(domains, made.holdout))
        if made.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if made.neftune:
            Noise(self.model.get_input_embeddings(), made.neftune)
        teach = bool(made.kl_weight) or (self.pairs is not None and made.target == "stream")
        learner = Learner(self.model, self.teacher, self.pairs, teach, made.dtype == "bfloat16")
        trainer = Trainer(
            learner,
            self.groups,
            self.zeros,
            train,
            held,
            made,
            folder,
            self.accelerator,
            listen,
            next(iter(self.parameters.sites.values())).shape.hidden,
        )
        if resume:
            trainer.resume()
        return trainer.run(header)

    def result(self, out: Path, done: Run) -> Recovered:
        """What to tell; raises ``AssertionError`` if something frozen moved."""
        moved = {n for n, d in digests(self.model, self._frozen).items() if d != self._frozen[n]}
        assert not moved, f"{min(moved)} is frozen and changed"
        changed = self.places.changed(self.places.pieces(), self.groups)
        held = (done.held[0], done.best) if done.held and done.best is not None else None
        return Recovered(
            path=out,
            steps=done.step,
            best_step=done.best_step if held else done.step,
            held=held,
            measure="ce" if self.teacher is None else "kl",
            lam=done.lam,
            gradients=done.norms,
            changed={group: (n[0], n[1]) for group, n in changed.items()},
            zeros=self.zeros.count,
            seconds=done.seconds,
            ended=done.ended,
        )


def _rows(domains: list[data.Domain]) -> torch.Tensor:
    """All sequences, which have to be of one length."""
    tables = [domain.ids_NL for domain in domains if len(domain.ids_NL)]
    if len({table.shape[1] for table in tables}) > 1:
        raise DataError("sequences of different lengths")
    return torch.cat(tables) if tables else torch.empty(0, 1, dtype=torch.int64)
