"""Pure computation: accumulators, plans, budgets and kernels. Knows torch and numpy only."""
