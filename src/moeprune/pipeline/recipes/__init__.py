"""Several steps in a row, described in YAML: what ``moeprune run`` does."""
