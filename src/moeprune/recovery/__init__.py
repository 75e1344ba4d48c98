"""Training that wins back what pruning lost, without touching what pruning decided."""
