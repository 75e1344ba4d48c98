"""A bridge to lm-evaluation-harness (extra ``eval``): its tasks, on models of any size."""
