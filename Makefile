VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=
DOCKER_BUILD_OPTIONS ?=

.PHONY: install serve test test-docker test-ray lint type bench soak docker clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/tome-server serve $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

test-docker: install
	DOCKER_BUILD_OPTIONS='$(DOCKER_BUILD_OPTIONS)' $(BIN)/python -m pytest tests/docker $(ARGS)

test-ray: install
	$(BIN)/python -m pytest tests/ray $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

type: install
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.accuracy $(ARGS)

soak: install
	$(BIN)/python -m benchmarks.soak --minutes 10 $(ARGS)

docker:
	docker build $(DOCKER_BUILD_OPTIONS) --tag tome-server .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
