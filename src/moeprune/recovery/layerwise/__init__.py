"""Recovery of one decoder layer after another, with a few layers of both models in memory."""
