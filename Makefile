# make train    a GPT of your own from nothing, in a few minutes; goes on with one that was stopped
# make test     the tests                    make test-all   and the slow proofs
# make soak     kill -9, damage, full disks, other numbers of processes: the tables of docs/reliability.md
# make rehearsal   32 processes on four hosts of this machine, and what can happen to them: docs/scale.md (as root)
# make fuzz     damaged files, odd paths and bad options for every verb: docs/bad_input.md
# make check    lint, format, types, imports make format     fix what can be fixed
# make wheel    build the package into dist/
# make docs     build the documentation site into site/ (in .venv-docs, without torch)
# Each sets up .venv first if it is missing or older than requirements.txt.

PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
READY := .venv/ready
DOCS_BIN := $(subst .venv,.venv-docs,$(BIN))
DOCS_READY := .venv-docs/ready

.PHONY: train test test-all soak rehearsal fuzz check format wheel docs clean

train: $(READY)
	$(BIN)/minigpt train quickstart $(if $(wildcard runs/quickstart/arguments.yaml),--resume_from_checkpoint latest)

test: $(READY)
	@echo "==> Running the tests on two processes"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(READY)
	@echo "==> Running the tests and the slow proofs"
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: $(READY)
	@echo "==> Killing, resizing and splitting runs (about a quarter of an hour)"
	$(BIN)/python tests/system/reliability

rehearsal: $(READY)
	@echo "==> Training on several hosts, with faults (about a quarter of an hour)"
	$(BIN)/python tests/system/rehearsal.py

fuzz: $(READY)
	@echo "==> Giving every verb every kind of bad input (about a quarter of an hour)"
	$(BIN)/python tests/system/fuzz

check: $(READY)
	@echo "==> Checking lint, format, types and the direction of imports"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)
	rm -rf build  # setuptools would pack what an earlier build left there
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv .venv-docs .cache site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(READY): requirements.txt pyproject.toml
	@echo "==> Setting up .venv with the versions of requirements.txt (a minute or two, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

$(DOCS_READY): requirements-docs.txt
	@echo "==> Setting up .venv-docs with the versions of requirements-docs.txt"
	$(PYTHON) -m venv .venv-docs
	$(DOCS_BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $(DOCS_READY)
