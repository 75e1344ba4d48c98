# Everything runs in .venv, with the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint bench figures clean

demo: $(STAMP)
	$(BIN)/moeprune demo --out demo-out --force

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python benchmarks/calibration.py

# Regenerates every committed figure and table.
figures: $(STAMP)
	$(BIN)/python tests/golden/make.py
	$(BIN)/python benchmarks/demo_figures.py
	$(BIN)/python benchmarks/verify_rules.py
	$(BIN)/python tests/architectures.py

# torch is installed first and by its exact version: only then is it the CPU build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-out
