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

PADDABLE = frozenset({
    "afmoe", "deepseek_v3", "dots1", "exaone_moe", "glm4_moe", "gpt_oss", "hy_v3", "kolibri1",
    "laguna", "lfm2_moe", "minimax_m2", "nemotron_h", "solar_open",
})  # fmt: skip
"""Model types whose router adds a bias to independent scores before the top-k, so that a pad with
a bias of -1e9 is never chosen and changes no other expert's weight."""

OWN_COUNTS = frozenset({"dots3_note_text", "gemma4_text"})
"""Model types whose configuration asks for equal ``per_layer_config`` entries in all layers with
the same kind of attention: numbers of experts per layer stand in ``experts_per_layer`` instead."""

UNEVEN_REFUSED: dict[str, str] = {}
"""Model types whose layers must all have the same number of experts, with the reason."""

KERNEL_COUNTS = {
    "deepseek_v4": frozenset({*(2**n for n in range(10)), 192, 320, 384, 448, 576}),
}
"""Numbers of experts for which a server's fused router kernel was built, by model type."""
