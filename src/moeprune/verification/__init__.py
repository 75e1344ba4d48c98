"""Finds what is wrong with a compressed MoE checkpoint, ours or a stranger's, and says how to mend it."""
