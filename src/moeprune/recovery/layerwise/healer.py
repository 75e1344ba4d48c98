"""The walk of both models that heals one layer after another, or some that are independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import torch
from torch import nn

from moeprune.errors import UnsupportedModelError
from moeprune.models import data
from moeprune.models.bounds import Limits, outside_bytes
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.sites import MoESite
from moeprune.models.walk import Batch, Walk
from moeprune.recovery.groups import Zeros, choose, parameters_of
from moeprune.recovery.layerwise.fitting import fit
from moeprune.recovery.layerwise.lesson import Lesson, grouped
from moeprune.recovery.layerwise.state import LayerFolder, Overlaid
from moeprune.recovery.layerwise.tap import Tap, block_of
from moeprune.recovery.pairing import pair
from moeprune.recovery.training import Training
from moeprune.recovery.writing import Places

_CHUNK = 4096
_ADDS = 1e-3
_GROUPED = 6

Tell = Callable[[int, int, float | None, float | None], None]
"""Called with the layer, the steps that are done in it, the loss and the held-out error."""


class Healer:
    """Student and teacher of which a few layers are in memory.

    Args:
        student, teacher: their checkpoints.
        made: what to do.
        folder: where layers that are done are kept.
        device: where to compute.
        tell: told how it goes.
        limits: what its walks are held to.

    Attributes:
        layers: those that have something to train, ascending.

    Raises:
        MoepruneError: they do not belong together, or there is nothing to train.
    """

    def __init__(
        self,
        student: Checkpoint,
        teacher: Checkpoint,
        made: Training,
        folder: LayerFolder,
        device: torch.device,
        tell: Tell = lambda layer, step, loss, held: None,
        limits: Limits = Limits(),
    ) -> None:
        self.made, self.folder, self.device, self.tell = made, folder, device, tell
        self.original = student
        self.overlay = Overlaid(student.path, student.trust_remote_code)
        for layer in folder.done():
            self.overlay.put(folder.tensors(layer))
        self.student = LayeredModel(self.overlay, torch.float32, device)
        self.teacher = LayeredModel(teacher, torch.float32, device)
        self._limits = limits
        self.parameters = parameters_of(self.student.model)
        names = choose(self.student.model, self.parameters, made.train)
        self.names = {
            layer: [n for n in names if n.startswith(f"{self.student.prefix}.{layer}.")]
            for layer in sorted(self.student.sites)
        }
        self.layers = [layer for layer, own in self.names.items() if own]
        for layer in self.layers:
            self._refuse(layer)
        self.groups = None
        if made.objective == "router":
            self.groups = pair(student, teacher, self.student.sites, self.teacher.sites)

    def _refuse(self, layer: int) -> None:
        block_of(self.student, self.student.sites[layer])
        other = self.teacher.sites.get(layer)
        mine = self.student.sites[layer].shape
        if other is None or other.shape.hidden != mine.hidden:
            raise UnsupportedModelError(
                f"layer {layer} of the teacher has no experts of width {mine.hidden}",
                "give --teacher the model that the student was pruned from",
            )

    def run(
        self, train: Sequence[data.Domain], held: Sequence[data.Domain], wanted: Sequence[int]
    ) -> None:
        """Heal the layers ``wanted``; each is in the folder when it is done.

        Args:
            train, held: sequences to learn from and to measure, all of one length.
            wanted: ascending. With ``dense-inputs`` any; else all that are not done.
        """
        batches = [*data.batches(train), *data.batches(held)]
        if not wanted:
            return
        kind = torch.bfloat16 if self.made.dtype == "bfloat16" else torch.float32
        self._tap = Tap(batches, kind, self.device)
        self._split = sum(domain.ids_NL.numel() for domain in train)
        self._rows = self.made.batch * int(batches[0].ids_BL.shape[1])
        self._threads = torch.get_num_threads()
        self._limit(kind)
        if self.made.target == "dense-inputs":
            # the same bits whatever the number of processes and of their cores
            self._threads = 1
            self._walk_teacher(batches, wanted)
        else:
            self._walk_student(batches, wanted)

    def _limit(self, kind: torch.dtype) -> None:
        """Tell the walks what is held beside them.

        Rows of a block and of its router, its layer in training (weights, gradients, two moments
        and the best so far), the teacher's layer and, where both models walk, what the teacher's
        walk holds.
        """
        if self._limits.memory is None:
            return
        sizes = [
            sum(p.numel() * p.element_size() for p in model.layers[site.layer].parameters())
            for model in (self.student, self.teacher)
            for site in model.sites.values()
        ]
        width = max(site.shape.hidden for site in self.teacher.sites.values())
        row = 3 * width * kind.itemsize
        if self.groups is not None:  # the teacher's logits, and what ``grouped`` makes of them
            row += _GROUPED * 4 * max(site.shape.experts for site in self.teacher.sites.values())
        beside = 6 * max(sizes) + self._tap.rows * row
        self.teacher.limits = replace(self._limits, beside=beside)
        if self.made.target == "dense-outputs":
            beside += outside_bytes(self.teacher) + 3 * max(sizes)
        self.student.limits = replace(self._limits, beside=beside)

    def _walk_teacher(self, batches: Sequence[Batch], wanted: Sequence[int]) -> None:
        """Layers that learn from the teacher's own inputs; the student is not run."""
        if self.device.type != "cpu":
            self.student.load_resident()  # buffers
        with Walk(self.teacher, batches) as walk, closing(walk.standing()) as standing:
            for index in standing:
                if index not in wanted:
                    walk.run()
                else:
                    site = self.teacher.sites[index]
                    with self._tap.listening(block_of(self.teacher, site), self._router(site)):
                        walk.run(self._tap.begin)
                    self.student.load_layer(index)
                    self._heal(index)
                    self.student.free_layer(index)
                if index == wanted[-1]:
                    return

    def _walk_student(self, batches: Sequence[Batch], wanted: Sequence[int]) -> None:
        """Layers that learn on what the healed ones before them give."""
        with ExitStack() as stack:
            dense = None
            walk = stack.enter_context(Walk(self.student, batches))
            standing = stack.enter_context(closing(walk.standing()))
            if self.made.target == "dense-outputs":
                dense = stack.enter_context(Walk(self.teacher, batches))
                beside = stack.enter_context(closing(dense.standing()))
            for index in standing:
                if dense is not None:
                    next(beside)
                if index in wanted:
                    self._target(walk, dense, index)
                    if self._heal(index):
                        # as it is written, and read by a resumed run
                        self.student.free_layer(index)
                        self.student.load_layer(index)
                        walk.run()
                else:
                    walk.run()
                    if dense is not None:
                        dense.run()
                if index == wanted[-1]:
                    return

    def _router(self, site: MoESite) -> nn.Module | None:
        return site.router if self.groups is not None else None

    def _target(self, walk: Walk, dense: Walk | None, index: int) -> None:
        """Run the layer, then put into the buffers what its block is to give."""
        mine, other = self.student.sites[index], self.teacher.sites[index]
        with self._tap.listening(block_of(self.student, mine)):
            walk.run(self._tap.begin)
        if dense is None:
            self._teach(index)
            return
        if self.groups is not None:
            with self._tap.hearing(other.router):
                dense.run(self._tap.begin)
            return
        dense.run()
        self._check_adds(walk, index)
        for batch, rows in enumerate(self._tap.slices):
            gap = dense.output(batch).float() - walk.output(batch).float()
            self._tap.y_TH[rows] += gap.flatten(0, 1).to(self._tap.y_TH.dtype)

    @torch.no_grad()
    def _teach(self, index: int) -> None:
        """The teacher's block on the student's inputs."""
        site = self.teacher.sites[index]
        block = block_of(self.teacher, site)
        self.teacher.load_layer(index)
        with (
            self._threading(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.made.dtype == "bfloat16"),
        ):
            for start in range(0, self._tap.rows, _CHUNK):
                rows = slice(start, min(self._tap.rows, start + _CHUNK))
                if self.groups is None:
                    self._tap.y_TH[rows] = self._tap.call(block, rows).to(self._tap.y_TH.dtype)
                else:
                    z_nR = self._tap.call_router(block, site.router, rows).float()
                    self._tap.buffer("z", z_nR.shape[1], torch.float32)[rows] = z_nR
        self.teacher.free_layer(index)

    def _check_adds(self, walk: Walk, index: int) -> None:
        """Raise unless the layer's output is something plus the output of its block."""
        block = block_of(self.student, self.student.sites[index])
        whole_TH = walk.output(0).clone().flatten(0, 1)
        hook = block.register_forward_hook(_silenced)
        try:
            rest_TH = walk.rerun(0).flatten(0, 1)
        finally:
            hook.remove()
        y_TH = self._tap.y_TH[self._tap.slices[0]]
        gap = float((rest_TH + y_TH - whole_TH).abs().max())
        walk.rerun(0)
        rounding = torch.finfo(y_TH.dtype).eps * float(y_TH.abs().max())
        if gap > _ADDS * float(whole_TH.abs().max()) + rounding:
            raise UnsupportedModelError(
                f"{self.student.config.model_type} does not add the output of its MoE blocks as it "
                "is, so what the rest of a layer lacks cannot be asked of them",
                "--target student-inputs",
            )

    def _threading(self) -> _Threads:
        return _Threads(self._threads if self.device.type == "cpu" else torch.get_num_threads())

    def _heal(self, index: int) -> bool:
        """Train the layer that is in memory and keep it; whether a tensor on disk changed."""
        model = self.student.model
        names = self.names[index]
        places = Places(self.original, model, names)
        self.student.layers[index].requires_grad_(False)
        for name in names:  # weights that were not converted are still the mapped file
            p = model.get_parameter(name)
            p.data = p.data.clone()
            p.requires_grad_(True)
        groups = {name: self.parameters.group_of(name) for name in names}
        zeros = Zeros(model, [name for name in self.parameters.masked if name in groups])
        weights = {name: model.get_parameter(name) for name in names}
        with self._threading():
            done = fit(
                self._lesson(index), index, weights, groups, zeros, self.made, self._rows,
                lambda step, loss, held: self.tell(index, step, loss, held),
            )  # fmt: skip
        for p in weights.values():
            p.requires_grad_(False)
        pieces = places.own_pieces()
        changed = places.changed(pieces, groups)
        new = pieces if done.best_step else []
        self.folder.save_layer(done, new, changed, zeros.count)
        self.overlay.put(self.folder.tensors(index))
        self.tell(index, self.made.steps, None, done.after)
        return bool(new)

    def _lesson(self, index: int) -> Lesson:
        site = self.student.sites[index]
        log_p_TC, columns = None, ()
        if self.groups is not None:
            teacher = self.teacher.sites[index].shape.experts
            groups = tuple(tuple(group) for group in self.groups[index])
            slots = site.router_tensors[0].size if site.router_tensors else len(groups)
            if slots >= self._tap.z_TR.shape[1]:  # nothing left the router
                groups = tuple((e,) for e in range(teacher))
            log_p_TC = grouped(self._tap.z_TR, groups, teacher)
            kept = [column for column, group in enumerate(groups) if group]
            beyond = range(len(groups), len(groups) + self._tap.z_TR.shape[1] - teacher)
            columns = (*kept, *beyond)
        return Lesson(
            self._tap,
            block_of(self.student, site),
            site.router,
            self._split,
            log_p_TC,
            columns,
            self.made.dtype == "bfloat16",
        )


class _Threads:
    """So many threads for products of matrices, and then as many as before."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._count)

    def __exit__(self, *exc: object) -> None:
        torch.set_num_threads(self._before)


def _silenced(module: nn.Module, args: object, output: object) -> object:
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    assert isinstance(output, tuple)
    return (torch.zeros_like(output[0]), *output[1:])
