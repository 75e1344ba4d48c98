"""The embedded model and its text."""
