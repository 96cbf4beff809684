# Everything runs in .venv, which the first call makes. Needs GNU make, git and Python 3.10 or newer.
# make PYTHON=/path/to/python3.12 demo    another Python;    make test ARGS="-k ema"    some of the tests

READY := .venv/.ready
ARGS  ?=
JOBS  ?= 2
FAST  := not slow and not notebook and not experiment

# Threads of torch spin briefly before they sleep: as fast on an idle machine, and no collapse beside other programs
# (benchmarks/results/openmp_policy.json). Whoever has set OpenMP up differently keeps that.
ifeq ($(OMP_WAIT_POLICY)$(OMP_NUM_THREADS),)
export GOMP_SPINCOUNT ?= 20000
endif

.PHONY: help demo test lint check test-versions constraints export docs hooks clean

help:
	@echo "make demo    distil the tiny Flux of this repository and compare it with its teacher (about 5 minutes)"
	@echo "make test    linter, types, every test, every notebook from top to bottom"
	@echo "make check   linter, types and the fast tests: minutes, before each commit"
	@echo "make test-versions   the fast tests with the oldest supported and the newest versions of torch and friends"
	@echo "make constraints     note the versions in .venv as those that were tested, after make test"
	@echo "make export  clean the notebooks and write scfm/*.py from them"
	@echo "make docs    the course, the guides and the reference as a site: _docs/site/index.html"
	@echo "make hooks   git merges notebooks cell by cell (the set-up has done this already)"
	@echo "make clean   remove caches; .venv, .venv-versions and runs stay"

demo: $(READY)
	@.venv/bin/scfm demo $(ARGS)

test: lint
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -n $(JOBS) --dist loadscope $(ARGS)

lint: $(READY)
	@.venv/bin/ruff check .
	@.venv/bin/pyright

check: lint
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -n $(JOBS) --dist loadscope -m "$(FAST)" $(ARGS)

test-versions: $(READY)
	@.venv/bin/python .ci/test-versions $(ARGS)

constraints: $(READY)
	@.venv/bin/python .ci/freeze > .ci/constraints.new
	@mv .ci/constraints.new .ci/constraints.txt
	@echo "the versions in .venv noted in .ci/constraints.txt"

export: $(READY)
	@.venv/bin/nbdev_clean
	@.venv/bin/nbdev_export
	@echo "notebooks cleaned, scfm/*.py written from them"

docs: $(READY)
	@.venv/bin/python scripts/docs_site/make_site.py $(ARGS)

hooks: $(READY)
	@.ci/hooks

clean:
	rm -rf _docs _proc build dist .pytest_cache .hypothesis .ruff_cache nbs/.last_checked
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +

# The stamp holds the folder's path: an environment that was moved or copied points elsewhere, and is made again.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

$(READY): settings.ini setup.py pyproject.toml .ci/constraints.txt
	@PYTHON="$(PYTHON)" .ci/setup
