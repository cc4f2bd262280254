# `make` alone lists the targets. Each one makes its own surroundings first: .venv, as constraints.txt says.

PYTHON ?= python3
TIER = quick
RESULTS = reproduced
DEVICE = auto
TEMPLATE =
FRESH =
ALL =
WORKERS =
SLOW =

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# uv installs in a quarter of pip's time. It does not read pip.conf: where it finds no index, pip does.
PINNED := $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt

.PHONY: help reproduce test lab export readme docs bench clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

reproduce: .venv/installed  ## Run the evidence notebooks: TIER=quick RESULTS=reproduced DEVICE=auto TEMPLATE= ALL= FRESH= WORKERS=
	$(BIN)/attnnas reproduce --tier $(TIER) --results "$(RESULTS)" --device $(DEVICE) \
	$(if $(TEMPLATE),--template "$(TEMPLATE)") $(if $(FRESH),--fresh) $(if $(WORKERS),--workers $(WORKERS)) $(if $(ALL),--all)

test: .venv/installed  ## Run all tests, the library notebooks among them (SLOW=1: those too that install packages)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 12 $(if $(SLOW),--slow) tests

lab: .venv/installed  ## Open the quickstart in JupyterLab, beside all notebooks
	$(BIN)/jupyter lab --config docs/lab.py $(if $(filter 0,$(shell id -u)),--allow-root) nbs/howto/00_quickstart.ipynb

export: .venv/installed  ## Write attnnas/ from the notebooks and clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: .venv/installed  ## Write README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

docs: .venv/installed-docs  ## Build the documentation site into _docs/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "Open _docs/index.html; with search: $(BIN)/python -m http.server -d _docs"

bench: .venv/installed  ## Measure against peers: the scripts in benchmarks/, but for those that take hours
	@for script in $(filter-out benchmarks/tabular.py benchmarks/planted.py benchmarks/ladder.py benchmarks/dilution.py benchmarks/starts.py benchmarks/afforded.py,$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

clean:  ## Remove what builds and tests leave behind; .venv and results stay
	rm -rf build dist _docs .pytest_cache *.egg-info
	find . '(' -name .venv -o -name .git ')' -prune -o \
	  '(' -name __pycache__ -o -name .ipynb_checkpoints ')' -prune -exec rm -rf {} +

# An install that was broken off leaves .venv/unfinished behind and starts again from nothing.
.venv/installed: settings.ini constraints.txt setup.py pyproject.toml
	@minimum=$$(sed -n 's/^min_python *= *//p' settings.ini); \
	"$(PYTHON)" -c "import sys; sys.exit(sys.version_info[:2] < ($${minimum%.*}, $${minimum#*.}))" || { \
	  echo "attnnas needs Python $$minimum or newer, but $(PYTHON) is '$$("$(PYTHON)" --version 2>&1)'."; \
	  echo "Name another one: make PYTHON=/path/to/python$$minimum ..."; exit 1; }
	@if [ -e .venv/unfinished ]; then rm -rf .venv; fi
	@if [ ! -e $@ ]; then \
	  echo "Installing into .venv: about a minute and 5.5 GB, once."; \
	  "$(PYTHON)" -m venv .venv && touch .venv/unfinished; fi
	@$(PIP) setuptools wheel uv
	@for install in "$(PINNED)" "$(PIP)"; do \
	  $$install --no-build-isolation -e ".[notebooks,models,search,video,distributed,export,watch,hub,dev]" && break; done
	@rm -f .venv/unfinished && touch $@

.venv/installed-docs: .venv/installed
	@echo "Installing what the site needs."
	@for install in "$(PINNED)" "$(PIP)"; do $$install --no-build-isolation -e ".[docs]" && break; done
	@touch $@
