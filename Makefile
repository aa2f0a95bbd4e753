# kat-ray: `make train` and `make test` set everything up themselves. `make help` lists the targets.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
.DEFAULT_GOAL := help
.PHONY: help setup train bench test test-slow lint format format-check types check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make the virtual environment; nothing to do if nothing changed
	@docker/install.sh $(VENV)

train: setup ## train the embedded demo: make train ARGS="termination.rule=none"
	@$(BIN)/kat-ray train demo $(ARGS)

bench: setup ## run the benchmark, its peer included (an hour): make bench ARGS="--only sampler teacher"
	@$(BIN)/kat-ray bench $(ARGS)

test: setup ## run the tests
	@$(BIN)/python -m pytest $(ARGS)

test-slow: setup ## run the slow tests only
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup ## ruff
	@$(BIN)/ruff check .

format: setup ## format all files
	@$(BIN)/ruff format .

format-check: setup ## check the format
	@$(BIN)/ruff format --check .

types: setup ## mypy
	@$(BIN)/mypy

check: lint format-check types test ## what CI checks, without the slow tests

clean: ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
