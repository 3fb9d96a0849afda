# Two commands do all their own set-up in .venv: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu lint bench bench-gpu tiny-data tiny clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; use Python 3.10 or newer: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: Python's venv module does not work; on Debian and Ubuntu: apt install python3-venv"; exit 2; }

# Installed sets are remembered by stamps, so that a second run starts at once.
$(VENV)/.cpu: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing the runtime into $(VENV)"
	@$(PIP) --editable '.[cpu,generate]'
	@touch $@

$(VENV)/.export: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing the runtime and the exporter into $(VENV) (PyTorch included: some minutes)"
	@$(PIP) --editable '.[cpu,export]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.export
	@$(PIP) --editable '.[cpu,hub,generate,export,dev]'
	@touch $@

$(VENV)/.train: pyproject.toml constraints.txt $(VENV)/.export
	@$(PIP) --editable '.[cpu,generate,export,train]'
	@touch $@

# onnxruntime and onnxruntime-gpu are the same module, so this environment has the latter only.
.venv-gpu/.ready: pyproject.toml
	@$(PYTHON) -m venv .venv-gpu
	@.venv-gpu/bin/python -m pip install --quiet --editable '.[generate,export,dev,tensorrt,tensorrt-rtx]'
	@.venv-gpu/bin/python -m pip uninstall --quiet --yes onnxruntime
	@.venv-gpu/bin/python -m pip install --quiet --force-reinstall --no-deps onnxruntime-gpu
	@touch $@

install: $(VENV)/.dev ## everything for working on the project, into .venv

demo: $(VENV)/.cpu ## a photo to codes and back, and four pictures from text, with the bundled model
	@$(BIN)/python examples/demo.py

test: $(VENV)/.dev ## the everyday tests, minutes
	@$(BIN)/python -m pytest -m 'not slow and not gpu' -n 2 --dist loadfile

test-slow: $(VENV)/.dev ## full-size models: gigabytes of memory and disk, tens of minutes
	@$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-gpu: .venv-gpu/.ready ## what only a GPU shows, with TensorRT and onnxruntime-gpu, in an environment of its own
	@# Two runs: both TensorRTs name the same classes, so that one process may not hold both.
	@.venv-gpu/bin/python -m pytest -m gpu -k 'not tensorrt-rtx'
	@.venv-gpu/bin/python -m pytest -m gpu -k tensorrt-rtx

lint: $(VENV)/.dev ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.dev ## the runtime against PyTorch on this machine; writes benchmarks/results/
	@$(BIN)/python benchmarks/tokenizer_vs_eager.py
	@$(BIN)/python benchmarks/generator_vs_eager.py
	@$(BIN)/python benchmarks/understander_vs_transformers.py

bench-gpu: .venv-gpu/.ready ## the GPU here, with TensorRT and onnxruntime, against PyTorch; writes benchmarks/results/
	@.venv-gpu/bin/python benchmarks/on_gpu.py
	@.venv-gpu/bin/python benchmarks/on_gpu.py --variant siglip_384 --graphs encode --parts tokenizer

tiny-data: $(VENV)/.train ## gather the bundled model's training data (npm and apt-get needed)
	@$(BIN)/python -m recipes.tiny.gather --out data/tiny

tiny: $(VENV)/.train ## train the bundled model (hours on a CPU; resumes) and write engines/tiny
	@$(BIN)/python -m recipes.tiny.train_tokenizer --data data/tiny --out data/tiny/tokenizer
	@$(BIN)/python -m recipes.tiny.train_generator --data data/tiny --tokenizer data/tiny/tokenizer --out data/tiny/generator
	@$(BIN)/python -m recipes.tiny.export --tokenizer data/tiny/tokenizer --generator data/tiny/generator --out engines/tiny
	@$(BIN)/python -m recipes.tiny.report --data data/tiny --out engines/tiny

clean: ## remove .venv, caches and what the demo made
	rm -rf $(VENV) .venv-gpu bundles checkpoints demo_out .mypy_cache .ruff_cache .pytest_cache .hypothesis
