# make demo      the whole way on simulated recordings, or DATA=<folder or s3:// URI> LABELS=<csv> [TASK=<label>]
# make test      all tests        make lint   ruff        make ui   the MLflow UI of the last demo
# Everything sets itself up: a virtual environment in .venv, made once, made again when the pins change.

PYTHON ?= python3.11
VENV := .venv
RUN := $(CURDIR)/$(VENV)/bin
DEMO ?= demo
export PATH := $(RUN):$(PATH)

.PHONY: demo test lint format ui clean

$(VENV)/.installed: pyproject.toml infra/constraints.txt
	@echo "Installing into $(VENV) (once, about two minutes) …"
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not here: install Python 3.11 or give PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --progress-bar on --editable '.[dev]' --constraint infra/constraints.txt
	@touch $@

demo: $(VENV)/.installed
	$(RUN)/python workflows/demo.py --folder $(DEMO) $(if $(DATA),--data $(DATA)) $(if $(LABELS),--labels $(LABELS)) $(if $(TASK),--task $(TASK))

test: $(VENV)/.installed
	$(RUN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

format: $(VENV)/.installed
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

ui: $(VENV)/.installed
	$(RUN)/python workflows/demo.py --folder $(DEMO) --ui

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache *.egg-info
