# Each target makes the virtual environment that it needs; PYTHON=python3.12 make ... chooses another interpreter.
.PHONY: demo test check bench architectures docs test-matrix test-adapterhub format clean

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export NO_MKDOCS_2_WARNING := 1

demo: $(VENV)/.demo
	$(BIN)/python -m grafts.demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_imports.py
	$(BIN)/python scripts/changelog_version.py
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

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
	scripts/venv.sh .venv-hub dev transformers==4.57.6 datasets accelerate
	.venv-hub/bin/python -m pip install --quiet --disable-pip-version-check adapters==1.3.0
	$(BIN)/python -m pytest tests/checkpoints/test_adapterhub_files.py

# The suite on the oldest and the newest supported transformers, and without peft, each in its own environment.
test-matrix:
	scripts/venv.sh .venv-4.57 dev transformers==4.57.6 datasets accelerate
	.venv-4.57/bin/python -m pytest -n $(WORKERS)
	scripts/venv.sh .venv-newest dev transformers
	.venv-newest/bin/python -m pytest -n $(WORKERS)
	scripts/venv.sh .venv-no-peft dev
	.venv-no-peft/bin/python -m pip uninstall --quiet --yes peft
	.venv-no-peft/bin/python -m pytest -n $(WORKERS)

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: FORCE
	@scripts/venv.sh $(VENV) $*
FORCE:

clean:
	rm -rf .venv .venv-4.57 .venv-newest .venv-no-peft build demo-output
