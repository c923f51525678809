# The two commands of the README. A fresh machine needs Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV ?= .venv
CORES ?= all

.PHONY: reproduce report test lint environment
reproduce: environment
	$(VENV)/bin/snakemake --cores $(CORES)
	test ! -e .nonn/journal.jsonl || $(VENV)/bin/nonn timeline  # none where all came from DVC's cache
	$(VENV)/bin/nonn compare
	$(VENV)/bin/snakemake --cores $(CORES) --report report.html
	@echo "The report: $(CURDIR)/report.html"

report: environment
	$(VENV)/bin/snakemake --cores $(CORES) --report report.html

test: environment lint
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadgroup

lint: environment
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/snakefmt --check workflow
	$(VENV)/bin/snakemake --lint
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy --cache-dir .nonn/mypy
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet --site-dir .nonn/site

environment: $(VENV)/installed

# Versions are those that were tested; pyproject.toml has the ranges that should work.
$(VENV)/installed: pyproject.toml requirements.lock
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'NoNN needs Python 3.11 or newer: make PYTHON=python3.11 …')"
	$(PYTHON) -c "import sys; sys.exit(sys.maxsize < 2**32 and 'NoNN needs a 64-bit Python, on a Raspberry Pi the 64-bit Raspberry Pi OS')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint requirements.lock --editable .[dev]
	touch $@
