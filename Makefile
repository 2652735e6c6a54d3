# Every target but `gpu` works on a fresh machine with python3 (3.11+) and cargo: it sets up .venv first. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
RUST := $(shell find rust -name '*.rs' -o -name 'Cargo.toml') Cargo.toml Cargo.lock
MODEL ?=
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help demo test test-long lint format bench gpu wheel clean
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: install Python 3.11 or newer, or say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: install a newer Python, or say make PYTHON=/path/to/python"; exit 1; }
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust (1.89 or newer), from your system's packages or with rustup"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing the dependencies into $(VENV) (PyPI's torch for Linux brings 5.6 GB; a few minutes)"
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(PY) -m pip install -q -c constraints.txt -r $(VENV)/requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.ready $(RUST)
	source $(VENV)/bin/activate && maturin develop --release -q
	touch $@

demo: $(VENV)/.built ## train three prefixes at once, generate one mixed batch (MODEL=folder or hub id for a real base)
	$(PY) -m prefixfast.demo $(if $(MODEL),--model $(MODEL))

test: lint ## lint, then the fast tests
	cargo test -q --workspace
	$(PY) -m pytest

test-long: $(VENV)/.built ## the tests that take minutes each (real weights)
	$(PY) -m pytest -m long

lint: $(VENV)/.built ## ruff, mypy, stubtest, import-linter, rustfmt, clippy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	cd python && ../$(VENV)/bin/lint-imports --config ../pyproject.toml --no-cache
	$(PY) -m pytest -q tests/rust/test_stubs.py
	cargo fmt --all --check
	cargo clippy -q --workspace --all-targets -- -D warnings

format: $(VENV)/.ready ## rewrite the sources in the house style
	$(PY) -m ruff check --fix . || true
	$(PY) -m ruff format .
	cargo fmt --all

bench: $(VENV)/.built ## throughput versus prefix length, against PEFT
	$(PY) -m prefixfast bench generate

OUT ?= bench-gpu
gpu: ## on a machine with a CUDA GPU, with its own python3: correctness on the device, then kernel timings into OUT (installs nothing)
	@$(PYTHON) -c 'import importlib.util as u, sys; missing = [m for m in ("torch", "triton", "transformers", "pytest", "tqdm") if not u.find_spec(m)]; sys.exit(f"missing: {missing}" if missing else 0)'
	$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
	PYTHONPATH=python:tests $(PYTHON) -m pytest -c /dev/null --rootdir=. --import-mode=importlib -q tests/gpu/test_kernels.py
	PYTHONPATH=python $(PYTHON) -c 'from pathlib import Path; from prefixfast.bench.kernels import run; run(Path("$(OUT)"), dtype="auto", rounds=7)'
	PYTHONPATH=python $(PYTHON) -c 'from pathlib import Path; from prefixfast.bench.decode import run; run(Path("$(OUT)"), dtype="auto", rounds=7)'
	PYTHONPATH=python $(PYTHON) -c 'from prefixfast import _rust' || { echo "the Rust extension is missing (python/prefixfast/_rust.abi3.so): the rest is not run"; exit 1; }
	PYTHONPATH=python:tests $(PYTHON) -m pytest -c /dev/null --rootdir=. --import-mode=importlib -q tests/gpu/test_device.py

wheel: $(VENV)/.ready ## build dist/*.whl (abi3, Python 3.11+)
	source $(VENV)/bin/activate && maturin build --release -q -o dist

clean: ## remove what was built (not .venv)
	rm -rf target dist $(VENV)/.built python/prefixfast/*.so
