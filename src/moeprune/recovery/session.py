"""The models of one recovery: loaded, told what trains, taught, and compared with the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from moeprune.errors import DataError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import Domain
from moeprune.models.runtime import load
from moeprune.recovery.experts import ExpertPairs
from moeprune.recovery.groups import Zeros, choose, digests, parameters_of, trained
from moeprune.recovery.learner import Learner, Noise
from moeprune.recovery.lora import Adapters, targets
from moeprune.recovery.order import split
from moeprune.recovery.pairing import pair
from moeprune.recovery.state import StateFolder
from moeprune.recovery.trainer import Progress, Status, Trainer
from moeprune.recovery.training import Training
from moeprune.recovery.writing import Places


class Session:
    """Student and teacher in memory.

    Args:
        student, master: their checkpoints; ``master`` may be None.
        made: what to do.
        device: where to.
        stack: undoes what was done to the models.

    Attributes:
        places: where on disk the trained weights stand.
        groups: by name, the group of every weight that is written anew.
        adapters: with ``lora``, until they are merged.

    Raises:
        MoepruneError: the student has nothing of what is to train, or no experts pair.
    """

    def __init__(
        self,
        student: Checkpoint,
        master: Checkpoint | None,
        made: Training,
        device: torch.device,
        stack: ExitStack,
    ) -> None:
        self.training = made
        self.model: Any = load(student.path, torch.float32, device, student.trust_remote_code)
        self.parameters = parameters_of(self.model)
        self.teacher: Any = None
        if master is not None:
            kind = torch.bfloat16 if made.dtype == "bfloat16" else torch.float32
            self.teacher = load(master.path, kind, device, master.trust_remote_code)
            self.teacher.requires_grad_(False)
        if made.how == "lora":
            self.groups = targets(self.model, self.parameters, made.train)
        else:
            choose(self.model, self.parameters, made.train)
            self.groups = trained(self.model, self.parameters)
        self.places = Places(student, self.model, self.groups)
        for name in self.groups:  # weights that were not converted are still the mapped file
            p = self.model.get_parameter(name)
            p.data = p.data.clone()
        self.zeros = Zeros(self.model, [n for n in self.parameters.masked if n in self.groups])
        self.pairs = None
        if made.how == "expert-kd":
            assert master is not None
            taught = parameters_of(self.teacher).sites
            pairing = pair(student, master, self.parameters.sites, taught)
            self.pairs = ExpertPairs(self.parameters.sites, taught, pairing, made.target)
            stack.callback(self.pairs.close)
        frozen = [name for name, _ in self.model.named_parameters() if name not in self.groups]
        self._frozen = digests(self.model, frozen)
        self.adapters = None
        if made.how == "lora":
            torch.manual_seed(made.seed)  # of the matrices that peft begins with
            self.adapters = Adapters(self.model, self.groups, made)

    def train(
        self,
        domains: Sequence[Domain],
        folder: StateFolder,
        header: Mapping[str, Any],
        resume: bool,
        accelerator: Accelerator,
        listen: Callable[[Status], None],
    ) -> Progress:
        """Train to the end; the student then has the best weights, and the zeros that it had."""
        made = self.training
        train_NL, held_NL = (_rows(part) for part in split(domains, made.holdout))
        if made.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if made.neftune:
            Noise(self.model.get_input_embeddings(), made.neftune)
        teach = bool(made.kl_weight) or (self.pairs is not None and made.target == "stream")
        model = self.model if self.adapters is None else self.adapters.model
        learner = Learner(model, self.teacher, self.pairs, teach, made.dtype == "bfloat16")
        groups = self.groups if self.adapters is None else self.adapters.groups
        zeros = self.zeros if self.adapters is None else Zeros(self.model, ())
        width = next(iter(self.parameters.sites.values())).shape.hidden
        trainer = Trainer(
            learner, groups, zeros, train_NL, held_NL, made, folder, accelerator, listen, width
        )
        if resume:
            trainer.resume()
        done = trainer.run(header)
        if self.adapters is not None and not made.adapter:
            learner.student = self.adapters.merge()
            self.zeros.restore(self.model)
            done.merged = trainer.measure(header)
        return done

    def changed(self) -> dict[str, list[int]]:
        """Tensors that will change on disk, and all, by group.

        Raises:
            AssertionError: something that was frozen is not what it was.
        """
        now = digests(self.model, self._frozen)
        moved = [name for name, value in now.items() if value != self._frozen[name]]
        assert not moved, f"{moved[0]} is frozen and changed"
        return self.places.changed(self.places.pieces(), self.groups)


def _rows(domains: Sequence[Domain]) -> Tensor:
    """All sequences, which have to be of one length."""
    tables = [domain.ids_NL for domain in domains if len(domain.ids_NL)]
    if len({table.shape[1] for table in tables}) > 1:
        raise DataError("sequences of different lengths")
    return torch.cat(tables) if tables else torch.empty(0, 1, dtype=torch.int64)
