# Targets set up what they need; nothing has to be installed first but Python 3.10 to 3.13 with venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
BENCH := $(VENV)/.bench
UV := $(VENV)/.tools/bin/uv
UV_VERSION := 0.13.9
# Wheels are kept in uv's cache in the home directory, so that a second checkout is set up in seconds.
export UV_LINK_MODE ?= hardlink
SOURCES := job tests helm docker docs

##@ Use
.PHONY: help
help: ## Show the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.ready ## Make .venv with the locked dependencies and the program in it

.PHONY: demo
demo: $(VENV)/.ready ## Classify real photos, some broken on purpose, with a real network on the CPU
	$(BIN)/batch-inference demo

.PHONY: image
image: $(VENV)/.ready ## Build the container image and print its name
	$(BIN)/python -m tests.e2e.image

.PHONY: kind
kind: $(VENV)/.ready ## Make a kind cluster with KubeRay, the image, and a store with photos; prints what to do next
	$(BIN)/python -m tests.e2e.world demo

.PHONY: kind-down
kind-down: $(VENV)/.ready ## Remove that cluster
	$(BIN)/python -m tests.e2e.cluster down demo

##@ Test
# As many at once as there are cores, with one thread each: more of them only wait for each other.
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile
.PHONY: test
test: lint test-unit test-charts test-report test-job test-e2e ## All tests, the fast ones first

.PHONY: lint
lint: $(VENV)/.ready ## ruff, mypy --strict and codespell
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/codespell $(SOURCES) k8s .ci .github Makefile pyproject.toml *.md

.PHONY: test-unit
test-unit: $(VENV)/.ready ## Tests that need no cluster, and the documents: a minute or two
	$(PARALLEL) tests/unit tests/docs

.PHONY: test-charts
test-charts: $(VENV)/.ready ## The charts: rendered, refused, and accepted by the operator's own validation
	$(PARALLEL) tests/charts

.PHONY: test-job
test-job: $(VENV)/.ready ## Whole jobs on this machine: storage servers, kills, races, 100,000 images
	$(PARALLEL) tests/job

.PHONY: test-report
test-report: $(VENV)/.ready ## The report in headless Chromium, with screenshots in build/report; two minutes
	$(BIN)/pytest tests/report

.PHONY: test-e2e
test-e2e: $(VENV)/.ready ## The charts on a real kind cluster with KubeRay; a first run builds what no registry gives
	$(BIN)/python -m tests.e2e.cluster build
	$(BIN)/python -m tests.e2e.image
	$(BIN)/pytest tests/e2e

.PHONY: test-faults
test-faults: $(VENV)/.ready ## 500 faults injected into whole jobs, with a table of what held: a quarter of an hour, not part of `test`
	$(BIN)/pytest -s tests/faults

.PHONY: test-platform
test-platform: $(VENV)/.ready ## The charts under real Argo CD, Kueue and Prometheus on kind clusters: twenty minutes, not part of `test`; a first run builds them
	$(BIN)/python -m tests.e2e.cluster build
	$(BIN)/python -m tests.platform.components
	$(BIN)/python -m tests.e2e.image
	$(BIN)/pytest -s tests/platform

.PHONY: fuzz
fuzz: $(VENV)/.ready ## Damaged images, manifests, archives, configurations and URIs for FUZZ_S seconds (60); exits 1 if anything is found
	$(BIN)/python -m tests.fuzz --seconds $(or $(FUZZ_S),60) $(FUZZ_ARGS)

##@ Measure
.PHONY: bench
bench: $(BENCH)/.ready ## Measure speed against what else does this job, and against the bound; BENCH_ARGS=--quick for a look
	$(BENCH)/bin/python -m tests.bench $(BENCH_ARGS)

.PHONY: bench-scale
bench-scale: $(VENV)/.ready ## The driver's side alone: rows/s, and time and memory for 10^4 to 10^7 inputs; MOST=100000 for a quick look
	$(BIN)/python -m tests.bench.scale --most $(or $(MOST),10000000)

##@ Maintain
.PHONY: format
format: $(VENV)/.ready ## Format the code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: lock
lock: $(UV) ## Bring the lock in line with pyproject.toml; LOCK_UPGRADE=--upgrade takes the newest versions too
	$(UV) pip compile pyproject.toml --extra timm --extra demo $(LOCK_OPTIONS) -o requirements.lock
	$(UV) pip compile pyproject.toml --extra timm --extra demo --group dev -c requirements.lock $(LOCK_OPTIONS) -o requirements-dev.lock
	grep -vE '^ |^(pyarrow|tqdm)==' requirements-dev.lock | sed 's/ *\\$$//' > $(BENCH_CONSTRAINTS)
	$(UV) pip compile tests/bench/requirements.in -c $(BENCH_CONSTRAINTS) $(LOCK_OPTIONS) \
		$(addprefix --no-emit-package ,fsspec numpy packaging pillow python-dateutil six typing-extensions tzdata) -o tests/bench/requirements.lock
BENCH_CONSTRAINTS := $(VENV)/.bench-constraints.txt
LOCK_OPTIONS := --universal --python-version 3.10 --generate-hashes --no-header --no-emit-index-url --no-annotate --quiet $(LOCK_UPGRADE)

.PHONY: audit
audit: $(VENV)/.ready ## Look up the locked packages in PyPI's list of vulnerabilities; fails where one is known, or nothing is known of a package
	$(UV) tool run --quiet --from pip-audit==2.10.1 pip-audit --strict --disable-pip --require-hashes $(addprefix -r ,requirements.lock docker/tools.lock)

.PHONY: picture
picture: $(VENV)/.ready ## Take the README's picture of a report, of the demo's job
	$(BIN)/python -m tests.report.picture job/report.png

.PHONY: clean
clean: ## Remove what the targets have made in this folder
	rm -rf $(VENV) demo-output build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(UV):
	@test -n "$(PYTHON)" || { echo "Python 3.10 to 3.13 with the venv module is needed (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) -m venv $(VENV)/.tools
	$(VENV)/.tools/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.ready: $(UV) requirements-dev.lock pyproject.toml
	VIRTUAL_ENV=$(VENV) $(UV) pip sync --quiet --require-hashes requirements-dev.lock
	VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

# What only the benchmark needs, in a venv that falls back on .venv for everything else: Daft wants older versions of two packages.
$(BENCH)/.ready: $(VENV)/.ready tests/bench/requirements.lock
	$(BIN)/python -m venv --without-pip $(BENCH)
	VIRTUAL_ENV=$(BENCH) $(UV) pip sync --quiet --require-hashes tests/bench/requirements.lock
	site() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; site $(BIN)/.. > "$$(site $(BENCH))/below.pth"
	@touch $@
