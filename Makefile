# Each target works from a fresh clone with Python, a C++ compiler and make; the first one sets up .venv.
PYTHON ?= python3
BIN = .venv/bin
# what clang-format writes
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu')
SOURCES = $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml

.PHONY: bench regress quick test test-integrations test-oldest slow fuzz simt aot gpu-pack lint format clean

# --no-compile: modules are compiled when they are first imported, and most never are
.venv/ready: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt torch numpy setuptools wheel ruff clang-format
	touch $@

# editable, so that the tests see these sources; run again when the C++ changes
.venv/installed: .venv/ready $(SOURCES)
	$(BIN)/pip install -q --no-compile --no-build-isolation -c constraints.txt -e '.[test]'
	touch $@

bench: .venv/installed
	$(BIN)/python -m kdkernels bench

# times of the pytest-benchmark suite, saved, and compared with those saved before
regress: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-autosave --benchmark-compare

# a process for each of two cores, each with one thread: more would wait for each other
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/integrations

# the real trainers that the integrations are for, in their newest releases, beside what .venv has
TRAINERS = .venv-trainers
$(TRAINERS)/ready: .venv/installed
	$(PYTHON) -m venv $(TRAINERS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		`$(TRAINERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"`/venv.pth
	$(TRAINERS)/bin/pip install -q --no-compile -c constraints.txt 'transformers>=5' accelerate trl lightning liger-kernel peft tensorboard
	touch $@

test-integrations: $(TRAINERS)/ready
	OMP_NUM_THREADS=1 $(TRAINERS)/bin/python -m pytest -n 2 --dist worksteal tests/integrations

# the oldest torch that is promised, with the Triton that it brings; gigabytes, the first time
OLDEST = .venv-oldest
$(OLDEST)/ready:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q --no-compile torch==2.10.0 numpy setuptools pytest pytest-xdist hypothesis mpmath
	touch $@

test-oldest: .venv/installed $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal tests/test_ops.py tests/test_functional.py tests/test_linear.py \
		tests/test_row_temperature.py tests/test_counters.py tests/test_triton.py

# the inner loop, under half a minute: the CPU's bits, golden numbers on every backend, errors, the README
quick: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/test_bits.py tests/test_divergence.py tests/test_errors.py tests/test_readme.py \
		tests/test_cuda.py -k "not test_cuda or golden"

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# calls of the public surface drawn at random against the oracle, with the time that is left; SEED=1 draws others
SEED ?= 0
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(SEED) 50000

# the CUDA kernels on host threads: every combination, and under sanitizers
simt: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow" tests/test_cuda.py

# the Triton kernels compiled for every target in every specialisation: hours on two cores, an exit status
aot: .venv/installed
	TRITON_INTERPRET=0 $(BIN)/python benchmarks/aot.py --all --check

# what is brought to a machine with a GPU for minutes and no network (benchmarks/gpu/README.md): needs nvcc and Python 3.12, gigabytes the first time
gpu-pack:
	$(PYTHON) -m benchmarks.gpu.pack

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build .gpu .venv-gpu .venv-oldest .venv-trainers kdkernels/_cpu.so kdkernels/_cuda.so kdkernels/_build.txt .venv/installed
