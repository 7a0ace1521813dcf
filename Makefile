# Everything a newcomer needs: make demo, make test.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: demo test setup lint tests soak bench clean

setup: $(STAMP)

# torch first and pinned: a looser requirement would take a CUDA build of several gigabytes.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(STAMP)

demo: setup
	@$(BIN)/surefoot train examples/digits.py --out runs/demo
	@$(BIN)/surefoot report runs/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	@$(MAKE) --no-print-directory -j 2 lint tests

tests: setup
	$(BIN)/python -m pytest -m 'not soak' -n 3 --dist worksteal

soak: setup
	$(BIN)/python -m pytest -m soak -n 2

bench: setup
	$(BIN)/python benchmarks/loop.py --out benchmarks/results/loop.json
	$(BIN)/python benchmarks/loop.py --in-turns --workloads cnn gpt --rounds 12 --contenders loop bare surefoot surefoot-fused surefoot-tuned --out benchmarks/results/loop-in-turns.json
	$(BIN)/python benchmarks/log.py --out benchmarks/results/log.json
	$(BIN)/python benchmarks/restart.py --out benchmarks/results/restart.json
	$(BIN)/python benchmarks/checkpoint.py --out benchmarks/results/checkpoint.json
	$(BIN)/python benchmarks/goodput.py --out benchmarks/results/goodput.json
	$(BIN)/python benchmarks/guard.py --out benchmarks/results/guard.json
	$(BIN)/python benchmarks/threads.py --out benchmarks/results/threads.json
	$(BIN)/python benchmarks/beside.py --out benchmarks/results/beside.json
	$(BIN)/python benchmarks/heal.py --out benchmarks/results/heal.json
	$(BIN)/python benchmarks/reading.py --out benchmarks/results/reading.json
	$(BIN)/python benchmarks/start.py --out benchmarks/results/start.json
	$(BIN)/python benchmarks/growth.py --out benchmarks/results/growth.json
	$(BIN)/python benchmarks/peers.py --out benchmarks/results/peers.json

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build
