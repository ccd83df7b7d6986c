# Each target makes .venv ready first (tools/environment.py) and touches nothing outside the checkout.
PYTHON ?= python3
BIN := .venv/bin
CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
demo test test-all test-processors fuzz lint bench bench-models sass: export FASTCNN_WERROR = ON
# Packages are installed without bytecode: the first import writes it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all test-processors fuzz lint bench bench-models chart sass gpu wheel clean

help:
	@echo "make demo   teach a U-Net to read, and the same in plain PyTorch: accuracy, speed, memory"
	@echo "make test   lint, then the tests, the most telling first"
	@echo "make test-all         and what takes long: foreign models, the whole demo, fuzz"
	@echo "make test-processors  all of it on each instruction set that is here, from five seeds"
	@echo "make fuzz   N random calls of the ops, N=20000, against float64, and N invalid ones; SEED=... again"
	@echo "make bench  the kernels and whole networks compared with PyTorch, interleaved in one process"
	@echo "make bench-models     20 networks of other people vs. PyTorch and OpenVINO: hours; QUICK=1 minutes"
	@echo "make chart  docs/networks.svg and README's table of networks, from benchmarks/results/"
	@echo "make gpu    with a GPU: build, measure, test, sanitize, tune into RESULTS=dir; STAGES=build,step"
	@echo "make sass   docs/gpu-static.md: what the GPU kernels' machine code says; without a GPU, with nvcc"
	@echo "make wheel  a wheel for this Python and CUDA, in dist/"

demo:
	@$(PYTHON) tools/environment.py train
	@$(BIN)/fastcnn demo

# Two processes, each with files of its own, in order: most tests have work for one core.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow" --maxfail=3

test-all: test
	$(PYTEST) -m slow

test-processors:
	@$(PYTHON) tools/environment.py dev
	$(BIN)/python tools/processors.py $(PYTEST)

# The command is printed with its seed: the same seed makes the same calls.
fuzz: N ?= 20000
fuzz: SEED := $(or $(SEED),$(shell date +%s))
fuzz:
	@$(PYTHON) tools/environment.py dev
	FASTCNN_FUZZ=$(N) $(BIN)/python -m pytest tests/fuzz --hypothesis-seed=$(SEED)

lint:
	@$(PYTHON) tools/environment.py dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

# Memory that was freed stays in the process, for all candidates alike: else the zeroing of fresh
# pages takes most of a call on tensors above 32 MB, and hides what is compared.
bench: export MALLOC_MMAP_THRESHOLD_ = 4294967296
bench: export MALLOC_TRIM_THRESHOLD_ = 17179869184
bench:
	@$(PYTHON) tools/environment.py dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

bench-models: export MALLOC_MMAP_THRESHOLD_ = 4294967296
bench-models: export MALLOC_TRIM_THRESHOLD_ = 17179869184
bench-models: RESULTS ?= build/models.json
bench-models:
	@$(PYTHON) tools/environment.py dev
	$(BIN)/python benchmarks/models.py $(RESULTS) $(NETWORKS) $(if $(QUICK),--quick)

chart:
	@$(PYTHON) tools/environment.py train
	$(BIN)/python tools/chart.py

# ACCEPT=1 also writes down which figures are missed today: what the tests then hold.
sass:
	@$(PYTHON) tools/environment.py dev
	PYTHONPATH=tools $(BIN)/python -m gpu_static $(if $(ACCEPT),--accept)

# With the Python and the packages that are there, without .venv and downloads.
gpu:
	@PYTHONPATH=tools $(PYTHON) -m gpu "$(RESULTS)" "$(STAGES)"

# As packagers build: no warnings as errors, and in a fresh .venv nothing but what building takes.
wheel:
	@$(PYTHON) tools/environment.py wheel
	@FASTCNN_CUDA=$${FASTCNN_CUDA:-ON} $(BIN)/python tools/build_wheel.py dist

clean:
	rm -rf .venv build dist runs
