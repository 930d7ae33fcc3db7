# make tune     search RSLLM's loss weights (ARGS="..." goes to the experiment)
# make test     run the tests (TEST_ARGS="..." goes to pytest)
# make faults   kill workers, drivers and nodes of real runs, and see them end as if nothing was
# make check    lint, format and types
# make clean    remove .venv, caches and builds
#
# The first run makes .venv and installs into it. A machine without a GPU saves gigabytes with
# PyTorch's own CPU builds: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make tune

PYTHON ?= python3
BIN := .venv/bin

.PHONY: tune test faults check clean
.DELETE_ON_ERROR:

tune: .venv/runtime
	$(BIN)/python experiments/tune_loss_weights.py $(ARGS)

ifneq ($(wildcard ../shared),)
test: export RSLLM_TEST_ASSETS ?= $(abspath ../shared)
endif
# Threads that wait do not spin beside the processes that tests start.
test faults: export OMP_WAIT_POLICY ?= passive
test: .venv/dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(TEST_ARGS)

faults: .venv/dev
	$(BIN)/python -m pytest tests/faults -m faults $(TEST_ARGS)

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/runtime: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --editable .
	@touch $@

.venv/dev: .venv/runtime
	$(BIN)/python -m pip install --editable ".[dev]"
	@touch $@

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "rsllm needs Python 3.11 or newer; '$(PYTHON)' is not there. Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "rsllm needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
