PYTHON ?= python
STORAGE = runtime/segment*.py,runtime/writer.py,tmm/reader.py

.PHONY: test test-all format

test:
	$(PYTHON) -m pytest

# Everything, with coverage: 95 % of the core, 90 % of the storage.
test-all:
	$(PYTHON) -m pytest -m "slow or not slow" --cov --cov-report=
	$(PYTHON) -m coverage report --omit='$(STORAGE)' --fail-under=95
	$(PYTHON) -m coverage report --include='$(STORAGE)' --fail-under=90

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
