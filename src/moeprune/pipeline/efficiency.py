"""The section ``efficiency`` of an evaluation: size, speed, memory, energy beside the teacher."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moeprune.errors import DataError, UnsupportedModelError
from moeprune.evaluation.speed import Sample, rates, speed_verdict, speedup, take_turns
from moeprune.evaluation.vllm_speed import has_vllm, vllm_turns
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.description import idle_parameters
from moeprune.models.loading import find_layers
from moeprune.models.quantised import parameters
from moeprune.models.runtime import load
from moeprune.models.sites import find_sites
from moeprune.pipeline.inputs import Compute, Progress, Source, Text, read_heldout, silent
from moeprune.pipeline.meters import Rapl, machine, meter

UNKNOWN_ENERGY = "unknown: this machine does not tell its energy, or not to this user"


@dataclass(frozen=True)
class Turns:
    """How speed is measured.

    Attributes:
        rounds: turns of each model that count.
        warm_up: turns before them.
        batch: sequences at once.
        prompt_tokens: of each.
        new_tokens: of each.
    """

    rounds: int = 10
    warm_up: int = 2
    batch: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32

    def __post_init__(self) -> None:
        least = {"rounds": 2, "warm_up": 0, "batch": 1, "prompt_tokens": 2, "new_tokens": 2}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise DataError(f"{name.replace('_', ' ')} must be at least {number}")


def efficiency(
    source: Source,
    teacher: Source | None,
    text: Text = Text(),
    turns: Turns = Turns(),
    compute: Compute = Compute(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Sizes, speed, memory and energy of a model and its teacher, measured in turns.

    Both models are in memory at once, whole.

    Args:
        source: the model.
        teacher: what it was made from, if known.
        text: where prompts come from; its ``sequences`` and ``length`` do not matter.
        turns: how speed is measured.
        compute: where; ``workers`` does not matter.
        progress: as in the stages.

    Returns:
        JSON types; docs/generation.md describes them.

    Raises:
        MoepruneError: anything the user can mend.
    """
    sources = {"model": source} if teacher is None else {"model": source, "teacher": teacher}
    opened = {n: Checkpoint.open(s, compute.trust_remote_code) for n, s in sources.items()}
    prompts = _prompts(opened["model"], text, turns)
    models = {name: _load(name, opened, compute) for name in sources}
    device = next(iter(models.values())).device
    rapl = Rapl()
    samples = take_turns(
        models,
        prompts,
        turns.new_tokens,
        turns.warm_up,
        meter(device, rapl),
        lambda done, total: progress("measuring speed", done, total),
    )
    shape = tuple(prompts[0].shape)
    result: dict[str, Any] = {
        "machine": machine(device),
        "dtype": str(models["model"].dtype).removeprefix("torch."),
        "engine": "transformers",
        "turns": vars(turns),
        "energy": "of the processor packages, by RAPL" if rapl.known else UNKNOWN_ENERGY,
        "models": {
            name: _row(opened[name], model, rates(samples[name], shape, turns.new_tokens))
            for name, model in models.items()
        },
    }
    if teacher is not None:
        result |= _ratios(samples, result["models"])
    del models
    gc.collect()  # vLLM loads them itself
    result["vllm"] = _vllm(opened, prompts, turns, result["dtype"], progress)
    return result


def _vllm(
    opened: Mapping[str, Checkpoint],
    prompts: Sequence[Tensor],
    turns: Turns,
    dtype: str,
    progress: Progress,
) -> dict[str, Any]:
    """The same turns under vLLM, where it is installed."""
    if not has_vllm():
        return {"status": "not installed"}

    def tell(done: int, total: int) -> None:
        progress("measuring speed under vLLM", done, total)

    paths = {name: checkpoint.path for name, checkpoint in opened.items()}
    try:
        samples, release = vllm_turns(
            paths, prompts, turns.new_tokens, turns.warm_up, dtype, progress=tell
        )  # fmt: skip
    except UnsupportedModelError as error:
        return {"status": error.problem}
    shape = tuple(prompts[0].shape)
    rows = {name: rates(found, shape, turns.new_tokens) for name, found in samples.items()}
    found = {"status": f"measured with vLLM {release}", "models": rows}
    return found | (_speeds(samples) if "teacher" in samples else {})


def _prompts(checkpoint: Checkpoint, text: Text, turns: Turns) -> list[Tensor]:
    """Windows of held-out text, from the first domain on, as often again as is needed.

    Real text, and not random tokens: which experts are used decides how long a step takes.
    """
    length = turns.prompt_tokens
    domains = read_heldout(checkpoint, replace(text, sequences=turns.batch, length=length))
    rows_NL = torch.cat([domain.ids_NL for domain in domains])
    picks = torch.arange(turns.rounds * turns.batch) % len(rows_NL)
    return [rows_NL[part] for part in picks.reshape(turns.rounds, turns.batch)]


def _load(name: str, opened: Mapping[str, Checkpoint], compute: Compute) -> Any:
    dtype = compute.open(opened[name]).dtype
    return load(opened[name].path, dtype, compute.device, compute.trust_remote_code)


def _row(checkpoint: Checkpoint, model: Any, measured: Mapping[str, Any]) -> dict[str, Any]:
    sites = find_sites(model, find_layers(model)[0]).values()
    total = parameters(checkpoint)
    weights = _weights(model)
    memory = sum(tensor.nbytes for tensor in weights)
    working = measured["working_bytes"]
    return {
        "disk_bytes": checkpoint.nbytes,
        "memory_bytes": memory,
        "parameters": total,
        "active_parameters": total - idle_parameters(sites),
        "nonzero_parameters": total - sum(_zeros(tensor) for tensor in weights),
        "experts": sum(site.shape.experts for site in sites),
        "top_k": max((site.shape.top_k for site in sites), default=None),
        **measured,
        "peak_bytes": None if working is None else memory + working,
    }


def _weights(model: Any) -> list[Tensor]:
    """Parameters and buffers, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return list({(t.data_ptr(), t.shape, t.stride()): t for t in tensors}.values())


def _zeros(tensor: Tensor) -> int:
    if not isinstance(tensor, torch.nn.Parameter):
        return 0
    return tensor.numel() - int(tensor.count_nonzero())


def _ratios(
    samples: Mapping[str, Sequence[Sample]], rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The model over its teacher."""
    sizes = {
        key: rows["model"][key] / rows["teacher"][key]
        for key in ("disk_bytes", "memory_bytes", "parameters", "active_parameters")
    }
    speeds = _speeds(samples)
    return {"ratio": sizes | speeds["ratio"], "findings": speeds["findings"]}


def _speeds(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    mine, teachers = samples["model"], samples["teacher"]
    speeds = {
        kind: speedup([getattr(s, kind) for s in mine], [getattr(s, kind) for s in teachers])
        for kind in ("prefill", "decode")
    }
    return {
        "ratio": {kind: ratio.to_json() for kind, ratio in speeds.items()},
        "findings": [speed_verdict(ratio, kind) for kind, ratio in speeds.items()],
    }
