# Each target does all of its set-up, in a fresh clone too:
#
#   make demo     the library at work on handwritten digits
#   make test     the tests
#   make lint     formatting, lint and types
#   make wheel    a wheel in dist/, built as pip builds it for a user
#   make compat   wheels for every Python found, each tested (but for the slow tests) with a jax of
#                 its own
#   make clean    removes what the others made
#
# PYTHON=python3.12 chooses the Python. ARCHS=90-real compiles for one generation of GPUs, which is
# quicker. `make clean` after changing either.

PYTHON ?= python3
ARCHS ?=
PYTEST_ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint wheel compat clean
comma := ,

VENV := .venv/bin
BUILD := build/env/bin
SOURCES := $(wildcard CMakeLists.txt pyproject.toml README.md LICENSE) \
  $(shell find ffi jax_fp8 -type f -not -name '*.pyc')
CXX_FILES = $(shell find $(wildcard ffi tests benchmarks) -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
# With an NVIDIA driver on the machine, jax comes with its CUDA plugin.
GPU := $(if $(shell nvidia-smi -L 2>/dev/null),$(comma)cuda13)

demo: .venv/installed-demo
	$(VENV)/python examples/digits.py

test: .venv/installed-test
	$(VENV)/pytest $(PYTEST_ARGS)

lint: .venv/installed-lint
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(VENV)/mypy
	$(VENV)/clang-format --dry-run -Werror $(CXX_FILES)

wheel:
	rm -rf build/pip
	$(PYTHON) -m venv build/pip
	build/pip/bin/pip install --quiet --upgrade pip
	build/pip/bin/pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist

# --- .venv ---------------------------------------------------------------------------------------

.venv/created:
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --upgrade pip
	touch $@

.venv/installed-lint: .venv/created pyproject.toml
	$(VENV)/pip install --quiet --group lint
	touch $@

.venv/installed-demo: EXTRAS := demo
.venv/installed-test: EXTRAS := test,demo,parity
.venv/installed-demo .venv/installed-test: .venv/created build/wheel/built
	wheel=$$(echo build/wheel/*.whl) && \
	  $(VENV)/pip install --quiet "$$wheel[$(EXTRAS)$(GPU)]" && \
	  $(VENV)/pip install --quiet --force-reinstall --no-deps "$$wheel"
	touch $@

# --- The wheel that .venv gets -------------------------------------------------------------------

# It is built without pip's isolation, by an environment that stays, in a folder that stays: only
# what has changed is compiled again.
build/wheel/built: build/env/created $(SOURCES)
	rm -rf build/wheel
	$(BUILD)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel \
	  --config-settings 'build-dir=build/{wheel_tag}' $(ARCHS:%=--config-settings 'cmake.define.CMAKE_CUDA_ARCHITECTURES=%') .
	touch $@

build/env/created: pyproject.toml
	rm -rf build/env
	$(PYTHON) -m venv build/env
	$(BUILD)/pip install --quiet --upgrade pip
	$(BUILD)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	  > build/env/requirements.txt
	$(BUILD)/pip install --quiet 'cmake<5' ninja --requirement build/env/requirements.txt
	touch $@

# --- make compat ---------------------------------------------------------------------------------

# The releases of jax at both ends and one between; a wheel for 3.11 and one for all from 3.12 on.
JAX_3.11 := jax==0.10.2
JAX_3.12 := jax==0.11.2
JAX_3.13 := jax
TAG_3.11 := cp311-cp311
TAG_3.12 := cp312-abi3
TAG_3.13 := cp312-abi3

# An interpreter counts if it runs: a name on PATH may have no Python behind it.
# LEAVE_OUT=3.11 leaves one out.
LEAVE_OUT ?=
FOUND = $(foreach v,$(filter-out $(LEAVE_OUT),3.11 3.12 3.13),$(if $(shell python$(v) -c 'print(1)' 2>/dev/null),$(v)))
MAX_WHEEL_BYTES := 20000000
# Gradients, fused products, decoders and programs over meshes or under vmap are tested with the
# releases of jax at both ends.
SELECTED_3.12 := not slow and not ends

compat: $(FOUND:%=compat-%)
	@test -n "$(FOUND)" || { echo "compat: no python3.11, 3.12 or 3.13 on PATH" >&2; exit 1; }
	@echo "compat: passed on Python $(FOUND)"

compat-3.11: build/compat/wheel-3.11
compat-3.12: build/compat/wheel-3.12
compat-3.13: build/compat/wheel-$(if $(filter 3.12,$(FOUND)),3.12,3.13)
compat-%:
	rm -rf build/compat/$*
	python$* -m venv build/compat/$*
	build/compat/$*/bin/pip install --quiet --upgrade pip
	wheel=$$(echo dist/*-$(TAG_$*)-*.whl) && build/compat/$*/bin/pip install --quiet "$$wheel[test,demo]" '$(JAX_$*)'
	build/compat/$*/bin/python -c 'import jax, platform; print("Python", platform.python_version(), "jax", jax.__version__)'
	build/compat/$*/bin/pytest $(PYTEST_ARGS) -m '$(or $(SELECTED_$*),not slow)'

build/compat/wheel-%: $(SOURCES)
	mkdir -p $(@D)
	rm -f dist/*-$(TAG_$*)-*.whl
	$(MAKE) wheel PYTHON=python$*
	size=$$(stat -c %s dist/*-$(TAG_$*)-*.whl) && echo "wheel for $(TAG_$*): $$size bytes" && test $$size -lt $(MAX_WHEEL_BYTES)
	touch $@
