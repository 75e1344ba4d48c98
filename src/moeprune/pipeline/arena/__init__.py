"""Many methods on one calibration, measured alike: what ``moeprune compare`` does."""
