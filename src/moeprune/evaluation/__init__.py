"""Measures what was lost."""
