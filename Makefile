# `make demo` and `make test` need only Python 3.10-3.12 (with venv), gcc, make and git; they set up .venv themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINED := $(PIP) install -q -c constraints.txt
export PYTHONUNBUFFERED = 1

OPENMMLAB_TESTS := tests/openmmlab tests/detection tests/segmentation

.PHONY: install install-all demo test test-fast test-openmmlab lint format clean

install: $(VENV)/.installed

$(VENV)/.pip:
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 12) else "Python 3.10 to 3.12 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -U pip
	$(CONSTRAINED) -U setuptools wheel
	touch $@

$(VENV)/.installed: $(VENV)/.pip pyproject.toml setup.py constraints.txt
	@echo "installing hvt_backbones into $(VENV) (the first time takes some minutes: PyTorch is large)"
	$(CONSTRAINED) torch torchvision numpy
	$(CONSTRAINED) -e '.[classification,dev]'
	touch $@

install-all: $(VENV)/.installed-all

# onedl-mmcv is compiled against the installed torch: with build isolation it would see none and build without its
# operators, silently. The others go without their dependencies, one of which would replace numpy and OpenCV.
$(VENV)/.installed-all: $(VENV)/.installed
	$(CONSTRAINED) ninja packaging
	MAX_JOBS=$$(nproc) $(CONSTRAINED) --no-build-isolation --no-deps onedl-mmcv
	$(CONSTRAINED) --no-deps onedl-mmengine onedl-mmdetection onedl-mmsegmentation mmaction2
	$(CONSTRAINED) numpy opencv-python-headless addict matplotlib pyyaml rich termcolor yapf packaging pillow scipy six \
		shapely terminaltables tqdm pycocotools ftfy regex prettytable einops decord importlib_metadata av
	$(BIN)/python -c 'import torch, mmcv._ext'
	touch $@

demo: install
	$(BIN)/python -m classification.demo

# Ascend's package as text for the tests to read, in a folder that Python does not search: torch loads torch_npu by
# itself wherever it can import it, and fails without CANN. One platform's files, to be the same on every machine.
$(VENV)/.torch_npu_sources: $(VENV)/.pip constraints.txt
	rm -rf $(VENV)/torch_npu_sources
	$(CONSTRAINED) --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 \
		--target $(VENV)/torch_npu_sources torch_npu
	touch $@

test: install $(VENV)/.torch_npu_sources
	$(BIN)/python -m pytest $(OPENMMLAB_TESTS:%=--ignore=%)

test-fast: install
	$(BIN)/python -m pytest -m "not slow" --ignore=tests/classification --ignore=tests/npu $(OPENMMLAB_TESTS:%=--ignore=%)

# detection and segmentation are being built: their tests need what `make install-all` compiles
test-openmmlab: install-all
	$(BIN)/python -m pytest $(OPENMMLAB_TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist outputs *.egg-info .pytest_cache .ruff_cache .hypothesis
