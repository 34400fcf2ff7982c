# Requires Python 3.10 to 3.13 (with venv) and make; targets install everything else.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
BENCH := $(VENV)/.bench
UV := $(VENV)/.tools/bin/uv
UV_VERSION := 0.13.9
# uv caches wheels in the home directory, so that a second checkout is set up in seconds.
export UV_LINK_MODE ?= hardlink
NEEDS_PYTHON = test -n "$(PYTHON)" || { echo "Python 3.10 to 3.13 with the venv module is needed (Debian: apt-get install python3-venv)"; exit 1; }
SOURCES := job tests helm docker docs

##@ Use
.PHONY: help
help: ## Show the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.ready ## Create .venv with the locked dependencies and the program

.PHONY: demo
demo: $(VENV)/.ready ## Classify real photos, some broken on purpose, with a real network on the CPU
	$(BIN)/batch-inference demo

.PHONY: image
image: $(VENV)/.ready ## Build the container image and print its name
	$(BIN)/python -m tests.e2e.image

.PHONY: kind
kind: $(VENV)/.ready ## Create a kind cluster with KubeRay, the image, and a store with photos; prints the next steps
	$(BIN)/python -m tests.e2e.world demo

.PHONY: kind-down
kind-down: $(VENV)/.ready ## Delete the cluster of `make kind`
	$(BIN)/python -m tests.e2e.cluster down demo

##@ Test
# One process per core, with one thread each: more threads only wait for each other. Whole jobs are few and long: a process that
# has nothing left takes tests of the other, whatever their file.
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile
# `make test` reads these for its table. TESTS is the part of a tier to run, as files or folders.
RESULTS = --junitxml=build/tiers/$(1).xml
.PHONY: test
test: ## Run lint and all tests, the fast ones first, and print a table; CHANGED=1 runs what a change can affect
	@$(NEEDS_PYTHON)
	@$(PYTHON) -m tests.tiers $(if $(CHANGED),--changed)

.PHONY: lint
lint: $(VENV)/.ready ## Run ruff, mypy --strict, the contracts of imports, and codespell
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell $(SOURCES) k8s .ci .github Makefile pyproject.toml *.md

.PHONY: test-unit
test-unit: $(VENV)/.ready ## Run the unit tests and those of the documents
	$(PARALLEL) $(call RESULTS,unit) $(or $(TESTS),tests/unit tests/docs)

.PHONY: test-charts
test-charts: $(VENV)/.ready ## Test the charts: rendering, refusals, and the operator's own validation
	$(PARALLEL) $(call RESULTS,charts) $(or $(TESTS),tests/charts)

.PHONY: test-job
test-job: $(VENV)/.ready ## Run whole jobs on this machine: storage servers, kills, races, 100,000 images
	$(PARALLEL) --dist worksteal $(call RESULTS,job) $(or $(TESTS),tests/job)

.PHONY: test-report
test-report: $(VENV)/.ready ## Test the report in headless Chromium, with screenshots in build/report
	$(BIN)/pytest $(call RESULTS,report) $(or $(TESTS),tests/report)

.PHONY: test-e2e
test-e2e: $(VENV)/.ready ## Test the charts on a kind cluster with KubeRay; the first run builds the cluster's images
	$(BIN)/python -m tests.e2e
	$(BIN)/pytest --numprocesses auto --maxschedchunk 1 $(call RESULTS,e2e) $(or $(TESTS),tests/e2e)

.PHONY: test-faults
test-faults: $(VENV)/.ready ## Inject 500 faults into whole jobs and print a table of the results: 15 minutes, not part of `test`
	$(BIN)/pytest -s tests/faults

.PHONY: test-platform
test-platform: $(VENV)/.ready ## Test the charts with Argo CD, Kueue and Prometheus on kind clusters: 20 minutes, not part of `test`; the first run builds them
	$(BIN)/python -m tests.e2e
	$(BIN)/python -m tests.platform.components
	$(BIN)/pytest -s tests/platform

.PHONY: fuzz
fuzz: $(VENV)/.ready ## Try damaged images, manifests, archives, configurations and URIs for FUZZ_S seconds (60); exits 1 if anything is found
	$(BIN)/python -m tests.fuzz --seconds $(or $(FUZZ_S),60) $(FUZZ_ARGS)

.PHONY: mutants
mutants: $(VENV)/.ready ## Change the modules that carry the promise, one thing at a time; exits 1 if tests do not notice; hours, not part of `test`; MUTANTS_ARGS='--minutes 30' for a sample
	$(BIN)/python -m tests.mutants $(MUTANTS_ARGS)

##@ Measure
.PHONY: bench
bench: $(BENCH)/.ready ## Measure speed against other tools and against the theoretical limit; BENCH_ARGS=--quick for a short run
	$(BENCH)/bin/python -m tests.bench $(BENCH_ARGS)

.PHONY: bench-scale
bench-scale: $(VENV)/.ready ## Measure the driver alone: rows/s, and time and memory for 10^4 to 10^7 inputs; MOST=100000 for a short run
	$(BIN)/python -m tests.bench.scale --most $(or $(MOST),10000000)

##@ Maintain
.PHONY: format
format: $(VENV)/.ready ## Format the code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: lock
lock: $(UV) ## Update the lock files from pyproject.toml; LOCK_UPGRADE=--upgrade also takes the newest versions
	$(UV) pip compile pyproject.toml --extra timm --extra demo $(LOCK_OPTIONS) -o requirements.lock
	$(UV) pip compile pyproject.toml --extra timm --extra demo --group dev -c requirements.lock $(LOCK_OPTIONS) -o requirements-dev.lock
	grep -vE '^ |^(pyarrow|tqdm)==' requirements-dev.lock | sed 's/ *\\$$//' > $(BENCH_CONSTRAINTS)
	$(UV) pip compile tests/bench/requirements.in -c $(BENCH_CONSTRAINTS) $(LOCK_OPTIONS) \
		$(addprefix --no-emit-package ,fsspec numpy packaging pillow python-dateutil six typing-extensions tzdata) -o tests/bench/requirements.lock
BENCH_CONSTRAINTS := $(VENV)/.bench-constraints.txt
LOCK_OPTIONS := --universal --python-version 3.10 --generate-hashes --no-header --no-emit-index-url --no-annotate --quiet $(LOCK_UPGRADE)

.PHONY: audit
audit: $(VENV)/.ready ## Check the locked packages for vulnerabilities known to PyPI; fails if there is one, or if a package is unknown
	$(UV) tool run --quiet --from pip-audit==2.10.1 pip-audit --strict --disable-pip --require-hashes $(addprefix -r ,requirements.lock docker/tools.lock)

.PHONY: picture
picture: $(VENV)/.ready ## Take the README's screenshot of the demo's report
	$(BIN)/python -m tests.report.picture job/report.png

.PHONY: clean
clean: ## Remove everything that the targets have created in this folder
	rm -rf $(VENV) demo-output build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(UV):
	@$(NEEDS_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) -m venv $(VENV)/.tools
	$(VENV)/.tools/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.ready: $(UV) requirements-dev.lock pyproject.toml
	VIRTUAL_ENV=$(VENV) $(UV) pip sync --quiet --require-hashes requirements-dev.lock
	VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

# Packages of the benchmark, in a venv that falls back on .venv for all others: Daft needs older versions of two packages.
$(BENCH)/.ready: $(VENV)/.ready tests/bench/requirements.lock
	$(BIN)/python -m venv --without-pip $(BENCH)
	VIRTUAL_ENV=$(BENCH) $(UV) pip sync --quiet --require-hashes tests/bench/requirements.lock
	site() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; site $(BIN)/.. > "$$(site $(BENCH))/below.pth"
	@touch $@
