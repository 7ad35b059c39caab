# make demo      all steps on simulated recordings, or DATA=<folder or s3:// URI> LABELS=<csv> [TASK=<label>]
# make test      all tests; ARGS= passes options to pytest
# make check     lint, types and the tests that need neither Ray nor a server
# make lint      ruff and mypy        make format   let ruff rewrite the files
# make ui        the MLflow UI of the last demo     make serve-demo   its models' endpoint, with a page for people
# make docs      the documents as a site, in site/
# The first target that you run makes the virtual environment .venv; changed pins make it install again.

PYTHON ?= python3.11
VENV := .venv
RUN := $(CURDIR)/$(VENV)/bin
DEMO ?= demo
# Processes of one torch thread each: with more threads than cores they wait for each other.
PYTEST := env OMP_NUM_THREADS=1 $(RUN)/python -m pytest
QUICK := not ray and not server
export PATH := $(RUN):$(PATH)

.PHONY: demo serve-demo test test-cluster test-servers test-quick check lint format ui docs clean

$(VENV)/.installed: pyproject.toml infra/constraints.txt
	@echo "Installing into $(VENV) (once, some minutes) …"
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.11 or give PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --progress-bar on --editable '.[dev]' --constraint infra/constraints.txt
	@touch $@

demo: $(VENV)/.installed
	$(RUN)/python workflows/demo.py --folder $(DEMO) $(if $(DATA),--data $(DATA)) $(if $(LABELS),--labels $(LABELS)) $(if $(TASK),--task $(TASK))

# Three test runs at once, because tests of servers often wait: those of the Ray cluster that they share, those that
# start servers or a Ray of their own, and the quick ones. The output of each appears when it ends.
test: $(VENV)/.installed
	@$(MAKE) --no-print-directory --keep-going --jobs=3 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) \
		test-cluster test-servers test-quick

test-cluster: CHOSEN := cluster
test-servers: CHOSEN := (ray or server) and not cluster
test-quick: CHOSEN := $(QUICK)
test-quick: PYTEST := nice $(PYTEST)  # it ends first: the others determine how long all take
test-cluster test-servers test-quick: $(VENV)/.installed
	$(PYTEST) -m "$(CHOSEN)" --durations=10 $(ARGS) || [ $$? -eq 5 ]  # 5: ARGS chose none of these

check: lint
	$(PYTEST) -m "$(QUICK)" -n 2 $(ARGS)

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(VENV)/.installed
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

serve-demo: $(VENV)/.installed
	$(RUN)/python workflows/demo.py --folder $(DEMO) --serve

ui: $(VENV)/.installed
	$(RUN)/python workflows/demo.py --folder $(DEMO) --ui

docs: $(VENV)/.installed
	$(RUN)/mkdocs build --strict --quiet
	@echo "The site is in site/: $(VENV)/bin/python -m http.server --directory site"

clean:
	rm -rf $(VENV) demo site .pytest_cache .ruff_cache .mypy_cache *.egg-info
