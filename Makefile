PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

OTHER_ZENNIT := .zennit-1

.PHONY: demo test test-zennit-1 nightly lint bench clean

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

nightly: $(VENV)/.installed  ## many random networks
	HYPOTHESIS_PROFILE=nightly $(RUN) -m pytest tests/test_fuzz.py

lint: $(VENV)/.installed  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.installed  ## the benchmarks of benchmarks/README.md
	$(RUN) benchmarks/validation_overhead.py
	$(RUN) benchmarks/against_paper_pipeline.py
	$(RUN) benchmarks/split_quality.py
	$(RUN) benchmarks/planted.py
	$(RUN) benchmarks/concept_relevance.py

clean:
	rm -rf $(VENV) $(OTHER_ZENNIT) demo_logs build dist *.egg-info
