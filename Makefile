# make book [PROFILE=smoke]   run every chapter, then build the book from what was run
# make test                   everything that a change must pass
# make test-slow              every method compiled, and at every scale against its floor; hours, with what data DFKD_DATA has
# make clean                  forget what was built; the environment and the cached teachers stay
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= smoke
WORKERS ?= 2

BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: book test test-slow install clean

book: $(INSTALLED)
	$(BIN)/python -m dfkd_lib book --profile $(PROFILE) --workers $(WORKERS)

test: $(INSTALLED)
	$(BIN)/python -m dfkd_lib test

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/test_compiling.py tests/test_floors.py

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: Python 3.11, 3.12 or 3.13 is needed; choose one with make PYTHON=python3.12"; exit 2; }
	@echo "installing into $(VENV), which takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[batch,book,test,text]"
	@touch $@

clean:
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache
