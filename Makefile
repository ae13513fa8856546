# make train | make test are the two commands of a newcomer; everything else builds on `setup`.
VENV ?= .venv
PY := $(VENV)/bin/python
CONFIG ?= configs/toolbox.yaml
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1)

.PHONY: setup train test check bench bench-cpu gpu format

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*)
	@bash scripts/setup.sh "$(VENV)" "$(HAS_GPU)"
	@touch $@

train: setup
	$(VENV)/bin/pact-fast train $(CONFIG) $(ARGS)

test: setup
	$(PY) -m pytest -q $(ARGS)

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
