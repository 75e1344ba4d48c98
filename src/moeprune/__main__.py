"""``python -m moeprune``."""

from moeprune.cli.app import main

main()
