# make demo    a model trained on built-in glyphs, from nothing but Python, g++ and this folder
# make test    the test suite                     make check   everything else that CI runs
# make due     what of make check has changed since it passed
# make nightly make check with nothing left out
# make fuzz    random cases of the ops against the reference (CASES=10000)
# make build   the C++ extension again, as far as its sources have changed
# make instructions   whether an op takes more instructions than recorded, or than at another commit (BASE=HEAD~1)
# make site    the pages of docs/ and of the API, in build/site
# make draw    the tests of the page and of the notebook, which need a browser and packages that the others do not
# make clean   removes all of it, the virtual environment too
#
# Everything happens in a virtual environment of its own, .venv. TORCH says what pip installs there for PyTorch. PyPI's
# Linux wheels for x86-64 bring several gigabytes of CUDA; a machine without a GPU does as well with PyTorch's CPU build:
#
#     make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#
# To change TORCH afterwards, run make clean first.

PYTHON ?= python3
TORCH ?= torch
# A release other than the one in .venv, to test the wheel beside, with what its own tests need.
TORCH_OTHER ?= torch==2.14.1 torchvision==0.29.1 timm

VENV := .venv
BIN := $(VENV)/bin
OP_TESTS := tests/test_content.py tests/test_lrua.py tests/test_ops.py tests/test_contract.py tests/test_cell.py tests/test_ntm.py tests/test_dnc.py tests/test_sparse.py tests/test_ntm_cell.py tests/test_dnc_cell.py tests/test_sparse_cell.py tests/test_sequences.py

# What of make check runs: all of it, but CI leaves out what would show again what it has shown (make due). Of a target that is
# not due and runs Python a sample is left, which goes through every op, and what has changed of the tests.
PARTS := isas instructions cuda emulate triton sanitize-cpu sanitize-cuda wheel
DUE ?= $(PARTS)
SAMPLE = $(sort tests/test_contract.py $(filter tests/%,$(DUE)))
op_tests = $(if $(filter $(1),$(DUE)),$(OP_TESTS),$(SAMPLE))
not_due = @echo "$@: nothing of it has changed since it passed"

# Targets that leave nothing out, as make nightly has them.
WHOLE ?=
# Of the op tests: what is the same whatever kernels implement an op is shown by make test, and by make nightly everywhere.
MARKS = $(if $(filter once,$(WHOLE)),,-m "not once$(if $(filter $@,$(WHOLE)),, and not thorough)")

.DELETE_ON_ERROR:
.PHONY: demo test check due nightly fuzz instructions draw build site lint abi isas triton cuda emulate sanitize wheel clean

$(VENV)/installed: pyproject.toml setup.py Makefile mann_fast/__init__.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is %d.%d: make PYTHON=..." % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77.0.3"
	@echo "Installing $(TORCH) ..."
	$(BIN)/python -m pip install --quiet $(TORCH)
	@echo "Compiling the kernels ..."  # before pip does, which would show nothing of it
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@echo "Installing mann_fast and what it needs ..."
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

# What the demo does without. Not beside build: pip compiles what has not been compiled yet.
$(VENV)/tools: $(VENV)/installed | build
	@echo "Installing the tools for developers ..."
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

build: $(VENV)/installed
	@$(BIN)/python setup.py --quiet build_ext --inplace

# For this processor alone, which takes a third of the time; make test builds the rest.
demo: export MANN_FAST_ISAS = native
demo: build
	$(BIN)/mann-fast demo

test: build $(VENV)/tools
	$(BIN)/python -m pytest --numprocesses 2

# What is over soon and fails often first, then what takes longest: two at once should end together.
CHECKS := lint abi instructions cuda wheel sanitize triton emulate
check: $(CHECKS)
	@$(BIN)/python scripts/due.py --passed check $(DUE) $(if $(filter-out $(DUE),$(PARTS)),,$(OP_TESTS))

due:
	@$(PYTHON) scripts/due.py $(OP_TESTS)

CASES ?= 10000
fuzz: build
	$(BIN)/python tests/fuzz.py --cases $(CASES)

# Skipped, with a word, where valgrind is not installed or the record is of another compiler, torch or Python. At this size a
# single op is mostly the way from Python to its kernel, a scan mostly its kernel.
BASE ?= benchmarks/instructions.json
COUNT = $(BIN)/mann-fast bench --instructions --base $(BASE) --shape T=8,B=2,H=50
instructions: build
	$(if $(filter $@,$(DUE)),$(COUNT),$(not_due))

nightly:
	$(MAKE) --jobs 2 --output-sync=target $(CHECKS) isas WHOLE="once $(PARTS)"
	$(BIN)/python scripts/due.py --passed nightly $(PARTS)

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.* csrc/*/*.* tests/*.cu tests/cpp/*.* scripts/*/*.h
	$(BIN)/mypy

# Only symbols that the oldest supported torch has, and none that instruction sets share.
abi: build
	$(BIN)/python scripts/check_abi.py

# The op tests on every instruction set, with memory that nobody has written filled with NaN. Of check, make wheel has the
# baseline; make test ran on the best, and AVX2 has the code of the other two, but for a few lines.
isas: build $(VENV)/tools
	$(BIN)/python scripts/test_isas.py $(MARKS) $(OP_TESTS)

# The Triton kernels: the op tests in Triton's interpreter, and compiled ahead of time for GPUs that need not be there.
triton: build $(VENV)/tools
	MANN_FAST_TEST_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/python -m pytest $(MARKS) $(call op_tests,triton)
	$(if $(filter $@,$(DUE)),$(BIN)/python scripts/triton_aot.py $(if $(filter $@,$(WHOLE)),,--reduced),$(not_due))

# The CUDA kernels, where nvcc is found: warnings are errors, those of the paper's size must not spill, and none may take more
# cycles than docs/cuda.md says, by a model of its machine code (a minute after compiling).
cuda: build $(VENV)/tools
	$(if $(filter $@,$(DUE)),$(BIN)/python scripts/cuda_report.py,$(not_due))
	$(if $(filter $@,$(DUE)),$(BIN)/python scripts/gpu_model --check docs/cuda.md)

# The op tests on the CUDA kernels, compiled for this processor with a fiber for every thread, and all of what is to run on a
# GPU that can run without one.
emulate: build $(VENV)/tools
	$(BIN)/python scripts/emulate.py build/emulated/cuda.so
	MANN_FAST_EMULATION=build/emulated/cuda.so MANN_FAST_TEST_BACKEND=cuda $(BIN)/python -m pytest $(MARKS) $(call op_tests,emulate)
	MANN_FAST_EMULATION=build/emulated/cuda.so $(BIN)/python benchmarks/gpu_check --dry-run --out build/gpu_check

# The kernels without torch, under the address, undefined-behaviour and thread sanitizers.
SANITIZED = $(patsubst sanitize-%,%,$(filter sanitize-%,$(DUE)))
sanitize: $(VENV)/installed
	$(if $(SANITIZED),$(BIN)/python scripts/sanitize.py --kernels $(SANITIZED) $(foreach part,$(SANITIZED),$(if $(filter $@-$(part),$(WHOLE)),,--reduced-$(part))),$(not_due))

# The wheel, made from the source distribution, in empty environments outside this folder: beside the torch that it was
# built with and beside another. What build and cuda have compiled serves for it.
wheel: build cuda $(VENV)/tools
	rm -rf dist
	MANN_FAST_OBJECTS="$(CURDIR)/build/objects" MANN_FAST_REQUIRE_EXTENSION=1 MANN_FAST_CUDA=$${MANN_FAST_CUDA-1} \
	    $(BIN)/python -m build --no-isolation
	$(BIN)/python scripts/test_wheel.py dist/*.whl --torch "$(TORCH)" --torch "$(TORCH_OTHER)" $(if $(filter $@,$(WHOLE)),--whole) \
	    $(call op_tests,wheel isas) tests/test_pretrained.py tests/test_backbones.py

# In Chromium, as Debian's package chromium has it, or Chrome. What is tested is left in build/draw.png: docs/draw.png is that.
draw: build $(VENV)/tools
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[draw]" playwright nbclient ipykernel
	MANN_FAST_PICTURE=build/draw.png $(BIN)/python -m pytest tests/test_draw.py tests/test_examples.py

site: $(VENV)/tools
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks
	rm -f mann_fast/_C.abi3.so* mann_fast/_C_cuda.abi3.so* mann_fast/_build_info.json*
	find . -name __pycache__ -prune -exec rm -rf {} +
