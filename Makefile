# make train    a GPT of your own from nothing, in a few minutes
# make test     the tests                    make test-all   and the slow proofs
# make soak     kill -9 at random moments, other numbers of processes, other splits: the tables of docs/reliability.md
# make check    lint, format, types          make format     mend what can be mended
# Each sets up .venv first when it is missing or older than requirements.txt.

PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
READY := .venv/ready
# The launch profile of this machine: a GPU where one answers, else the CPU (and MPS, which needs no profile of its own).
PROFILE = $(shell $(BIN)/python -c "import torch; print('cpu' if not torch.accelerator.is_available() else 'single_gpu')")

.PHONY: train test test-all soak check format clean

train: $(READY)
	@echo "==> Training configs/quickstart.yaml with accelerate_configs/$(PROFILE).yaml"
	$(BIN)/accelerate launch --config_file accelerate_configs/$(PROFILE).yaml train_accelerate.py configs/quickstart.yaml --overwrite_output_dir

test: $(READY)
	@echo "==> Running the tests on two processes"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(READY)
	@echo "==> Running the tests and the slow proofs"
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: $(READY)
	@echo "==> Killing, resizing and splitting runs (about a quarter of an hour)"
	$(BIN)/python tests/system/reliability.py

check: $(READY)
	@echo "==> Checking lint, format and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(READY): requirements.txt pyproject.toml
	@echo "==> Setting up .venv with the versions of requirements.txt (a minute or two, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)
