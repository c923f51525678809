# The two commands of the README. A fresh machine needs Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV ?= .venv
CORES ?= all

.PHONY: reproduce report test lint environment lock sbom system-deps
reproduce: environment
	$(VENV)/bin/snakemake --cores $(CORES)
	$(VENV)/bin/nonn timeline
	$(VENV)/bin/nonn compare
	@$(MAKE) --no-print-directory report

report: environment
	$(VENV)/bin/snakemake --cores $(CORES) --report report.html
	@echo "The report: $(CURDIR)/report.html"

test: environment lint
	$(VENV)/bin/python -m pytest -rfEs --numprocesses 2 --dist loadgroup

lint: environment
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/snakefmt --check workflow
	$(VENV)/bin/snakemake --lint
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy --cache-dir .nonn/mypy
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet --site-dir .nonn/site

environment: $(VENV)/installed

# Versions are those that were tested, each file with its SHA-256, and nothing else is installed; pyproject.toml has the
# ranges that should work. Beside a PyTorch for the CPU, which somebody has installed before, CUDA is left out.
$(VENV)/installed: pyproject.toml requirements.lock
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'NoNN needs Python 3.11 or newer: make PYTHON=python3.11 …')"
	$(PYTHON) -c "import sys; sys.exit(sys.maxsize < 2**32 and 'NoNN needs a 64-bit Python, on a Raspberry Pi the 64-bit Raspberry Pi OS')"
	$(PYTHON) -m venv $(VENV)
	if $(VENV)/bin/python -c "import sys, torch; sys.exit(torch.version.cuda is not None)" 2>/dev/null; \
	then awk '/^[a-z]/ {for_gpu = /^(cuda|nvidia|triton)/} !for_gpu' requirements.lock; \
	else cat requirements.lock; fi >$(VENV)/requirements.lock
	$(VENV)/bin/pip install --quiet --require-hashes --requirement $(VENV)/requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

COMPILE = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

# After a change of the dependencies in pyproject.toml: versions stay as they are where they can. What a device installs
# has a list of its own, of the same versions, with setuptools to build NoNN itself.
lock: environment
	$(COMPILE) pyproject.toml --extra dev --output-file requirements.lock
	echo setuptools | $(COMPILE) pyproject.toml - --constraint requirements.lock --output-file requirements-device.lock

# Which software a device runs, for those who have to watch it (CycloneDX).
sbom: environment
	$(VENV)/bin/cyclonedx-py requirements requirements-device.lock --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file sbom.cdx.json

# What builds and runs firmware (`nonn firmware`), on Debian or Ubuntu. All else works without.
SUDO ?= $(shell test "$$(id -u)" = 0 || echo sudo)
system-deps:
	$(SUDO) apt-get update
	$(SUDO) apt-get install --yes --no-install-recommends gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm
