# Everything a person or CI calls. Needs python3, make and a package index; the environment is made in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
# Two test processes on two cores: torch's own threads would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
CELLS := $(addprefix $(VENV)/lib/python3*/site-packages/elpv_dataset/data/images/cell,$(addsuffix .png,0005 0008 0022 0060 0064))

.PHONY: demo test test-all check format bench clean

demo: $(VENV)/.demo  ## train a detector of defective solar cells, and use it
	rm -rf $(RUN)
	$(BIN)/isthmus train --data elpv:0 --weights demo --out $(RUN)
	$(BIN)/isthmus predict $(RUN) $(CELLS) --out $(RUN)/predictions.csv

test: $(VENV)/.dev  ## the quick tests
	$(PYTEST) -m "not long"

test-all: $(VENV)/.dev  ## every test
	$(PYTEST)

check: $(VENV)/.dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev  ## every claim about speed and accuracy; takes about four hours, on an idle machine
	set -e; for script in plan_speed weights_load loader training_step training_memory freeze kill_resume elpv_probe elpv_time elpv_finetune engines int8_cells predict_files serve roofline depth report_page; do $(BIN)/python benchmarks/$$script.py; done

clean:
	rm -rf $(VENV) runs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.demo
