"""Opens results of moeprune, those included that stock classes cannot express."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import GenerationConfig

from moeprune.models.checkpoint import Checkpoint
from moeprune.models.generated import own_class, uneven_class
from moeprune.models.loading import find_layers, skeleton
from moeprune.models.native import model_class, quiet_transformers, read_config, text_config
from moeprune.models.quantised import KEYS, SUPPORTED, Quantisation, lazy_state
from moeprune.models.sites import is_uneven, resize_facts


def load(
    source: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """Open any result of moeprune, or a stock checkpoint, as a transformers model in eval mode.

    On the CPU, fp8 and MXFP4 weights are dequantised; elsewhere transformers does with quantised
    checkpoints what it does by default.

    Args:
        source: directory, hub id, or ``demo``.
        dtype: ``"auto"`` takes the checkpoint's own.
        device: where to put the weights.
        trust_remote_code: run the checkpoint's own Python files, if it brings some.

    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        UnsupportedModelError: transformers does not know the architecture, or weights are stored
            in a way that cannot be read.
    """
    checkpoint = Checkpoint.open(source, trust_remote_code)
    config = read_config(checkpoint)
    quantisation = Quantisation.of(checkpoint)
    if quantisation.method is None:
        quantisation.refuse()
    elif quantisation.method in SUPPORTED and torch.device(device).type == "cpu":
        return _dequantised(checkpoint, quantisation, config, dtype)
    cls = _class_of(checkpoint, config)
    with quiet_transformers():
        model = cls.from_pretrained(
            checkpoint.path, dtype=dtype, device_map={"": device}, use_safetensors=True
        )
    return model.eval()


def _class_of(checkpoint: Checkpoint, config: Any) -> Any:
    """The class that opens a checkpoint: ours where no stock one can."""
    cls = model_class(checkpoint, config)
    own = own_class(cls, text_config(config))
    if own is cls and is_uneven(config):
        model = skeleton(checkpoint, config, torch.float32)
        return uneven_class(cls, resize_facts(model, find_layers(model)[0]))
    return own


def _dequantised(
    checkpoint: Checkpoint, quantisation: Quantisation, config: Any, dtype: Any
) -> Any:
    quantisation.refuse()
    for part in (config, text_config(config)):
        for key in KEYS:
            vars(part).pop(key, None)
    if dtype == "auto":
        dtype = getattr(text_config(config), "dtype", None) or torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": "cpu"}}
    if (checkpoint.path / "generation_config.json").is_file():
        options["generation_config"] = GenerationConfig.from_pretrained(checkpoint.path)
    cls = _class_of(checkpoint, config)
    with quiet_transformers():
        state = lazy_state(checkpoint, quantisation, quantisation.names(checkpoint), dtype)
        model = cls.from_pretrained(None, config=config, state_dict=state, **options)
    model.config.name_or_path = str(checkpoint.path)
    return model.eval()
