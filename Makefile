# Everything runs in .venv, which is made on first use from the pinned set in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo

.PHONY: demo test lint bench docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,trl,lightning,ray,export,dev]'
	touch $@

# A small GPT on real text under watch, its findings, and a report.
demo: .venv/ready
	rm -rf $(RUN)
	$(BIN)/dynascope watch --run $(RUN) --every 10 examples/train_gpt.py
	$(BIN)/dynascope show $(RUN)
	$(BIN)/dynascope report $(RUN) -o $(RUN)/report.html

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# One page a study, written from its last verdict.
docs: .venv/ready
	$(BIN)/python -m dynascope.studies.harness.pages docs/studies

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
