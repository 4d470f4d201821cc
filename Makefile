# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
APT := $(if $(filter-out 0,$(shell id -u)),sudo -n) env DEBIAN_FRONTEND=noninteractive apt-get

.PHONY: demo test quick browser bench dev lint lock clean

demo: $(READY)  ## the main job on the sandbox exchange, then the UI (UI=0: exit after the summary)
	$(BIN)/marketdata demo $(if $(filter 0,$(UI)),--no-ui,)

test: $(READY) lint browser  ## all tests
	$(BIN)/python -m pytest -n 3 --dist worksteal

quick: $(READY) lint  ## lint, types and the tests that start no server
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not server"

browser:  ## Chromium for the tests that click in the UI; they are skipped where it cannot be installed
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
	$(APT) --version >/dev/null 2>&1 && $(APT) -qq update && \
	$(APT) -qq install -y --no-install-recommends chromium fonts-liberation >/dev/null || \
	echo "There is no Chromium, and apt-get cannot install it here: the tests that need a browser are skipped."

bench: $(READY)  ## ours beside the peers; says which ratios became worse (never in CI)
	$(BIN)/python bench/peers.py --rounds 1 --compare

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
