# Every target works from a fresh clone and prepares what it needs first. `make help` lists them.

PYTHON ?= python3
TORCH := torch==2.13.0
EXTRAS := dev,browser,embeddings,openai,sentiment,ray,s3
# pip's progress is for people; a log gets the errors only.
PIP_FLAGS := $(shell test -t 2 || echo -qq)
# Processes that tests run in; each needs up to 3 GB.
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

SUPPORTED := import sys; sys.exit(sys.version_info[:2] < (3, 11))
VERSION := import sys; print(sys.version.split()[0])
PREPARE := from gradsift.demo.model import demo_model; from gradsift.base.progress import Reporter; demo_model(Reporter())

.DEFAULT_GOAL := help
.PHONY: help setup model demo test test-slow test-gpu check bench bench-small faults audit sbom wheel release docs browser clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*  ## ' Makefile | sed 's/:.*  ## /\t/' | while IFS='	' read -r target what; do \
	  printf '  make %-11s %s\n' "$$target" "$$what"; done
	@echo 'Variables: PYTHON=python3.12 TORCH="torch==2.13.0 --index-url ..." EXTRAS=dev WORKERS=1 ARGS="..."'

setup: $(READY)  ## make the virtual environment .venv with the tested versions (once)

$(READY): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo 'There is no "$(PYTHON)" here. Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3.12'; \
	  exit 1; } >&2
	@"$(PYTHON)" -c '$(SUPPORTED)' || { \
	  echo "gradsift needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" -c '$(VERSION)')." \
	    "Name another one: make setup PYTHON=/path/to/python3.12"; exit 1; } >&2
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '$(PYTHON) cannot make virtual environments: its module venv or ensurepip is missing.' \
	    'On Debian or Ubuntu: apt install python3-venv'; exit 1; } >&2
	@"$(BIN)/python" -c '$(SUPPORTED)' 2>/dev/null && "$(BIN)/python" -m pip --version >/dev/null 2>&1 || { \
	  echo 'Making the virtual environment $(VENV) ...'; "$(PYTHON)" -m venv --clear "$(VENV)"; }
	@echo 'Installing $(TORCH) ... (1 to 5 minutes)'
	@"$(BIN)/python" -m pip install $(PIP_FLAGS) $(TORCH)
	@echo 'Installing gradsift and what it needs ... (1 to 5 minutes)'
	@"$(BIN)/python" -m pip install $(PIP_FLAGS) -e '.[$(EXTRAS)]' -c constraints.txt
	@touch "$(READY)"
	@echo 'Ready: . $(BIN)/activate && gradsift --help'

model: $(READY)  ## fetch and convert the demo model into the cache (once, 93 MB to fetch)
	@"$(BIN)/python" -c '$(PREPARE)'

demo: $(READY)  ## run the demo on a small model, on the CPU
	"$(BIN)/gradsift" demo $(ARGS)

# The tests start hundreds of processes, each of which would compile all that it imports.
test: model  ## run the tests that take seconds
	env -u PYTHONDONTWRITEBYTECODE "$(BIN)/python" -m pytest -m 'not slow and not gpu' -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: model  ## run the tests that take minutes
	"$(BIN)/python" -m pytest -m 'slow and not gpu' $(ARGS)

test-gpu: $(READY)  ## run the tests that need a CUDA device (TORCH must name a build with CUDA)
	"$(BIN)/python" -m pytest -m gpu $(ARGS)

check: $(READY)  ## lint, format, types and import order
	"$(BIN)/ruff" check
	"$(BIN)/ruff" format --check
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"

bench: model  ## measure the speed of the stages
	"$(BIN)/python" benchmarks/speed.py $(ARGS)

bench-small: $(READY)  ## hold estimators against retraining a tiny model, and fail where one is spoilt (5 minutes)
	"$(BIN)/python" -m pytest -q -s -m slow tests/validation/test_bench_small.py $(ARGS)

faults: $(READY)  ## kill, starve and damage runs, and see whether they end as undisturbed ones (20 minutes)
	"$(BIN)/python" benchmarks/faults.py --out runs/faults $(ARGS)

audit: $(READY)  ## compare installed versions with their pins, and look up known vulnerabilities
	"$(BIN)/python" .ci/supply.py audit $(ARGS)

sbom: $(READY)  ## write a bill of materials, build/sbom.json (CycloneDX)
	"$(BIN)/python" .ci/supply.py sbom build/sbom.json

wheel: $(READY)  ## build the wheel and use it in an environment of its own
	.ci/wheel "$(BIN)/python"

docs:  ## build the documentation as a site, build/site/index.html
	@test -x build/docs-venv/bin/mkdocs || { "$(PYTHON)" -m venv build/docs-venv && \
	  build/docs-venv/bin/python -m pip install $(PIP_FLAGS) 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=0.29,<2' -c constraints.txt; }
	build/docs-venv/bin/python docs/website.py

release: $(READY)  ## build sdist and wheel into dist/, check them, and write the notes of the changelog
	.ci/release "$(BIN)/python"

browser:  ## install Debian's chromium, for the tests of the report page (needs root)
	@command -v chromium >/dev/null || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; }

clean:  ## remove the virtual environment and what tools left behind
	rm -rf "$(VENV)" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
