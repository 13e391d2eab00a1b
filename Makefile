# BitNet from Scratch: `make book` and `make test` do everything, from a bare clone.
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help book test lab chat bench lock clean
help:
	@echo "make book   build the book         make test   check everything"
	@echo "make lab    open JupyterLab        make chat   talk to the tiny model"
	@echo "make bench  measure this machine   make lock   resolve requirements.lock anew"
	@echo "make clean  remove what was built (not .venv)"

book: $(READY)
	rm -rf _build/html _build/ledger _build/executed _build/.jupyter_cache _build/times.json
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/jupyter-book build . --all -W -n --keep-going
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

test: book
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb
	$(BIN)/pytest -n 2 --dist loadfile --durations=10 tests

lab: $(READY)
	$(BIN)/jupyter lab notebooks

chat: $(READY)
	$(BIN)/bitnet-edu chat

bench: $(READY)
	$(BIN)/bitnet-edu bench

# One environment, made once, from the pinned versions; made again when the pins change.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "This book needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is not one: $$($(PYTHON) --version 2>&1). Name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "Could not make .venv (on Debian and Ubuntu: apt-get install python3-venv)"; rm -rf .venv; exit 1; }
	$(BIN)/python tools/install_torch.py $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

lock:
	python3 -m venv _build/uv && _build/uv/bin/pip install --quiet uv
	_build/uv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras --no-emit-package bitnet-edu --custom-compile-command "make lock" pyproject.toml requirements.in -o requirements.lock

clean:
	rm -rf _build build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find bitnet_edu tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
