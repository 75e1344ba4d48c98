"""Finds what is wrong with a compressed MoE checkpoint, and says how to mend it."""
