# make demo   set up, then find and explain the digits of a shipped scene
# make test   set up, then run the tests (ten minutes on two cores)
# make test-quick   those that take less than half a second each, for the inner loop (under 90 seconds)
# make test-all     everything: exhaustive grids, every package, whole models
# make lint   formatting, style, types
# make bench  the measurements of the README and the docs (half an hour; on a quiet machine)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The development set-up pins torch; the library itself asks for torch>=2.10 only.
TORCH := torch==2.13.0
BUILD_TOOLS := scikit-build-core cmake ninja pathspec
LIBRARY_SOURCES := $(wildcard $(shell git ls-files -co --exclude-standard src csrc 2>/dev/null)) \
  CMakeLists.txt pyproject.toml LICENSE README.md

PYTEST := $(BIN)/python -m pytest -n 2

CXX_FILES := csrc/*.cpp csrc/*.h csrc/*.inl csrc/simd/*.inl tests/native/*.cpp tests/native/*.h

.PHONY: demo test test-quick test-all lint format bench install clean

demo: $(VENV)/.installed
	$(BIN)/saccade detect examples/digit_scenes/scenes/scene_0.png --out saccade-out

test: $(VENV)/.installed $(VENV)/.packages
	$(PYTEST) --cov=saccade --cov-report=term

test-quick: $(VENV)/.installed $(VENV)/.packages
	$(PYTEST) -q -m "not slow"

test-all: $(VENV)/.installed $(VENV)/.packages
	SACCADE_TEST_ALL=1 $(PYTEST)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.installed $(VENV)/.packages
	$(BIN)/python -m benchmarks.cpu --plot docs/images/bench.png
	$(BIN)/python -m benchmarks.fused
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.packages
	$(BIN)/python -m benchmarks.sweep --plot docs/images/sweep.png
	$(BIN)/python -m benchmarks.onnx
	$(BIN)/python -m benchmarks.compile
	$(BIN)/python -m benchmarks.whole
	$(BIN)/python -m benchmarks.tables --write

install: $(VENV)/.installed

# Torch first and alone: what is installed after it must not pick another one. The library is built
# against that torch, hence without isolation.
$(VENV)/.dependencies: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Saccade needs Python 3.10 or newer"'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(TORCH) $(BUILD_TOOLS) \
	  $$($(BIN)/python .ci/requirements.py dev)
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(LIBRARY_SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	touch $@

# Other people's packages, which the tests run against the library: in a folder of their own, without
# their dependencies, which would bring another torch along.
$(VENV)/.packages: .ci/packages.txt $(VENV)/.dependencies
	rm -rf $(VENV)/packages
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/packages -r .ci/packages.txt || \
	  echo "packages of .ci/packages.txt could not be installed: their tests are skipped"
	touch $@

clean:
	rm -rf $(VENV) build saccade-out
