PYTHON ?= python
STORAGE = runtime/store/*.py,tmm/runs/recorded_run.py

.PHONY: test test-all test-matrix lint format faults docs pages tutorial pictures packages

test:
	$(PYTHON) -m pytest

# What does not depend on behaviour: rules, formatting, types, and what the wheel holds.
lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest -m lint -n 0 -q tests/test_wheel.py

# Everything, with coverage: 95 % of the core, 90 % of the storage.
test-all:
	$(PYTHON) -m pytest -m "not lint" --cov --cov-report=
	$(PYTHON) -m coverage report --omit='$(STORAGE)' --fail-under=95
	$(PYTHON) -m coverage report --include='$(STORAGE)' --fail-under=90

# The tests on the oldest torch that is supported and on the newest release, each in an
# environment of its own below .matrix. Downloads several GB.
MATRIX = torch==2.11.* torch
test-matrix:
	for torch in $(MATRIX); do \
	  environment=".matrix/$$(echo $$torch | tr -c '[:alnum:].\n' '-')" && \
	  $(PYTHON) -m venv "$$environment" && \
	  "$$environment/bin/python" -m pip install --quiet --upgrade "$$torch" -e '.[test]' && \
	  "$$environment/bin/python" -m pytest || exit 1; \
	done

# Plants the faults of tests/fault_table.py one by one, and names the test that catches each.
faults:
	$(PYTHON) -m tests.deliberate_faults

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# What is published, into dist/: the sources, a wheel of pure Python, whose kernels are compiled
# where it is used, and one that brings those of this type of machine. Needs the extra "package".
packages:
	rm -rf dist build/machine
	$(PYTHON) -m build
	TMM_KERNELS=ahead $(PYTHON) -m build --wheel --no-isolation --outdir build/machine
	$(PYTHON) -m auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/machine/*.whl
	$(PYTHON) -m twine check --strict dist/*

# The site, into build/site, without the network; whatever is not in order fails.
docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

# What of the site is committed and made: pages that follow from the code; the notebook of the
# tutorial, executed; the pictures, from real runs in a browser.
pages:
	$(PYTHON) -m docs.make.pages

tutorial:
	$(PYTHON) -m docs.make.tutorial
	$(PYTHON) -m docs.make.pages

pictures:
	$(PYTHON) -m docs.make.pictures
