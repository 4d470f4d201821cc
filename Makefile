# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test dev lint lock clean

demo: $(READY)  ## the main job on the sandbox exchange, then the UI (UI=0: exit after the summary)
	$(BIN)/marketdata demo $(if $(filter 0,$(UI)),--no-ui,)

test: $(READY) lint  ## all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

dev: $(READY)  ## UI and daemon on your universe
	$(BIN)/marketdata dev

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

lock:  ## pin all versions anew (needs uv)
	uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links --universal --python-version 3.11 --extra test pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) data/demo data/state data/lake data/market.duckdb*
