# make quickstart   train a tiny vision-language model on real pictures and look at the result
# make test         the test suite, offline, on the CPU
# make check        lint, format and types
#
# Each verb makes .venv if it is missing and installs what it needs, once. Another interpreter:
#   make PYTHON=python3.12 quickstart

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help quickstart test check

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

# One thread: two busy threads on a shared core make a tiny training step many times slower.
quickstart: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python recipes/quickstart.py

# The processors of half the model families need torchvision. Its wheel stays out of site-packages, since
# beside a torch without CUDA it breaks `import trl`; tests/torchvision_cpu shows the tests where it is.
# Two workers are faster than two threads.
test: $(VENV)/.dev $(VENV)/test-only/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { \
		echo "$(PYTHON) is not on the PATH. Install Python 3.11 or newer, or name yours: make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# requirements.txt fixes torch to one release and accepts any build of it, so a CUDA or CPU build that is
# already in .venv stays where it is.
$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --requirement requirements.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint requirements.txt --editable ".[dev]"
	@touch $@

# --no-deps, or pip would pull a second torch in beside it.
$(VENV)/test-only/.installed: Makefile $(VENV)/.dev
	rm -rf $(@D)
	$(PIP) install --quiet --no-deps --target $(@D) torchvision==0.28.0
	@touch $@
