"""What every stage of moeprune takes on a model and a machine, from shapes and constants alone.

A stage reads, computes and writes; reading ahead overlaps computing, so its time is the longest of
the three, or their sum where the stage does one after the other. ``Machine`` holds the constants,
``Shapes`` the model; nothing here measures or reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import published

from moeprune.models.loading import find_layers


@dataclass(frozen=True)
class Shapes:
    """A model by its sizes.

    Attributes:
        name: of the model.
        layers: decoder layers, ``moe`` of them with ``experts`` experts, ``top_k`` a token.
        hidden, vocabulary: sizes.
        expert: parameters of one expert.
        total: parameters in all; ``resident`` of them outside the layers.
        active: parameters that a token is multiplied with, the head included.
        largest: parameters of the largest layer.
        heads: query heads times their width, for attention's own products.
        bytes: of the checkpoint; ``width`` of a parameter of an expert in it.
    """

    name: str
    layers: int
    moe: int
    experts: int
    top_k: int
    hidden: int
    vocabulary: int
    expert: int
    total: int
    resident: int
    active: int
    largest: int
    heads: int
    bytes: int
    width: int

    def pruned(self, ratio: float) -> Shapes:
        """Without that part of the experts."""
        gone = int(self.experts * ratio)
        fewer = gone * self.expert
        return replace(
            self,
            experts=self.experts - gone,
            total=self.total - fewer * self.moe,
            largest=self.largest - fewer,
            bytes=self.bytes - fewer * self.moe * self.width,
        )


def shapes_of(name: str, layers: int | None = None) -> Shapes:
    """The sizes of a published model, from its configuration."""
    return shapes_from(name, published.config_of(name, layers), published.MODELS[name].fp8)


def shapes_from(name: str, config: dict[str, object], fp8: bool = False) -> Shapes:
    """The sizes of the model of a config.json."""
    model = published.skeleton(config)
    found = published.sites(model)
    _, modules = find_layers(model)
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in modules]
    total = sum(p.numel() for p in model.parameters())
    site = next(iter(found.values()))
    experts = sum(p.numel() for p in site.experts.parameters())
    one = experts // site.shape.experts
    text = model.config.get_text_config()
    embedding = text.vocab_size * text.hidden_size
    idle = sum(
        sum(p.numel() for p in s.experts.parameters()) - s.shape.top_k * one for s in found.values()
    )
    tied = bool(text.tie_word_embeddings)
    head = getattr(text, "qk_nope_head_dim", 0) + getattr(text, "qk_rope_head_dim", 0)
    head = head or getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    nbytes = 0
    for key, tensor in published.stored(model).items():
        small = fp8 and published.in_fp8(key, tensor)
        nbytes += tensor.numel() * (1 if small else tensor.element_size())
        if small:  # a float32 scale per 128 x 128
            nbytes += 4 * -(-tensor.shape[0] // 128) * -(-tensor.shape[1] // 128)
    return Shapes(
        name=name,
        layers=len(per_layer),
        moe=len(found),
        experts=site.shape.experts,
        top_k=site.shape.top_k,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        expert=one,
        total=total,
        resident=total - sum(per_layer),
        active=total - idle - (0 if tied else embedding),
        largest=max(per_layer),
        heads=text.num_attention_heads * head,
        bytes=nbytes,
        width=1 if fp8 else 2,
    )


@dataclass(frozen=True)
class Machine:
    """Constants of one machine or cluster; rates are per second.

    Attributes:
        name: of the machine.
        nodes: how many of it.
        read: bytes from the disk, per node.
        shared: bytes from storage that all nodes share; None where each has its own copy.
        write: bytes to the disk.
        flops: of products of 16-bit matrices, all of a node's devices, as the walk attains them.
        link: bytes to the device that computes; None where that is the CPU.
        load: bytes through the conversion of a layer, per node: copies in memory.
        decode: parameters decoded from fp8.
        cores: of the CPU, per node.
        nmi: entries of two matrices compared, per core.
        memory: bytes of RAM per node.
        start: seconds that a command takes before it works.
    """

    name: str
    nodes: int
    read: float
    shared: float | None
    write: float
    flops: float
    link: float | None
    load: float
    decode: float
    cores: int
    nmi: float
    memory: float
    start: float

    def read_per_node(self) -> float:
        """Bytes per second that one node gets while all read the same."""
        return self.read if self.shared is None else min(self.read, self.shared / self.nodes)


@dataclass(frozen=True)
class Work:
    """How much is asked for: tokens in all, and tokens per sequence."""

    calibrate: int = 128 * 2048
    recover: int = 600 * 512
    evaluate: int = 256 * 2048
    length: int = 2048
    ratio: float = 0.25


@dataclass(frozen=True)
class Cost:
    """One stage.

    Attributes:
        stage: its name.
        read, written: bytes from and to the disk, of one node.
        flops: of all nodes.
        seconds: in all; ``parts`` are the seconds of what may bound it.
        memory: bytes in RAM of one node.
    """

    stage: str
    read: float
    written: float
    flops: float
    parts: dict[str, float]
    seconds: float
    memory: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])


def walk_flops(shapes: Shapes, tokens: int, length: int, head: bool = False) -> float:
    """Two per parameter and token, and attention's two products over half of the square."""
    outside = shapes.vocabulary * shapes.hidden  # the head, which calibration does not reach
    attention = 2 * 2 * shapes.heads * (length / 2) * shapes.layers
    return tokens * (2.0 * (shapes.active - (0 if head else outside)) + attention)


def walk(
    stage: str, shapes: Shapes, machine: Machine, tokens: int, length: int, head: bool
) -> Cost:
    """Every layer once: read, converted, computed; the next is read meanwhile."""
    layers = shapes.bytes * (1 - shapes.resident / shapes.total)
    values = (shapes.total - shapes.resident) * 2.0  # bf16 in memory
    reading = layers / machine.read_per_node()
    converting = values / machine.load
    if shapes.width == 1:
        converting += (shapes.total - shapes.resident) / machine.decode
    flops = walk_flops(shapes, tokens, length, head)
    parts = {"disk": reading, "arithmetic": flops / machine.nodes / machine.flops}
    if machine.link is not None:
        parts["link"] = values / machine.link
    parts["conversion"] = converting
    hidden = 3 * tokens / machine.nodes * shapes.hidden * 2
    memory = 2 * shapes.largest * 2.0 + shapes.resident * 2.0 + hidden
    # the first layer is read before anything is computed
    seconds = max(parts.values()) + (reading + converting) / shapes.layers
    return Cost(stage, layers, 0, flops, parts, seconds + machine.start, memory)


def calibrate(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """One walk with statistics."""
    return walk("calibrate", shapes, machine, work.calibrate, work.length, head=False)


def plan_scores(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """A method that needs the statistics alone: ``frequency``, ``reap``, ``mone``..."""
    table = shapes.moe * shapes.experts * shapes.hidden * 8.0
    parts = {"disk": table / machine.read_per_node()}
    seconds = sum(parts.values()) + machine.start
    return Cost("plan: scores", table, 0, 0, parts, seconds, table / shapes.moe)


def plan_nmi(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """``moeits``: every pair of experts of a layer, each of their matrices; layers over nodes."""
    read = shapes.moe * shapes.experts * shapes.expert * shapes.width / machine.nodes
    pairs = shapes.experts * (shapes.experts - 1) / 2 * shapes.moe
    entries = pairs * shapes.expert
    parts = {
        "disk": read / machine.read_per_node(),
        "comparing": entries / (machine.nmi * machine.cores * machine.nodes),
    }
    # codes are kept of one role's matrices, two bytes an entry
    memory = shapes.experts * shapes.expert / 3 * 2.0 + shapes.largest * 2.0
    return Cost("plan: NMI", read, 0, 0, parts, sum(parts.values()) + machine.start, memory)


def plan_walk(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """A method that edits as it goes (``sparsegpt``, ``dern``): the layers twice in one walk."""
    once = walk("plan: walk", shapes, machine, work.calibrate, work.length, head=False)
    parts = once.parts | {"arithmetic": 2 * once.parts["arithmetic"]}
    seconds = once.seconds + max(parts.values()) - max(once.parts.values())
    return replace(once, parts=parts, flops=2 * once.flops, seconds=seconds)


def apply(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """What is kept is read and written, by one process."""
    kept = float(shapes.pruned(work.ratio).bytes)
    reading, writing = kept / machine.read, kept / machine.write
    parts = {"disk, reading": reading, "disk, writing": writing}
    memory = 64e6
    return Cost("apply", kept, kept, 0, parts, max(parts.values()) + machine.start, memory)


def recover(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """Layer by layer: teacher and student walked, and the student's layers trained on.

    A pass of the student with gradients is three forward passes.
    """
    pruned = shapes.pruned(work.ratio)
    tokens, length = work.recover, min(work.length, 512)
    teacher = walk("recover", shapes, machine, tokens, length, head=False)
    student = walk("recover", pruned, machine, tokens, length, head=False)
    flops = teacher.flops + 4 * student.flops
    parts = {
        key: teacher.parts[key] + student.parts[key] * (4 if key == "arithmetic" else 1)
        for key in teacher.parts
    }
    # weights, gradients and two moments of the trained layer in float32
    memory = teacher.memory + pruned.largest * (2.0 + 16.0)
    seconds = max(parts.values()) + machine.start
    written = pruned.bytes
    return Cost("recover", teacher.read + student.read, written, flops, parts, seconds, memory)


def evaluate(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """The original and the result walked over the same windows, with logits."""
    both = [
        walk("evaluate", model, machine, work.evaluate, work.length, head=True)
        for model in (shapes, shapes.pruned(work.ratio))
    ]
    parts = {key: sum(cost.parts[key] for cost in both) for key in both[0].parts}
    return Cost(
        "evaluate",
        sum(cost.read for cost in both),
        0,
        sum(cost.flops for cost in both),
        parts,
        sum(cost.seconds for cost in both) - machine.start,
        both[0].memory,
    )


STAGES = (calibrate, plan_scores, plan_nmi, plan_walk, apply, recover, evaluate)
"""In the order in which they are run."""
