# kat-ray: `make train` and `make test` set everything up themselves. `make help` lists the targets.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
SITE_VENV ?= .venv-docs
ARGS ?=
WORKERS ?= 2
LANES ?= 2
SBOM := $(BIN)/cyclonedx-py requirements --output-reproducible --output-format JSON
.DEFAULT_GOAL := help
.PHONY: help setup train bench gpu-check test test-integration test-nightly test-trackers test-buckets docs site audit lint format format-check types check sbom clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## make the virtual environment; nothing to do if nothing changed
	@docker/install.sh $(VENV)

train: setup ## train the embedded demo: make train ARGS="termination.rule=none"
	@$(BIN)/kat-ray train demo $(ARGS)

bench: setup ## run the benchmark, its peer included (an hour): make bench ARGS="--only sampler teacher"
	@$(BIN)/kat-ray bench $(ARGS)

gpu-check: setup ## check what is computed on a GPU (8 minutes at most); without one, tiny sizes on the CPU
	@$(BIN)/python -m actors.acceptance $(ARGS)

test: setup ## run the tests: no cluster, 3 minutes on 2 idle cores
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-integration: setup ## run those on a real Ray and with real engines (10 to 20 minutes)
	@$(BIN)/python -m pytest -n $(LANES) --dist loadgroup -m "integration and not nightly" $(ARGS)

test-nightly: setup ## run the long ones: many kills, two thousand steps, matrices, Redis (an hour)
	@$(BIN)/python -m pytest -n $(LANES) --dist loadgroup -m nightly $(ARGS)

test-trackers: setup ## test the trackers with their real packages, which go into an environment of their own (a few minutes)
	@docker/install.sh --trackers $(VENV)
	@KAT_RAY_REQUIRE_TRACKERS=1 $(VENV)-trackers/bin/python -m pytest -m nightly tests/unit/kat_ray/tracking tests/cluster/test_tracking.py $(ARGS)

test-buckets: setup ## test runs in a bucket with a real S3 server, which goes into an environment of its own (some minutes)
	@docker/install.sh --buckets $(VENV)
	@KAT_RAY_REQUIRE_BUCKETS=1 $(VENV)-buckets/bin/python -m pytest -m nightly tests/cluster/test_buckets.py $(ARGS)

docs: setup ## write anew what is generated: configuration.md, the table of models.md, the dashboard; then the site
	@$(BIN)/kat-ray config --docs >docs/configuration.md.new && mv docs/configuration.md.new docs/configuration.md
	@$(BIN)/python -m tests.support.verdicts
	@$(BIN)/python deploy/monitoring/make_dashboard.py
	@$(MAKE) --no-print-directory site

site: setup ## build the documentation's site, strictly, its links checked: build/site/README.html
	@[ -x $(SITE_VENV)/bin/python ] || python3 -m venv $(SITE_VENV)
	@$(SITE_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r docker/requirements-docs.lock
	@$(BIN)/python docs/site/build.py build/site --sphinx $(SITE_VENV)/bin/python

audit: ## known holes in the locked packages; says so where no advisory service answers
	@python3 .ci/audit.py

lint: setup ## ruff and its security rules
	@$(BIN)/ruff check .

format: setup ## format all files
	@$(BIN)/ruff format .

format-check: setup ## check the format
	@$(BIN)/ruff format --check .

types: setup ## mypy
	@$(BIN)/mypy

check: lint format-check types test ## what CI checks, without the integration tests

sbom: setup ## list what the images hold, as CycloneDX: build/sbom-cpu.json, build/sbom-gpu.json
	@mkdir -p build
	@docker/install.sh --list | $(SBOM) --output-file build/sbom-cpu.json -
	@docker/install.sh --list --gpu | $(SBOM) --output-file build/sbom-gpu.json -

clean: ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) $(SITE_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .venv-audit build *.egg-info
