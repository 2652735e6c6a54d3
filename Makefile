# Every target but `gpu` works on a fresh machine with python3 (3.11+) and cargo: it sets up .venv first.
# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
RUST := $(shell find rust -name '*.rs' -o -name 'Cargo.toml') Cargo.toml Cargo.lock
WORKERS ?= 2
MODEL ?=
ENCDEC ?=
NEWER_PYTHON := install Python 3.11 or newer, or run make PYTHON=/path/to/python
REQUIREMENTS := 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")'
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help demo test test-long lint format bench gpu wheel clean
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: $(NEWER_PYTHON)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11: $(NEWER_PYTHON)"; exit 1; }
	@command -v cargo >/dev/null \
		|| { echo "cargo is missing: install Rust 1.89 or newer, from your system's packages or with rustup"; exit 1; }
	@mkdir -p $(VENV)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@echo "Installing dependencies into $(VENV): a few minutes the first time (torch for Linux is 5.6 GB)."
	@$(PY) -c $(REQUIREMENTS) >$(VENV)/requirements.txt
	@$(PY) -m pip install --disable-pip-version-check --progress-bar off \
		-c constraints.txt -r $(VENV)/requirements.txt >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@touch $@

$(VENV)/.built: $(VENV)/.ready $(RUST)
	@echo "Building the Rust extension: about a minute the first time."
	@source $(VENV)/bin/activate && maturin develop --release >$(VENV)/build.log 2>&1 \
		|| { cat $(VENV)/build.log; exit 1; }
	@touch $@

demo: $(VENV)/.built ## train prefixes at once, generate one mixed batch (MODEL=folder or hub id, ENCDEC=1 for a BART)
	@$(PY) -m prefixfast.demo $(if $(MODEL),--model $(MODEL)) $(if $(ENCDEC),--seq2seq)

test: lint ## lint, then the fast tests
	cargo test -q --workspace
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --deselect tests/rust/test_stubs.py # lint has run it

test-long: $(VENV)/.built ## the tests that take minutes each (real weights)
	$(PY) -m pytest -m long

lint: $(VENV)/.built ## ruff, mypy, stubtest, import-linter, tables of the docs, rustfmt, clippy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	cd python && ../$(VENV)/bin/lint-imports --config ../pyproject.toml --no-cache
	$(PY) docs/tables.py --check
	$(PY) -m pytest -q tests/rust/test_stubs.py
	cargo fmt --all --check
	cargo clippy -q --workspace --all-targets -- -D warnings

format: $(VENV)/.ready ## rewrite the sources in the house style
	$(PY) -m ruff check --fix . || true
	$(PY) -m ruff format .
	cargo fmt --all

bench: $(VENV)/.built ## throughput versus prefix length, against PEFT
	@$(PY) -m prefixfast bench generate

OUT ?= bench-gpu
GPU_PACKAGES := torch triton transformers pytest tqdm
GPU_TESTS := PYTHONPATH=python:tests $(PYTHON) -m pytest -c /dev/null --rootdir=. --import-mode=importlib -q
GPU_BENCH := PYTHONPATH=python $(PYTHON) -c 'import sys; from importlib import import_module; \
	from pathlib import Path; \
	import_module(f"prefixfast.bench.{sys.argv[1]}").run(Path("$(OUT)"), dtype="auto", rounds=7)'
gpu: ## on a machine with a CUDA GPU and its own python3: device tests, kernel timings into OUT (installs nothing)
	@$(PYTHON) -c 'import importlib.util as u, sys; missing = [m for m in sys.argv[1:] if not u.find_spec(m)]; \
		sys.exit("missing: " + ", ".join(missing) if missing else 0)' $(GPU_PACKAGES)
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device")'
	$(GPU_TESTS) tests/gpu/test_kernels.py
	$(GPU_BENCH) kernels
	$(GPU_BENCH) decode
	@PYTHONPATH=python $(PYTHON) -c 'from prefixfast import _rust' || { echo "the Rust extension is missing \
	(python/prefixfast/_rust.abi3.so), so the tests of the engine on the device do not run"; exit 1; }
	$(GPU_TESTS) tests/gpu/test_device.py

wheel: $(VENV)/.ready ## build dist/*.whl (abi3, Python 3.11+)
	source $(VENV)/bin/activate && maturin build --release -q -o dist

clean: ## remove what was built (not .venv)
	rm -rf target dist $(VENV)/.built python/prefixfast/*.so
