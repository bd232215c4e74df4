VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=
DOCKER_BUILD_OPTIONS ?=

.PHONY: install install-serve serve test test-docker test-ray lint type bench soak docker clean

# Two sets of packages in one environment, each with a stamp file: what serving needs, and all that tests need.
install: $(VENV)/installed
install-serve: $(VENV)/serves

$(VENV)/serves: pyproject.toml constraints.txt
	$(call install_extra,serve)
$(VENV)/installed: pyproject.toml constraints.txt
	$(call install_extra,dev)
	touch $(VENV)/serves

define install_extra
	$(PYTHON) -m venv $(VENV)
	@echo "Installing packages into $(VENV); torch comes in gigabytes, so the first time takes minutes."
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(1)]'
	touch $@
endef

serve: install-serve
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
