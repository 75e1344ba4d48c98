"""Pruned models in servers: a plugin for vLLM, and plans in the formats that servers read."""
