# Works with GNU make 3.81 (macOS) and newer. PYTHON=python3.12 chooses the interpreter.

export PYTHON MAKECMDGOALS
python := .venv/bin/python
pytest := OMP_NUM_THREADS=1 $(python) -m pytest -q -n auto --dist loadgroup

.PHONY: help setup demo test test-all lint format docs benchmark
help:
	@echo "make demo       set up, train tiny, convert it to a q4 GGUF, run it, print the proof (about 15 minutes, once)"
	@echo "make test       set up, then the tests"
	@echo "make test-all   the long ones too"
	@echo "make lint       ruff and pyright"
	@echo "make format     ruff format"
	@echo "make docs       write the generated pages in docs/ again"
	@echo "make benchmark  convert one model with llama.cpp's tools and with ours, side by side"
	@echo "make setup      only .venv"

setup:
	@.ci/setup

demo: setup
	@examples/main_job.sh

test: setup
	$(pytest)

test-all: setup
	$(pytest) -m ""

lint: setup
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyright

format: setup
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

docs: setup
	$(python) -m docs.generate

benchmark: setup
	$(python) -m benchmarks convert
