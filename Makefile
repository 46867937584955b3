PYTHON ?= python3
VENV := .venv
CUDA ?= 12
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test test-trackers test-cluster test-smollm2 test-llama-cpp test-slurm test-gpu lint format types clean test-fuzz test-faults audit

quickstart: $(VENV)/.installed          ## adapt a small real model to Russian on this machine
	$(BIN)/python -m launch quickstart

test: lint types                        ## lint, types, tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-eval: $(VENV)/.installed-eval      ## the tests that need lm-evaluation-harness (200 MB installed)
	$(BIN)/python -m pytest tests/evaluate tests/launch/test_eval_command.py

test-trackers: $(VENV)/.installed-test  ## what W&B and MLflow (170 MB installed) hold of a run, without a network
	$(PIP) --editable '.[test,wandb,mlflow]'
	$(BIN)/python -m pytest -rs tests/telemetry/test_trackers_real.py

test-smollm2: $(VENV)/.installed-eval   ## the tests that need the real weights (a download of 93 MB)
	$(BIN)/python -c "from launch.quickstart_parts.base_model import fetch_smollm2 as f; import pathlib; f(pathlib.Path('runs/smollm2'))"
	TLITE_SMOLLM2_GGUF="$$(ls $(CURDIR)/runs/smollm2/*.gguf)" $(BIN)/python -m pytest -s -k smollm2

test-fuzz: $(VENV)/.installed-test      ## 20,000 spoiled model files
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.bridge.fuzzing --count 20000

test-faults: $(VENV)/.installed-test     ## every fault of docs/reliability.md in its full form (TLITE_FAULTS=0.1: a tenth)
	$(BIN)/python -m tests.faults

audit: $(VENV)/.installed-test          ## known vulnerabilities of what is installed, where a service can be reached
	$(PIP) pip-audit
	$(BIN)/python -m tests.faults.audit

# llama-cpp-python is built from source (4 minutes on 2 cores), once: pip keeps the wheel in its cache.
test-llama-cpp: $(VENV)/.installed-test ## our GGUF files against llama.cpp itself
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF" $(PIP) llama-cpp-python==0.3.36 llama-models==0.3.0 --no-deps diskcache
	$(BIN)/python -c "from launch.quickstart_parts.base_model import fetch_smollm2 as f; import pathlib; f(pathlib.Path('runs/smollm2'))"
	TLITE_LLAMA_CPP=1 TLITE_SMOLLM2_GGUF="$$(ls $(CURDIR)/runs/smollm2/*.gguf)" \
		$(BIN)/python -m pytest -s tests/bridge/test_llama_cpp.py

test-cluster: $(VENV)/.installed-test   ## preparing on Slurm (where sinfo finds one) and on Ray, and 300 kills
	$(PIP) --editable '.[ray,test]'
	TLITE_CLUSTER=1 TLITE_KILLS=300 $(BIN)/python -m pytest -s tests/data/test_cluster.py tests/data/test_workers.py

test-slurm: $(VENV)/.installed-test     ## submit, preempt, lose a node: on a real Slurm, started in a scratch directory (root)
	TLITE_TEST_SLURM=1 $(BIN)/python -m pytest -s -rs tests/slurm

test-gpu: $(VENV)/.installed-test       ## the step, its collectives over NCCL and the kernels, on this machine's GPUs
	$(PIP) --editable '.[cuda$(CUDA),test]'
	TLITE_TEST_GPU=1 $(BIN)/python -m pytest -s -rs tests/gpu

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# setup.cfg pins torch, the reference of the parity tests: a range would take whatever is newest, with its CUDA packages.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

# Not part of the test extra: pandas, scikit-learn and nltk come with it.
$(VENV)/.installed-eval: $(VENV)/.installed-test
	$(PIP) --editable '.[test,test-eval]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
