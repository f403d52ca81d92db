# make test   creates .venv, installs the library with what the tests need, and runs them
# make train  the same, then trains a small language model of sparse layers
#
# PYTHON=python3.12   the Python that .venv is created with
# VENV=path           another environment, which may exist already (its PyTorch, 2.9 or newer, is then used as it is)
# TORCH=torch==2.11   which PyTorch to install into an environment that has none
# PYTEST_ARGS=...     what is passed to pytest, e.g. "-k combine"
# TRAIN_ARGS=...      what is passed to examples/train.py, e.g. "--preset switch"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.9
PYTEST_ARGS ?= -n auto
TRAIN_ARGS ?=
# Which of pyproject.toml's extras are installed.
EXTRAS ?= build

PY := $(VENV)/bin/python
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'examples/*.cpp')

.PHONY: build test train wheel format lint clean

build: $(PY)
	$(PY) -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel "cmake>=3.24" ninja
	$(PY) setup.py --quiet build_ext --inplace
	$(PY) -m pip install --quiet --no-build-isolation -e ".[$(EXTRAS)]"

$(PY):
	$(PYTHON) -m venv $(VENV)

test: EXTRAS = test
test: build
	$(PY) -m pytest $(PYTEST_ARGS)

train: EXTRAS = examples
train: build
	$(PY) examples/train.py $(TRAIN_ARGS)

wheel: build
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

format: $(PY)
	$(PY) -m pip install --quiet $(FORMATTERS)
	@$(VENV)/bin/clang-format -i $(CXX_FILES)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

lint: $(PY)
	$(PY) -m pip install --quiet $(FORMATTERS)
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

# One place says which versions: the dev extra of pyproject.toml.
FORMATTERS = $(shell sed -n 's/^dev = .*\("ruff==[^"]*", "clang-format==[^"]*"\).*/\1/p' pyproject.toml | tr -d ,)

clean:
	rm -rf build dist scattermoe.egg-info scattermoe/lib scattermoe/include scattermoe/share scattermoe/_C*.so
