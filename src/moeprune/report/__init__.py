"""What was done and what it cost, for people: one self-contained HTML file per run."""
