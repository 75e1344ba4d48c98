"""The methods, one file each; they import ``moeprune.core`` only and never each other."""
