"""Numerical kernels: one page of mathematics per file, free of models and of disk."""
