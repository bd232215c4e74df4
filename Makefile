VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=

.PHONY: install serve test test-ray lint type bench docker clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/tome-server serve $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

test-ray: install
	$(BIN)/python -m pytest tests/ray $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: install
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.accuracy $(ARGS)

docker:
	docker build --tag tome-server .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
