# make demo    the demo: four patching methods on two packaged models, results in patchlab-demo/index.html
# make test    the tests
# make quick   the same without the slow ones
# make check   ruff, pyright and the tests
# make browser-test   JupyterLab and saved pages in a real browser (needs Chromium or Chrome); pictures of them in browser-shots/
# make docs    the documentation site, in site/; open site/index.html
# make notebooks  execute notebooks/*.py into the .ipynb beside them (needs Chromium or Chrome for the pictures)
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
OUT ?= patchlab-demo
BIN := .venv/bin

.PHONY: demo test quick check lint browser-test docs notebooks clean

demo: .venv/.ok
	$(BIN)/patchlab demo --force --out "$(OUT)"

test: .venv/.ok
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

quick: .venv/.ok
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

check: lint test

lint: .venv/.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

browser-test: .venv/.browser
	$(BIN)/python -m pytest -q browser_tests

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

notebooks: .venv/.ok
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test,notebooks]'
	$(BIN)/python scripts/notebooks.py

.venv/.ok: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "patchlab needs Python 3.11 or newer and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@echo "installing into .venv (minutes, the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test]'
	@touch $@

.venv/.browser: .venv/.ok
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test,browser]'
	@touch $@

.venv/.docs: .venv/.ok
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache
