# Each target sets up what it needs: a virtual environment in .venv, then the package in it. Set-up runs once, and
# again only after pyproject.toml or constraints.txt changed.
#   make PYTHON=/path/to/python3.12 ...   another Python (3.11 or newer) for the virtual environment
#   make serve ARGS="--port 9000"         arguments for flexmoe serve
#   make test ARGS="-k scheduler -x"      arguments for pytest
#   make test WORKERS=0                   all tests one after the other

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# What pip would do on one core. Some packages hold files that are no Python of this version: those stay as they are.
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
ARGS ?=
WORKERS ?= 2
# Tests that start processes, servers and a browser, when the rest is done: these wait for much, and compute for little.
STARTING := multi or server or web
# Whole files to whichever worker is free, in the order that tests/conftest.py gives them.
SHARED_OUT := --dist loadfile --no-loadscope-reorder
# Tests start Python hundreds of times, each of which would compile this package's modules again.
export PYTHONDONTWRITEBYTECODE :=
OR_NONE := || [ $$? -eq 5 ]  # pytest's status when ARGS leave nothing to run

USER_READY := $(VENV)/.ready
TEST_READY := $(VENV)/.ready-test
REPORT_READY := $(VENV)/.ready-report

.DEFAULT_GOAL := help
.PHONY: help serve smoke chromium poster test test-computing test-starting check check-style check-types check-imports check-size format \
        performance-docs planner-docs cli-docs clean
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(USER_READY)  ## serve the built-in model at http://127.0.0.1:8000
	$(BIN)/flexmoe serve $(ARGS)

smoke: $(USER_READY)  ## start the server, ask it a question, end it
	$(BIN)/python tools/smoke.py

poster: $(REPORT_READY)  ## make poster and report from the recorded measurements, in build/report
	$(BIN)/flexmoe report --out build/report

test: test-computing test-starting  ## run the tests

test-computing: $(TEST_READY)
	$(BIN)/python -m pytest -m "not ($(STARTING))" --numprocesses $(WORKERS) $(SHARED_OUT) $(ARGS) $(OR_NONE)

test-starting: $(TEST_READY) chromium
	$(BIN)/python -m pytest -m "$(STARTING)" --numprocesses $(WORKERS) $(SHARED_OUT) $(ARGS) $(OR_NONE)

chromium:  # for the tests of the web page, which are skipped without it
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	  || { echo "Installing Chromium with apt-get, for the tests of the web page."; \
	       if [ "$$(id -u)" = 0 ]; then as=; else as="sudo -n"; fi; \
	       $$as apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$as apt-get install -y -qq chromium >/dev/null; } \
	  || echo "Chromium cannot be installed here, so those tests are skipped. On Debian: apt-get install chromium" >&2

check: check-style check-types check-imports check-size  ## style, types, import directions, size budget

check-style: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-types: $(TEST_READY)
	$(BIN)/mypy

check-imports: $(TEST_READY)
	$(BIN)/lint-imports

check-size: $(TEST_READY)
	$(BIN)/python tools/size_budget.py

format: $(TEST_READY)  ## mend what the linter and the formatter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

performance-docs: $(TEST_READY)  ## write docs/performance.md and its picture from the recorded measurements
	$(BIN)/python tools/performance_page.py

planner-docs: $(TEST_READY)  ## write the plans in docs/planner.md from the planner itself
	$(BIN)/python tools/planner_table.py

cli-docs: $(TEST_READY)  ## write docs/cli.md from the command line's own help
	$(BIN)/python tools/cli_help.py

clean:  ## remove the virtual environment, build outputs and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(USER_READY): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing FlexMoE into $(VENV), once; a minute or several, depending on the network."
	@$(PIP) -e '.[server,grammar]'
	@$(COMPILE)
	@touch $@

$(TEST_READY): $(USER_READY)
	@echo "Adding what the checks and tests need to $(VENV), once."
	@$(PIP) -e '.[test]'
	@$(COMPILE)
	@touch $@

$(REPORT_READY): $(USER_READY)
	@echo "Adding what poster and report need to $(VENV), once."
	@$(PIP) -e '.[report]'
	@$(COMPILE)
	@touch $@

$(BIN)/pip:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "FlexMoE needs Python 3.11 or newer, and '$(PYTHON)' is not found." \
	       "Install it, or name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "FlexMoE needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." \
	       "Name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks the module venv, which makes the virtual environment." \
	       "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
