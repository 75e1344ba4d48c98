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

ROUTER_TENSORS = {"ZayaRouter": ("router_mlp.out_proj.weight", "balancing_biases")}
"""Router classes that are networks: which of their tensors have one row per expert. In others they
are found by their sizes."""

LOGITS_POSITION = {"Llama4Router": 1}
"""Router classes whose logits are not the first of their outputs: which one."""

EXPERT_TABLES = ("tid2eid",)
"""Last part of the name of router tensors [V, K] that choose experts by token id."""

UNDECORATED = {"DbrxExperts": False, "LongcatFlashExperts": False, "Llama4TextExperts": True}
"""Experts classes without transformers' experts interface, and whether they store their matrices
transposed. All have gates and no biases; their gate and up matrices are not interleaved."""

GATED_INPUTS = frozenset({"Llama4TextExperts"})
"""Experts classes whose inputs are multiplied by the gate, and not their outputs."""

FLAT_MATRICES = {
    "DbrxExperts": {"mlp.w1": ("gate", -1), "mlp.v1": ("up", -1), "mlp.w2": ("down", -2)}
}
"""Experts classes that store a matrix of all experts as one, [E * I, H]: each parameter's role, and
the axis of the inputs."""

REFUSED = {
    "doge": "its experts are rows of embeddings found by product keys, not networks",
    "jetmoe": "it routes attention experts as well, and its experts have their own layout",
}
"""Model types whose experts are not pruned, with the reason that the user is told."""

PADDABLE = frozenset({
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32",
    "deepseek_v4", "dots1", "dots3_note_text", "exaone_moe", "glm4_moe", "glm4_moe_lite",
    "glm_moe_dsa", "gpt_oss", "hy_v3", "hy_v4", "inkling2_text", "inkling_text", "kimi_linear",
    "kolibri1", "laguna", "lfm2_moe", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text",
    "nemotron_h", "solar_open",
})  # fmt: skip
"""Model types whose router adds a bias to independent scores before the top-k, so that a pad with
a bias of -1e9 is never chosen and changes no other expert's weight."""

OWN_COUNTS = frozenset({"dots3_note_text", "gemma4_text"})
"""Model types whose configuration asks for equal ``per_layer_config`` entries in all layers with
the same kind of attention: numbers of experts per layer stand in ``experts_per_layer`` instead."""

UNEVEN_REFUSED = {
    "dbrx": "all its experts are one matrix, which the runtime of uneven layers cannot shrink",
    "longcat_flash": "its identity experts take the ids after the last expert, of all layers alike",
    "zaya": "its blocks read the id of their skip class from the number for all layers",
}
"""Model types whose layers must all have the same number of experts, with the reason."""

KERNEL_COUNTS = {
    "deepseek_v4": frozenset({*(2**n for n in range(10)), 192, 320, 384, 448, 576}),
}
"""Numbers of experts for which a server's fused router kernel was built, by model type."""

NOVICES_REFUSED = {
    "dbrx": "all its experts are one matrix, which the runtime of novices cannot shrink",
    "llama4_text": "its router scales what goes into an expert, not what comes out",
    "longcat_flash": "its identity experts take the ids after the last expert, as novices would",
}
"""Model types whose experts are deleted and masked but not replaced by constants, and why."""

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

DEPTH_REFUSED: dict[str, str] = {}
"""Families whose layers cannot be left out, with the reason."""

STATE_ASIDE: dict[str, tuple[str, str]] = {
    # earlier layers' inputs are collected outside the layers, for all that come later
    "inkling2_text": ("", "its layers also read what went into the layers before them"),
    # keys and values of an earlier layer are put into a dictionary that all layers are given
    "gemma4_text": ("num_kv_shared_layers", "its last layers read keys and values of earlier ones"),
}
"""Model types whose layers hand on more than their outputs, so that a walk cannot go on in its
middle: the configuration field that must be set for it ("": always), and what the user is told."""
