"""Opens results of moeprune, those included that stock classes cannot express."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moeprune.models.checkpoint import Checkpoint
from moeprune.models.generated import novice_class, uneven_class
from moeprune.models.loading import find_layers, skeleton
from moeprune.models.native import native_class, quiet_transformers, read_config, text_config
from moeprune.models.sites import is_uneven, resize_facts


def load(
    source: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> Any:
    """Open any result of moeprune, or a stock checkpoint, as a transformers model in eval mode.

    Args:
        source: directory, hub id, or ``demo``.
        dtype: ``"auto"`` takes the checkpoint's own.
        device: where to put the weights.

    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        UnsupportedModelError: transformers does not know the architecture.
    """
    checkpoint = Checkpoint.open(source)
    config = read_config(checkpoint)
    cls: Any = AutoModelForCausalLM
    if getattr(text_config(config), "approximate_experts", None):
        cls = novice_class(native_class(config))
    elif is_uneven(config):
        model = skeleton(config, torch.float32)
        cls = uneven_class(native_class(config), resize_facts(model, find_layers(model)[0]))
    with quiet_transformers():
        model = cls.from_pretrained(checkpoint.path, dtype=dtype, device_map={"": device})
    return model.eval()
