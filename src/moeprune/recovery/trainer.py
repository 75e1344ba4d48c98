"""The training loop, on accelerate: one process or several, the same steps either way."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.recovery.groups import Zeros
from moeprune.recovery.learner import Learner
from moeprune.recovery.order import Order
from moeprune.recovery.state import StateFolder
from moeprune.recovery.training import Training

_DISTRIBUTED = ("NO", "MULTI_CPU", "MULTI_GPU")


@dataclass(frozen=True)
class Status:
    """How a run stands.

    Attributes:
        step, steps: done and in all.
        loss: of the last step.
        held: what was measured last on held-out sequences, KL with a teacher, else cross-entropy.
        seconds_left: an estimate; None before the first step.
    """

    step: int
    steps: int
    loss: float | None
    held: float | None
    seconds_left: float | None


@dataclass
class Progress:
    """What changes while a run goes on, and has to survive it.

    Attributes:
        step: steps done.
        lam: lambda of ``expert-kd``; None before it is known.
        best: the lowest held-out value, and at which step; the step 0 is the student as it was.
        waited: evaluations since then.
        norms: norm of the first gradient, by group of parameters.
        seconds: of training, over all runs.
        held: what was measured first and last.
        ended: why the run ended.
        merged: with ``lora``, the held-out value of the merged model with its zeros.
    """

    step: int = 0
    lam: float | None = None
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    norms: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    held: list[float] = field(default_factory=list)
    ended: str = ""
    merged: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))


class Trainer:
    """Trains the parameters of a learner that require gradients.

    Args:
        learner: student and teacher.
        groups: of the parameters that train, to report gradients by.
        zeros: what has to stay zero.
        train_NL, held_NL: sequences.
        training: what to do.
        folder: where the state is kept.
        accelerator: the processes.
        listen: told how the run stands.
        width: of the model.
    """

    def __init__(
        self,
        learner: Learner,
        groups: Mapping[str, str],
        zeros: Zeros,
        train_NL: Tensor,
        held_NL: Tensor,
        training: Training,
        folder: StateFolder,
        accelerator: Accelerator,
        listen: Callable[[Status], None],
        width: int,
    ) -> None:
        self.training, self.folder, self.listen = training, folder, listen
        self.accelerator = accelerator
        self.order = Order(train_NL, training.seed)
        self.held_NL = held_NL
        self.zeros = zeros
        self.groups = groups
        self.plain = learner
        self.peak = training.peak(width)
        self.weights = {
            name: p for name, p in learner.student.named_parameters() if p.requires_grad
        }
        optimiser = torch.optim.AdamW(
            list(self.weights.values()),
            lr=self.peak,
            betas=(0.9, 0.95),
            weight_decay=training.weight_decay,
        )
        self.learner, prepared = accelerator.prepare(learner, optimiser)
        self.optimiser = prepared
        self.inner: torch.optim.Optimizer = getattr(prepared, "optimizer", prepared)
        self.now = Progress()
        self.held_ce: float | None = None  # beside what was measured last

    def resume(self) -> None:
        """Go on from the saved state."""
        numbers = self.folder.numbers()
        if numbers is None:
            return
        self.now = Progress(**numbers["progress"])
        self.folder.restore("state", self.weights, self.inner)
        if self.accelerator.is_main_process:
            self.folder.cut_log(self.now.step)
        self.accelerator.wait_for_everyone()

    def run(self, header: Mapping[str, Any]) -> Progress:
        """Train to the end, then put the best weights back.

        Raises:
            MoepruneError: a loss is not finite, or something does not get gradients. The state of
                the last good step is kept.
        """
        now, training = self.now, self.training
        began, before = time.perf_counter(), now.seconds
        if now.step == 0 and not now.held:
            self._evaluate(header)
            if now.held and self.accelerator.is_main_process:
                self.folder.note({"step": 0, "held": now.held[0], "held_ce": self.held_ce})
            self._save(header)
        while now.step < training.steps and not now.ended:
            start = time.perf_counter()
            entry = self._step(header)
            now.step += 1
            now.seconds = before + time.perf_counter() - began
            if self._due(training.between_evaluations):
                self._evaluate(header)
                if now.held:
                    entry |= {"held": now.held[-1], "held_ce": self.held_ce}
                if training.patience and now.waited >= training.patience:
                    now.ended = f"no improvement in {now.waited} evaluations"
            left = (training.steps - now.step) * (time.perf_counter() - start)
            if self.accelerator.is_main_process:
                self.folder.note({"step": now.step, **entry})
            held = now.held[-1] if now.held else None
            self.listen(Status(now.step, training.steps, entry["loss"], held, left))
            if self._due(training.between_saves) or now.ended:
                self._save(header)
        now.ended = now.ended or "all steps done"
        if now.best is not None and now.best_step != now.step:
            self.folder.restore("best", self.weights)
        return now

    def _due(self, every: int) -> bool:
        return self.now.step % every == 0 or self.now.step == self.training.steps

    def _step(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """One step of the optimiser; returns what the log says."""
        training, now = self.training, self.now
        for group in self.inner.param_groups:
            group["lr"] = training.rate(self.peak, now.step)
        total: dict[str, float] = {}
        self.plain.train()
        for part in range(training.accumulate):
            ids_BL = self._rows(now.step, part)
            last = part == training.accumulate - 1
            self._reseed(now.step, part)
            if last:
                values, loss = self._forward(ids_BL)
                self._check(loss, header)
                self.accelerator.backward(loss / training.accumulate)
            else:
                with self.accelerator.no_sync(self.learner):
                    values, loss = self._forward(ids_BL)
                    self._check(loss, header)
                    self.accelerator.backward(loss / training.accumulate)
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + value / training.accumulate
        self.zeros.gradients()
        first = None if now.norms else self._gradient_norms()
        norm = float(
            self.accelerator.clip_grad_norm_(list(self.weights.values()), training.clip or math.inf)
        )
        self._check(torch.tensor(norm), header)
        if first is not None:
            self._check_gradients(first)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.zeros.weights()
        return {
            **total,
            "lambda": now.lam,
            "gradient": norm,
            "rate": training.rate(self.peak, now.step),
        }

    def _rows(self, step: int, part: int) -> Tensor:
        """This process's sequences of one part of a batch."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.training.batch // self.training.accumulate // world
        start = step * self.training.batch + (part * world + rank) * size
        return self.order.rows(start, size).to(self.accelerator.device)

    def _reseed(self, step: int, part: int) -> None:
        """Dropout and noise are functions of the step too, so that no state has to be kept."""
        place = (step * self.training.accumulate + part) * self.accelerator.num_processes
        torch.manual_seed(self.training.seed * 1_000_003 + place + self.accelerator.process_index)

    def _forward(self, ids_BL: Tensor) -> tuple[dict[str, float], Tensor]:
        """The values of a part, means over all processes, and the loss of this process."""
        training, now = self.training, self.now
        found = self.learner(ids_BL)
        loss = training.ce_weight * found["ce"]
        if training.kl_weight:
            loss = loss + training.kl_weight * found["kl"]
        names = ["ce", *(["kl"] if "kl" in found else [])]
        values = [found[name].detach() for name in names]
        if "error" in found:
            # counts of all processes: the mean over tokens must not depend on their number
            count = self.accelerator.reduce(found["count"], "sum").clamp(min=1)
            experts = self.accelerator.num_processes * (found["error"] / count).sum()
            names, values = [*names, "experts"], [*values, experts.detach()]
        mean = self.accelerator.reduce(torch.stack(values), "mean")
        told = dict(zip(names, mean.tolist(), strict=True))
        if "experts" in told:
            base = training.ce_weight * told["ce"] + training.kl_weight * told.get("kl", 0.0)
            if now.lam is None or training.rescale:
                lam = (base or 1.0) / told["experts"] if told["experts"] else 0.0
                # the state of the last good step holds finite numbers only
                now.lam = lam if math.isfinite(lam) else now.lam
            loss = loss + (now.lam or 0.0) * experts
        told["loss"] = training.ce_weight * told["ce"] + training.kl_weight * told.get("kl", 0.0)
        told["loss"] += (now.lam or 0.0) * told.get("experts", 0.0)
        if not math.isfinite(told["loss"]):
            loss = loss.detach() * math.nan  # every process stops
        return told, loss

    def _check(self, value: Tensor, header: Mapping[str, Any]) -> None:
        """Raise if a loss or a norm is not finite; the last state of finite weights is kept."""
        if bool(value.isfinite().all()):
            return
        self.optimiser.zero_grad()
        if all(bool(p.isfinite().all()) for p in self.weights.values()):
            self._save(header)
        raise MoepruneError(
            f"the loss or its gradient is not finite at step {self.now.step + 1}; the state of "
            f"{self.folder.reached()} is kept in {self.folder.path}",
            "try a smaller --learning-rate or --dtype float32, with --force to begin again",
        )

    def _gradient_norms(self) -> dict[str, float]:
        """The norm of the gradient, by group."""
        squares: dict[str, float] = {}
        for name, p in self.weights.items():
            own = 0.0 if p.grad is None else float(p.grad.double().square().sum())
            group = self.groups[name]
            squares[group] = squares.get(group, 0.0) + own
        return {group: math.sqrt(value) for group, value in squares.items()}

    def _check_gradients(self, norms: dict[str, float]) -> None:
        """Raise unless everything that is said to train gets a gradient in the first step."""
        self.now.norms = norms
        lost = [group for group, value in norms.items() if value == 0]
        if len(lost) == len(norms) or (lost and self.now.lam != 0.0):
            raise MoepruneError(
                f"{lost[0]} are to be trained, and the loss gives them no gradient",
                f"--train {','.join(g for g in norms if g not in lost) or 'experts,routers'}",
            )

    @torch.no_grad()
    def measure(self, header: Mapping[str, Any]) -> float | None:
        """KL of held-out sequences, cross-entropy without a teacher; None if there are none."""
        if not len(self.held_NL):
            return None
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.plain.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        size = max(1, self.training.batch // self.training.accumulate // world)
        for ids_BL in self.held_NL[rank::world].split(size):
            found = self.plain(ids_BL.to(self.accelerator.device), teach=True)
            both = [float(found.get("kl", found["ce"])), float(found["ce"]), 1.0]
            sums += torch.tensor(both, dtype=torch.float64) * len(ids_BL)
        sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
        self._check(sums, header)
        self.held_ce = float(sums[1] / sums[2])
        return float(sums[0] / sums[2])

    def _evaluate(self, header: Mapping[str, Any]) -> None:
        """Measure, and keep the weights if they are the best so far."""
        value = self.measure(header)
        if value is None:
            return
        now = self.now
        now.held = [*now.held[:1], value]
        if now.best is None or value < now.best:
            now.best, now.best_step, now.waited = value, now.step, 0
            if self.accelerator.is_main_process:
                self.folder.save_best({"step": now.step, "held": value}, self.weights)
            self.accelerator.wait_for_everyone()
        else:
            now.waited += 1

    def _save(self, header: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            numbers = {**header, "progress": self.now.to_json()}
            self.folder.save(numbers, self.weights, self.inner)
        self.accelerator.wait_for_everyone()


def open_accelerator(cpu: bool, training: Training) -> Accelerator:
    """The processes that ``accelerate launch`` started, or this one alone.

    Raises:
        MoepruneError: weights would be split over processes, or a batch cannot be.
    """
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[unused])
    kind = str(accelerator.distributed_type.value)
    if kind == "MULTI_CPU" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        kind = "FSDP"  # which accelerate ignores on the CPU without a word
    if kind not in _DISTRIBUTED:
        raise MoepruneError(
            f"cannot train with {kind}: every process has to hold the whole model",
            "launch with --multi_gpu or --cpu; a model that is too large trains layer by layer",
        )
    parts = training.accumulate * accelerator.num_processes
    if training.batch % parts:
        raise MoepruneError(
            f"--batch {training.batch} cannot be cut into {parts} parts "
            f"({training.accumulate} for each of {accelerator.num_processes} processes)"
        )
    return accelerator
