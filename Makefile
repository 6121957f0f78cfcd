# Everything here makes its own virtual environment first; PYTHON is the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out

# Installed once, and again when what is declared changes.
INSTALLED := $(VENV)/.installed

.PHONY: help venv demo test support test-huge test-soak test-gpu sanitize lint golden build docs clean
.DEFAULT_GOAL := help

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

venv: $(INSTALLED)  ## Make .venv with everything, as pinned in constraints.txt.

$(INSTALLED): pyproject.toml runtime/pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quantkit needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./runtime -e '.[all,dev]'
	@touch $@

demo: $(INSTALLED)  ## Quantize the embedded FLUX, compare it with BF16, write the report.
	$(BIN)/quantkit quantize --recipe demo-flux --output $(OUT)/demo-w4a16 --overwrite
	$(BIN)/quantkit compare --task t2i --reference demo --candidate $(OUT)/demo-w4a16 --recipe demo-flux \
	  --output $(OUT)/demo-report --overwrite

test: $(INSTALLED)  ## Run all tests that need no accelerator.
	# One thread each: threads of two processes on the same cores wait for each other in OpenMP's barriers.
	# A file stays with one worker, so that what its tests share, such as ranks that run jobs, is made once. Files in
	# their own order: unit tests come last and fill up; by the number of tests, long files of few would be last.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu and not network and not huge' -n auto --dist loadfile \
	  --no-loadscope-reorder --support-matrix check --ignore tests/interpreted $(PYTEST_ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/interpreted -n auto

support: $(INSTALLED)  ## Run all tests and write docs/support.md from those that pass.
	$(MAKE) test PYTEST_ARGS='--support-matrix write $(PYTEST_ARGS)'

test-huge: $(INSTALLED)  ## Round a model of 12 GB: 35 GB of disk, some minutes.
	$(BIN)/python -m pytest -m huge $(PYTEST_ARGS)

test-soak: $(INSTALLED)  ## Serve a thousand mixed requests while engines are killed: some fifteen minutes.
	@mkdir -p $(OUT)
	QUANTKIT_SOAK_REQUESTS=1000 QUANTKIT_SOAK_REPORT=$(OUT)/soak.txt OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest tests/integration/test_soak.py $(PYTEST_ARGS)
	@cat $(OUT)/soak.txt

test-gpu: $(INSTALLED)  ## Run the tests that need an accelerator.
	$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

sanitize: $(INSTALLED)  ## Look for accesses out of bounds in the kernels, with NVIDIA's compute-sanitizer: slow.
	# Without torch's cache every tensor is an allocation of its own, so that none hides what misses its neighbour.
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
	  $(BIN)/python -m pytest -m gpu tests/gpu/test_triton_gpu.py -k 'number_of_rows or experts_give or fp8_compute' \
	  $(PYTEST_ARGS)

lint: $(INSTALLED)  ## ruff, mypy --strict, import-linter.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

golden: $(INSTALLED)  ## Write the golden files anew; look at the diff before committing it.
	QUANTKIT_UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

build: $(INSTALLED)  ## Build both wheels into dist/.
	$(BIN)/python -m build --no-isolation --wheel --outdir dist runtime
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .

docs: $(INSTALLED)  ## Build the documentation into site/.
	$(BIN)/mkdocs build --strict

clean:  ## Remove what the targets above made, but the environment.
	rm -rf dist site $(OUT) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
