PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

OTHER_ZENNIT := .zennit-1
LOWEST := .venv-lowest

.PHONY: demo test test-zennit-1 test-lowest nightly lint docs package bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## train on handwritten digits, find polysemantic channels, split them
	$(RUN) examples/digits.py

test: $(VENV)/.installed  ## doctests and tests, with branch coverage
	$(RUN) -m pytest -n auto --dist loadfile --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

$(OTHER_ZENNIT): $(VENV)/.installed  # wants a newer Python than it needs
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --target $@ 'zennit>=1,<2'

test-zennit-1: $(OTHER_ZENNIT)  ## what concerns LRP, with zennit 1.x
	PYTHONPATH=$(OTHER_ZENNIT) $(RUN) -m pytest -n auto --dist loadfile tests/test_lrp.py tests/test_split_rules.py tests/test_replay.py tests/test_heatmaps.py

$(LOWEST)/.installed: pyproject.toml  # the lowest versions of what users need, the newest of the developers' tools
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/bin/python \
		--extra pandas --extra figures --extra viz --extra examples pyproject.toml -o $(LOWEST)/versions.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python -c $(LOWEST)/versions.txt -e '.[dev]'
	touch $@

test-lowest: $(LOWEST)/.installed  ## doctests and tests, with the lowest versions that pyproject.toml allows (several GB)
	$(LOWEST)/bin/python -m pytest -n auto --dist loadfile

nightly: $(VENV)/.installed  ## many random networks
	HYPOTHESIS_PROFILE=nightly $(RUN) -m pytest tests/test_fuzz.py

lint: $(VENV)/.installed  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/.docs-installed: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

docs: $(VENV)/.docs-installed  ## the documentation in site/, with warnings as errors (which --quiet would hide)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

package: $(VENV)/.installed  ## wheel and sdist in dist/, checked, and the wheel tried in an environment of its own
	rm -rf dist
	$(RUN) -m build
	$(RUN) .ci/check_package.py

bench: $(VENV)/.installed  ## measures anew what benchmarks/README.md says of cost; BENCH="--only memory": some of it
	$(RUN) benchmarks/run.py $(BENCH)

clean:
	rm -rf $(VENV) $(OTHER_ZENNIT) $(LOWEST) demo_logs lightning_logs .bench_cache build dist site *.egg-info
