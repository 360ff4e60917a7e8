# Each verb sets up what it needs in a virtual environment, .venv: the package with the extra `train`,
# and for tests, checks and benchmarks the development tools. The first set-up downloads torch and
# takes some minutes; after that it is skipped.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TO_TRAIN := $(VENV)/installed-train
STAMP := $(VENV)/installed
JOBS := 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: $(shell sed -nE 's/^([a-z-]+):.*\#\#.*/\1/p' $(MAKEFILE_LIST))

help: ## List the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(TO_TRAIN): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is older: make PYTHON=..."; exit 1; }
	@echo "setting up $(VENV) (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --editable '.[train]'
	@touch $@

$(STAMP): $(TO_TRAIN)
	@echo "setting up the development tools in $(VENV) (once)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

demo: $(TO_TRAIN) ## Train one small student four ways, and write runs/demo/report.html
	$(BIN)/softlabels demo --output runs/demo

test: $(STAMP) ## Run the tests (some minutes on 2 cores)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow and not gpu and not docs"

test-docs: $(STAMP) ## Run the code and the commands that the documentation shows (a minute)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m docs tests

test-slow: $(STAMP) ## Run the tests that train for minutes
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m "slow and not gpu and not smoke and not browser"

test-browser: $(STAMP) ## Look at the report's pages in a headless chromium (needs chromium and chromium-driver)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m browser tests/report/test_browser.py

test-gpu: $(STAMP) ## Check losses, methods and runs on a GPU (some minutes; needs one)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m gpu tests/gpu

test-survival: $(STAMP) ## Kill runs again and again, and compare what they end with (2 minutes)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -s -m "slow" tests/training/test_survival.py

test-methods: $(STAMP) ## Train with every method, stop, go on, compile, in two processes (12 minutes)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -s -m "slow" tests/methods

fuzz: $(STAMP) ## Give the program 500 generated cases of each kind of bad input (10 minutes)
	HYPOTHESIS_PROFILE=fuzz $(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q tests/fuzz

coverage: $(STAMP) ## Run the tests of losses and taps, and say which lines and branches they reach
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow and not gpu" \
		--cov=softlabels.losses --cov=softlabels.taps --cov-branch --cov-report=term:skip-covered tests/losses tests/taps

smoke: $(STAMP) ## Run every recipe, shrunk to seconds (15 minutes, 3 GB a process)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m smoke

check: $(STAMP) ## Check format, style, import directions, types and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/codespell src tests docs benchmarks examples README.md CONTRIBUTING.md CHANGELOG.md

format: $(STAMP) ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure overheads and write results/benchmarks.json
	$(ONE_THREAD) $(BIN)/python -m benchmarks.run

bench-losses: $(STAMP) ## Measure the losses, and write results/losses.json (6 minutes, two threads)
	$(BIN)/python -m benchmarks.losses

bench-precision: $(STAMP) ## Measure which precision is fast for which network, and write results/precision.json (5 minutes)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.precision

bench-data: $(STAMP) ## Measure how fast photographs are read, and write results/reading.json (make bench-data DATA=DIR; a minute)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.reading $(DATA)

bench-epochs: $(STAMP) ## Measure epochs on CIFAR-100, and write results/epochs.json (make bench-epochs DATA=DIR; half an hour)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.epochs $(DATA)

bench-cache: $(STAMP) ## Measure what a teacher cache loses, and write results/teacher_cache.json (a minute)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.teacher_cache

bench-scaling: $(STAMP) ## Measure runs: cache, checkpoints, start-up, memory, two processes (10 minutes)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.scaling

bench-methods: $(STAMP) ## Measure what each method costs, and write results/methods_cost.json (10 minutes)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.methods_cost

bench-gpu: $(STAMP) ## Measure the main methods' cost on a GPU, and write results/gpu_cost.json (a minute)
	$(BIN)/python -m benchmarks.gpu_cost

results: $(TO_TRAIN) ## Run a comparison of results/ (make results NAME=few_fonts); an hour on 2 idle cores
	$(BIN)/softlabels compare results/$(NAME)/comparison.yaml --output runs/results/$(NAME) \
		--runs runs/results/runs --jobs $(JOBS) --threads 1
	cp $(addprefix runs/results/$(NAME)/comparison., json csv md) results/$(NAME)/

results-sweeps: $(STAMP) ## Choose every method's settings on held-out training fonts (half an hour)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.sweeps --jobs $(JOBS)

results-quick: $(STAMP) ## Repeat a small part of results/, and check it against what is committed (10 minutes)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.quick_results

docs: $(STAMP) ## Write the figures in README and docs from results/
	$(BIN)/python -m benchmarks.render

site: $(STAMP) ## Build the documentation site into build/site (no network is needed)
	$(BIN)/mkdocs build --quiet

teacher: $(TO_TRAIN) ## Train the teacher that the package ships again (10 minutes on one thread)
	$(BIN)/softlabels train glyphs100/teacher --threads 1 --output runs/teacher
	cp runs/teacher/student.safetensors src/softlabels/recipes/glyphs100/teacher.safetensors
	mkdir -p results/teacher
	cp runs/teacher/summary.json runs/teacher/environment.json runs/teacher/metrics.jsonl \
		runs/teacher/config.yaml results/teacher/

wheel: ## Build the wheel into dist
	rm -rf dist
	$(PYTHON) -m venv --clear build/wheel
	build/wheel/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

test-wheel: wheel ## Install the wheel by itself, and train for seconds with it
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[train]"
	cd build && wheel/bin/softlabels train glyphs100/uskd --smoke --output wheel/run

picture: ## Take the picture of the demo's report for the docs (needs chromium)
	sh docs/picture.sh runs/demo/report.html docs/demo_report.png 1100 940

clean: ## Remove the environment and what tools left behind
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage build dist
