# Everything runs in .venv, which is made on first use from the pinned set in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[hf,trl,lightning,ray,export,dev]'
	touch .venv/ready
