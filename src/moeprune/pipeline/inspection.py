"""What a model is and what can be done with it, without reading its weights."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from moeprune.models.abilities import abilities
from moeprune.models.checkpoint import Checkpoint, ConfigOnly, is_weights
from moeprune.models.description import idle_parameters, routing_kind, selection, shared_parameters
from moeprune.models.layout import refuse
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.quantised import parameters
from moeprune.pipeline.inputs import Source, model_name


def inspect(source: Source, trust_remote_code: bool = False) -> dict[str, Any]:
    """What a model is, how it routes, how large it is, and what can be done with it.

    ``source`` may also be a config.json, or a directory with nothing else; the names of the tensors
    are then not known, and sizes are those of the configuration.

    Raises:
        MoepruneError: not a model, or one without experts.
    """
    path = Path(source)
    if path.name == "config.json" and path.is_file():
        source = path.resolve().parent
        checkpoint: Checkpoint = ConfigOnly(source, trust_remote_code)
    elif (path / "config.json").is_file() and not any(map(is_weights, path.iterdir())):
        checkpoint = ConfigOnly(path.resolve(), trust_remote_code)
    else:
        checkpoint = Checkpoint.open(source, trust_remote_code)
    weights = not isinstance(checkpoint, ConfigOnly)
    model = LayeredModel(checkpoint)
    model.model.tie_weights()  # so that no matrix is counted twice
    found = abilities(model, weights)
    if not model.sites and found.reason is not None and "dense" in found.reason:
        refuse(model)  # there is nothing to tell about experts
    numel = parameters(checkpoint) if weights else model.model.num_parameters()
    return {
        "name": model_name(source),
        "path": str(checkpoint.path),
        "architecture": _architecture(checkpoint),
        "model_type": text_config(model.config).model_type,
        "layers": len(model.layers),
        "moe_layers": sorted(model.sites),
        **_experts(model),
        "parameters": numel,
        **_parameters(model, numel),
        "bytes": checkpoint.nbytes if weights else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantisation.method,
        "attached": list(found.heads),
        "fingerprint": checkpoint.fingerprint if weights else None,
        "can": found.can,
        "supported": found.reason is None,
        "reason": found.reason,
    }


def _experts(model: LayeredModel) -> dict[str, Any]:
    """Numbers of experts (one, or one per layer where they differ), sizes and routing."""
    if not model.sites:
        return {}
    sites = [site for _, site in sorted(model.sites.items())]
    shape, counts = sites[0].shape, [site.shape.experts for site in sites]
    return {
        "experts": counts[0] if len(set(counts)) == 1 else counts,
        "top_k": shape.top_k,
        "groups": shape.groups,
        "selection": selection(sites[-1], model.config),
        "gates": routing_kind(sites[-1]),
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
    }


def _parameters(model: LayeredModel, numel: int) -> dict[str, int]:
    """Active for one token, in routed experts, and in experts that every token goes through."""
    if not model.sites:
        return {}
    shapes = [site.shape for site in model.sites.values()]
    routed = sum(shape.experts * shape.expert_parameters for shape in shapes)
    shared = sum(shared_parameters(model.model, site) for site in model.sites.values())
    return {
        "active_parameters": numel - idle_parameters(model.sites.values()),
        "expert_parameters": routed,
        "shared_expert_parameters": shared,
    }


def architectures() -> dict[str, Any]:
    """What was measured about every architecture of the tested transformers; see the tests.

    Returns:
        ``transformers`` (the version that was measured), ``installed``, ``columns`` and, by model
        type and column, ``architectures``.
    """
    text = (files("moeprune.assets") / "architectures.json").read_text(encoding="utf-8")
    return {**json.loads(text), "installed": version("transformers")}


def _architecture(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "?"
