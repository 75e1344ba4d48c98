"""What every stage of moeprune takes on a model and a machine, from shapes and constants alone.

A stage reads, computes and writes; reading ahead overlaps computing, so its time is the longest of
the three, or their sum where the stage does one after the other. ``Machine`` holds the constants,
``Shapes`` the model; nothing here measures or reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import published

from moeprune.core.accumulators import LIGHT
from moeprune.models.bounds import sums_bytes
from moeprune.models.data import TOKENS_PER_BATCH
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
        heads: query heads times their width, the mean of keys' and values', for attention's own
            products.
        bytes: of the checkpoint; ``width`` of a parameter of an expert in it.
        statistics: bytes of the sums that a calibration writes by default.
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
    statistics: int

    def in_bf16(self) -> Shapes:
        """Written with ``--dequantize``."""
        return replace(self, bytes=2 * self.total, width=2)

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


@cache
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
    both = head + (getattr(text, "v_head_dim", None) or head)
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
        heads=text.num_attention_heads * both // 2,
        bytes=nbytes,
        width=1 if fp8 else 2,
        statistics=sum(sums_bytes(s.shape, LIGHT) for s in found.values()),
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
        devices: per node; each has a process, which loads all layers for its share of the tokens.
        device_memory: bytes of one of them; None where the CPU computes.
        flops: of products of 16-bit matrices, of one device, as the walk attains them.
        link: bytes to a device; None where that is the CPU.
        load: bytes through the conversion of a layer, per process.
        decode: parameters decoded from fp8, per core.
        digest: bytes through SHA-256, by one core.
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
    devices: int
    device_memory: float | None
    flops: float
    link: float | None
    load: float
    decode: float
    digest: float
    cores: int
    nmi: float
    memory: float
    start: float

    @property
    def processes(self) -> int:
        """Of all nodes."""
        return self.nodes * self.devices

    def alone(self) -> Machine:
        """One process, on one node with one device."""
        return self.sharing(1)

    def sharing(self, batches: int) -> Machine:
        """As many processes as have a batch each, on as many nodes as they can be on."""
        used = max(1, min(self.processes, batches))
        nodes = min(self.nodes, used)
        return replace(self, nodes=nodes, devices=-(-used // nodes))

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
        seconds: in all; ``parts`` are the seconds of what may bound it, ``start`` is before them.
        memory: bytes in RAM of one node.
        on_device: bytes on each device; 0 where none is used.
    """

    stage: str
    read: float
    written: float
    flops: float
    parts: dict[str, float]
    seconds: float
    memory: float
    start: float
    on_device: float = 0

    @property
    def bound(self) -> str:
        """What takes longest."""
        return longest(self.parts, self.start)


def longest(parts: dict[str, float], start: float) -> str:
    """Which of the parts of a stage, or the start of the command."""
    every = {"start": start} | parts
    return max(every, key=lambda part: every[part])


def walk_flops(shapes: Shapes, tokens: int, length: int, head: bool = False) -> float:
    """Two per parameter and token, and attention's two products over half of the square."""
    outside = shapes.vocabulary * shapes.hidden  # the head, which calibration does not reach
    attention = 2 * 2 * shapes.heads * (length / 2) * shapes.layers
    return tokens * (2.0 * (shapes.active - (0 if head else outside)) + attention)


def walk(
    stage: str,
    shapes: Shapes,
    machine: Machine,
    tokens: int,
    length: int,
    head: bool,
    itemsize: int = 2,
) -> Cost:
    """Every layer once: one thread reads, converts and moves it while the last one computes.

    Each process does so for all layers; the first of a node reads from the disk. ``itemsize`` are
    bytes of a parameter in memory. With logits (``head``) a batch is one window here.
    """
    machine = machine.sharing(tokens // (length if head else max(length, TOKENS_PER_BATCH)))
    layers = shapes.bytes * (1 - shapes.resident / shapes.total)
    values = (shapes.total - shapes.resident) * float(itemsize)
    loading = {"disk": layers / machine.read_per_node(), "conversion": values / machine.load}
    if shapes.width == 1:
        loading["conversion"] += (shapes.total - shapes.resident) / machine.decode
    if machine.link is not None:
        loading["link"] = values / machine.link
    flops = walk_flops(shapes, tokens, length, head)
    parts = loading | {"arithmetic": flops / machine.processes / machine.flops}
    hidden = 3 * tokens / machine.processes * shapes.hidden * itemsize
    held = float(itemsize) * (2 * shapes.largest + shapes.resident) + hidden
    beside = machine.device_memory is not None
    # a device has what is computed with, its process at most the layer that is being converted
    memory = machine.devices * (float(itemsize) * shapes.largest if beside else held)
    seconds = _walk_seconds(parts, shapes.layers) + machine.start
    return Cost(
        stage, layers, 0, flops, parts, seconds, memory, machine.start, held if beside else 0
    )


def _walk_seconds(parts: dict[str, float], layers: int) -> float:
    """The first layer is loaded before anything is computed."""
    loading = sum(seconds for part, seconds in parts.items() if part != "arithmetic")
    return max(loading, parts["arithmetic"]) + loading / layers


def calibrate(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """One walk with statistics, which are written as it goes."""
    once = walk("calibrate", shapes, machine, work.calibrate, work.length, head=False)
    return replace(once, written=shapes.statistics)


def plan_scores(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """A method that needs the statistics alone: ``frequency``, ``reap``, ``mone``...

    All of them are checked before the first layer.
    """
    table = float(shapes.statistics)
    parts = {"disk": table / machine.read_per_node(), "checksum": table / machine.digest}
    seconds = sum(parts.values()) + machine.start
    return Cost("plan: scores", table, 0, 0, parts, seconds, table / shapes.moe, machine.start)


def plan_nmi(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """``moeits``: every pair of experts of a layer, each of their matrices; layers over nodes."""
    layers = -(-shapes.moe // machine.nodes)  # of the node that has most
    entries = layers * shapes.experts * shapes.expert
    read = entries * shapes.width
    parts = {
        "disk": read / machine.read_per_node(),
        "comparing": entries * (shapes.experts - 1) / 2 / (machine.nmi * machine.cores),
    }
    if shapes.width == 1:
        parts["decoding"] = entries / machine.decode
    # codes are kept of one role's matrices, two bytes an entry
    memory = shapes.experts * shapes.expert / 3 * 2.0 + shapes.largest * 2.0
    seconds = sum(parts.values()) + machine.start
    return Cost("plan: NMI", read, 0, 0, parts, seconds, memory, machine.start)


def plan_walk(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """A method that edits as it goes (``moe-pruner``, ``wanda``): the layers twice in one walk."""
    once = walk("plan: walk", shapes, machine, work.calibrate, work.length, head=False)
    parts = once.parts | {"arithmetic": 2 * once.parts["arithmetic"]}
    seconds = _walk_seconds(parts, shapes.layers) + machine.start
    return replace(once, parts=parts, flops=2 * once.flops, seconds=seconds)


def apply(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """What is kept is read and written, by one process, and a thread takes its checksum."""
    kept = float(shapes.pruned(work.ratio).bytes)
    parts = {"disk, reading": kept / machine.read} | _written(kept, machine)
    memory = 64e6
    seconds = max(parts.values()) + machine.start
    return Cost("apply", kept, kept, 0, parts, seconds, memory, machine.start)


def _written(nbytes: float, machine: Machine) -> dict[str, float]:
    """Seconds of a checkpoint on its way to the disk, through one process at a time."""
    return {"disk, writing": nbytes / machine.write, "checksum": nbytes / machine.digest}


def recover(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """Layer by layer: teacher and student walked, and the student's layers trained on.

    Both are in float32, by one process. A pass of the student with gradients is three forward
    passes. Quantised weights are not trained: such a student is stored in bf16. What was trained
    is written at the end.
    """
    pruned, one = shapes.pruned(work.ratio).in_bf16(), machine.alone()
    tokens, length = work.recover, min(work.length, 512)
    teacher = walk("recover", shapes, one, tokens, length, head=False, itemsize=4)
    student = walk("recover", pruned, one, tokens, length, head=False, itemsize=4)
    flops = teacher.flops + 4 * student.flops
    parts = {
        key: teacher.parts[key] + student.parts[key] * (4 if key == "arithmetic" else 1)
        for key in teacher.parts
    }
    # gradients, two moments, and the best weights so far, of the trained layer in float32
    beside = 16.0 * pruned.largest
    seconds = _walk_seconds(parts, shapes.layers) + machine.start
    written = _written(pruned.bytes, machine)
    seconds += max(written.values())
    memory, on_device = teacher.memory + student.memory, teacher.on_device + student.on_device
    if one.device_memory is None:
        memory += beside
    else:
        on_device += beside
    return Cost(
        "recover",
        teacher.read + student.read,
        pruned.bytes,
        flops,
        parts | written,
        seconds,
        memory,
        machine.start,
        on_device,
    )


def evaluate(shapes: Shapes, machine: Machine, work: Work) -> Cost:
    """The original and the result walked over the same windows, with logits.

    What the first walk leaves, its hidden states and what is outside the layers, stays meanwhile.
    """
    machine = machine.sharing(work.evaluate // work.length)
    first, second = (
        walk("evaluate", model, machine, work.evaluate, work.length, head=True)
        for model in (shapes, shapes.pruned(work.ratio))
    )
    hidden = 3 * work.evaluate / machine.processes * shapes.hidden * 2
    left = shapes.resident * 2.0 + hidden
    beside = machine.device_memory is not None
    return Cost(
        "evaluate",
        first.read + second.read,
        0,
        first.flops + second.flops,
        {key: first.parts[key] + second.parts[key] for key in first.parts},
        first.seconds + second.seconds - machine.start,
        first.memory + (0 if beside else machine.devices * left),
        machine.start,
        first.on_device + (left if beside else 0),
    )


STAGES = (calibrate, plan_scores, plan_nmi, plan_walk, apply, recover, evaluate)
"""In the order in which they are run."""
