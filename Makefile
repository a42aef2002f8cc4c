# make quickstart   train a tiny vision-language model on real pictures and look at the result
# make install      .venv alone: all that recipes need, torchvision for a CPU-only torch among it
# make test         the test suite, offline, on the CPU
# make test-faults  runs are killed, starved and misled: the tests that docs/faults.md lists
# make test-sweep   every statement and argument of every recipe left out, one at a time: is each heard? And launches
# make test-families every family of today on its twin: labels, adapters, 4-bit, training, a fresh process, merge
# make mutants      faults put into the source, one at a time: do the tests notice each?
# make test-browser the page, the trackers and the server, in a headless Chromium (Debian: apt-get install chromium)
# make test-latest  the test suite on the newest releases of our dependencies: what would break?
# make check        lint, format and types
# make gpu          on a machine with a GPU, first of all: what works there, how fast, in how much memory; nine minutes
# make bench        training, collation and single switches beside TRL's own path, into benchmarks/README.md
# make bench-peers  recipes beside LLaMA-Factory, ms-swift and TRL on the same rows: speed, labels, planted faults
#
# Each verb makes .venv if it is missing and installs what it needs, once, with the first Python from 3.11 on that is on
# the PATH. Another one: make PYTHON=python3.13 quickstart

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2> /dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PURELIB := import sysconfig; print(sysconfig.get_paths()["purelib"])

.PHONY: help quickstart install test test-faults test-sweep test-families mutants test-browser test-latest check bench bench-peers gpu

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

# One thread: two busy threads on a shared core make a tiny training step many times slower.
quickstart: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python recipes/quickstart.py
	@echo "Next, for every other command: source $(VENV)/bin/activate"

install: $(VENV)/.installed
	@echo "Next: source $(VENV)/bin/activate"

# Two workers are faster than two threads.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not faults and not sweep and not families"

test-sweep: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m sweep

test-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $$(grep -o 'tests/[a-z_/]*\.py::[a-z0-9_]*' docs/faults.md | sort -u)

test-families: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m families

mutants: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

test-browser: $(VENV)/web/.installed
	$(VENV)/web/bin/python -m pytest -m web \
		tests/test_chat.py tests/evaluation/test_samples.py tests/test_serving.py tests/evaluation/test_trackers.py

# In an environment of its own: these packages as new as they come, torch and all else as in .venv.
LATEST := $(VENV)/latest
NEWEST := transformers trl peft accelerate datasets bitsandbytes
VERSIONS = -c 'import importlib.metadata as m, sys; print(*(f"{n} {m.version(n)}" for n in sys.argv[1:]), sep="\n")' $(NEWEST)
test-latest: $(VENV)/.dev
	$(call behind,$(LATEST))
	ln -s $(abspath $(VENV))/test-only $(LATEST)/test-only
	grep '^torch==' requirements.txt > $(LATEST)/constraint.txt
	$(PIP) --python $(LATEST)/bin/python install --quiet --upgrade --constraint $(LATEST)/constraint.txt $(NEWEST)
	$(BIN)/python $(VERSIONS) > $(LATEST)/before.txt
	$(LATEST)/bin/python $(VERSIONS) > $(LATEST)/after.txt
	@if cmp -s $(LATEST)/before.txt $(LATEST)/after.txt; then echo "No release is newer than those of $(VENV)."; exit 0; fi; \
	$(LATEST)/bin/python -m pytest -n 2 --dist loadfile -m "not faults and not sweep and not families"; broken=$$?; \
	echo "What broke, if anything, is listed above. Versions of $(VENV), and those of this run:"; \
	diff --side-by-side --suppress-common-lines --width 80 $(LATEST)/before.txt $(LATEST)/after.txt; exit $$broken

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch as it is in .venv, or as requirements.txt has it: a CUDA build where there is a GPU.
gpu: $(VENV)/.installed
	$(PIP) install --quiet --constraint requirements.txt --editable ".[kernels,torchvision]"
	$(BIN)/python benchmarks/gpu.py

# Some twenty minutes; whatever else runs on the machine shows in the figures.
bench: $(VENV)/.dev
	PYTHONPATH=tests/torchvision_cpu $(BIN)/python benchmarks/cpu.py --write

# Each of the other tools in an environment of its own under .venv/peers; two hours and a half, most of it the rounds.
bench-peers: $(VENV)/.dev
	PYTHONPATH=tests/torchvision_cpu $(BIN)/python benchmarks/peers/bench.py --write

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { \
		echo "No Python from 3.11 to 3.14 is on the PATH. Install one, or name yours: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# requirements.txt fixes torch to one release and accepts any build of it, so a CUDA or CPU build that is
# already in .venv stays where it is.
#
# The processors of half the model families need torchvision, whose common wheel is a CUDA build: beside a torch without
# CUDA it would break `import trl`. So it lies in a folder of its own, without its dependencies, or pip would pull a second
# torch in, and a module that Python imports at start shows where it is (tests/torchvision_cpu). timm is for the families
# whose tower it brings.
$(VENV)/.installed: requirements.txt pyproject.toml Makefile tests/torchvision_cpu/sitecustomize.py | $(BIN)/python
	$(PIP) install --quiet --requirement requirements.txt --editable .
	rm -rf $(VENV)/test-only
	$(PIP) install --quiet --no-deps --target $(VENV)/test-only torchvision==0.28.0 timm==1.0.31
	cp tests/torchvision_cpu/sitecustomize.py "$$($(BIN)/python -c '$(PURELIB)')/torchvision_cpu.py"
	echo "import torchvision_cpu" > "$$($(BIN)/python -c '$(PURELIB)')/torchvision_cpu.pth"
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint requirements.txt --editable ".[dev]"
	@touch $@

# A fresh environment that finds the packages of .venv after its own.
define behind
	rm -rf $(1)
	$(BIN)/python -m venv --without-pip $(1)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/behind.pth"
endef

# Gradio 6 and trackio want a Pillow older than the one in requirements.txt. So they lie in an environment of their own.
$(VENV)/web/.installed: Makefile pyproject.toml | $(VENV)/.dev
	$(call behind,$(@D))
	$(PIP) --python $(@D)/bin/python install --quiet --editable ".[web,test-browser]"
	@touch $@
