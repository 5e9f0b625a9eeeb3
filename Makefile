# Each target makes the virtual environment that it needs; PYTHON=python3.12 make ... chooses another interpreter.
.PHONY: demo test check coverage bench architectures docs format clean \
	test-newest test-newest-short test-matrix test-alignment test-processors test-adapterhub

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export NO_MKDOCS_2_WARNING := 1

demo: $(VENV)/.demo
	$(BIN)/python examples/demo/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_imports.py
	$(BIN)/python scripts/public_types.py
	$(BIN)/python scripts/changelog_version.py
	$(BIN)/python scripts/tested_versions.py check
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

# Lines and branches of the package that the suite runs, with the emptiest files.
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=json:build/coverage.json --cov-report=
	$(BIN)/python scripts/emptiest_files.py build/coverage.json

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --site-dir build/site
	@echo "open build/site/index.html"

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.speed

architectures: $(VENV)/.dev
	$(BIN)/python -m benchmarks.architectures

# AdapterHub's library needs an older transformers, and so an environment of its own.
test-adapterhub: $(VENV)/.dev
	scripts/venv.sh .venv-hub dev constraints.txt transformers==4.57.6 datasets accelerate
	.venv-hub/bin/python -m pip install --quiet --disable-pip-version-check adapters==1.3.0
	$(BIN)/python -m pytest tests/checkpoints/test_adapterhub_files.py

# The suite with the newest versions of everything, as a fresh install gives them; warnings of deprecation are printed.
test-newest:
	$(PYTHON) scripts/tested_versions.py run newest

# The same for the truths and generation only: what the gate shows, and does not fail by.
test-newest-short:
	$(PYTHON) scripts/tested_versions.py run newest --short

# The suite at both ends of what is declared as supported, each in its own environment; writes the table of tested versions.
test-matrix:
	$(PYTHON) scripts/tested_versions.py run all

# The suite with every tensor of the models at an odd address.
test-alignment: $(VENV)/.dev
	GRAFTS_TEST_ALIGNMENT=odd $(BIN)/python -m pytest -n $(WORKERS)

# The suite as other processors and machines run it: without their widest registers, with two threads, in another order.
test-processors: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest -n $(WORKERS)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -n $(WORKERS)
	GRAFTS_TEST_THREADS=2 $(BIN)/python -m pytest -n 1 --random-order

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: FORCE
	@scripts/venv.sh $(VENV) $*
FORCE:

clean:
	rm -rf .venv .venv-* build demo-output
