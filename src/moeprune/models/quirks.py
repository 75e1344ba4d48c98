"""What discovery cannot see, as data. A new model family should need no entry here."""

from __future__ import annotations

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""config.json keys that hold E, whichever a vendor uses."""

TOP_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip
"""config.json keys that hold K."""

ROUTER_NAMES = ("gate", "router")
"""Attribute of the MoE block (or of the decoder layer) that is the router."""

PER_EXPERT_NAMES = (
    "bias", "e_score_correction_bias", "expert_bias", "per_expert_scale", "balancing_biases",
)  # fmt: skip
"""Last part of the name of router tensors that have one entry per expert; a matrix called
``weight`` has one row per expert. Any other router tensor of that size is refused."""

REFUSED = {
    "doge": "its experts are rows of embeddings found by product keys, not networks",
    "jetmoe": "it routes attention experts as well, and its experts have their own layout",
    "dbrx": "its experts are stored as one matrix for all experts (planned)",
    "llama4": "its router scales the experts' inputs, all experts run densely (planned)",
    "llama4_text": "its router scales the experts' inputs, all experts run densely (planned)",
    "longcat_flash": "its router has identity experts and no experts interface (planned)",
    "zaya": "its router is a network, and transformers resets its biases (planned)",
}
"""Model types whose experts are not pruned yet, with the reason that the user is told."""

REFUSED_LAYERS = {"tid2eid": "some layers choose experts by a table over token ids (planned)"}
"""Router tensors that make an edit of the expert list wrong, with the reason."""

MTP_COUNT_KEYS = (
    "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers",
    "num_mtp_modules",
)  # fmt: skip
"""config.json keys that say how many prediction layers are attached; the first is the commonest."""

MTP_FLAGS = ("use_mtp",)
"""config.json keys that say whether there are any."""

MTP_PADDED_LISTS = (
    "layer_types", "mlp_layer_types", "layers_block_type", "swiglu_limits", "swiglu_limits_shared",
    "rope_theta", "partial_rotary_factors",
)  # fmt: skip
"""config.json lists with one entry per layer that some vendors let cover attached layers too."""

ONLY_WITH_OWN_CODE = {
    "deepseek": "DeepSeekMoE's successors are known: deepseek_v2 (DeepSeek-V2-Lite) and "
    "deepseek_v3 (Moonlight-16B-A3B)",
}
"""Model types that only the code in their checkpoints knows, with what to use instead."""
