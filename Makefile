# make train | make test are the two commands of a newcomer; everything else builds on `setup`.
VENV ?= .venv
PY := $(VENV)/bin/python
CONFIG ?= configs/toolbox.yaml
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1)

# What runs on the oldest versions: one process and two, the ops, nothing that needs a peer or much time.
FLOOR_TESTS ?= tests/ops/test_linear_logprob.py tests/ops/test_linear_pact_loss.py tests/train \
	tests/scale/test_checkpoint.py tests/scale/test_lora.py tests/scale/test_torchrun.py

.PHONY: setup train test test-floor check bench bench-cpu gpu format docs

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*)
	@bash scripts/setup.sh "$(VENV)" "$(HAS_GPU)"
	@touch $@

train: setup
	$(VENV)/bin/pact-fast train $(CONFIG) $(ARGS)

test: setup
	$(PY) -m pytest -q $(ARGS)

test-floor: $(VENV)-floor/.done
	$(VENV)-floor/bin/python -m pytest -q $(FLOOR_TESTS) $(ARGS)

$(VENV)-floor/.done: pyproject.toml setup.py scripts/floor.sh constraints-cpu.txt constraints-floor.txt
	@bash scripts/floor.sh "$(VENV)-floor"
	@touch $@

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_imports.py

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup
	$(VENV)/bin/pact-fast bench $(ARGS)

bench-cpu: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q bench --benchmark-only --benchmark-columns=median,iqr $(ARGS)

gpu:
	bash bench/gpu.sh $(ARGS)

docs: setup
	$(PY) -m pip install -q -e '.[docs]'
	$(VENV)/bin/mkdocs build --strict --quiet $(ARGS)
