# Everything runs in .venv, made from requirements.lock; `make` alone says what there is.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
READY := $(VENV)/.installed
PEERS ?= ../shared/peers
QUESTION ?= How did Apple and Microsoft compare between 2005 and 2009?

.DEFAULT_GOAL := help
.PHONY: help install up down demo test check format bench bench-peers chaos thorough lock clean

help: ## Say what there is.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; name another: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==0.13.8
	$(UV) pip install -q --python $(BIN)/python --no-deps --require-hashes -r requirements.lock
	$(UV) pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

install: $(READY) ## Make .venv with all that is locked.

up: $(READY) ## Start Kafka, the model, the processors and the API here.
	$(BIN)/foldflow up --detach

down: $(READY) ## Stop what `up` started; data is kept.
	$(BIN)/foldflow down

demo: up ## Ask one question of real share prices, from request to released report: make demo QUESTION="…" [YES=1]
	@# At a terminal you are asked to release the report; elsewhere there is nobody to ask.
	$(BIN)/foldflow run market-analysis --wait $$([ -t 0 ] && [ -z "$(YES)" ] || echo --yes) -p "question=$$QUESTION"

test: $(READY) ## Run all tests; Kafka and the model start by themselves.
	$(BIN)/python -m pytest -n 4 --dist loadfile

check: $(READY) ## Lint, format, types, import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format the code and mend what can be mended.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Measure throughput, latency, memory, CPU … of the whole thing: make bench [BENCH="--only latency"]
	$(BIN)/python tests/bench/bench.py $(BENCH)

bench-peers: $(READY) ## Measure other workflow systems beside it, by the kit in PEERS: make bench-peers [BENCH="--rounds 1"]
	$(BIN)/python tests/bench/peers.py --kit "$(PEERS)" $(BENCH)

chaos: $(READY) ## Kill every kind of process for 10 minutes under load, and check that nothing is lost.
	$(BIN)/python tests/chaos/chaos.py $(CHAOS)

thorough: $(READY) ## Run the tests that take minutes: zombies, upgrades, three brokers, pressure.
	$(BIN)/python -m pytest -m thorough

lock: ## Resolve the dependencies anew into requirements.lock.
	$(UV) pip compile -q --only-binary :all: --overrides infra/lock-overrides.txt --generate-hashes --python-version 3.11 \
		--extra embedded --extra dev --extra registry --no-annotate --custom-compile-command 'make lock' pyproject.toml -o requirements.lock

clean: ## Remove .venv and caches (data in .foldflow stays).
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

export QUESTION
