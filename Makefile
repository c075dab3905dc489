# `make demo` and `make test` need only Python 3.10-3.12 (with venv), gcc, make and git; they set up .venv themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINED := $(PIP) install -q -c constraints.txt
export PYTHONUNBUFFERED = 1


WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/hvt_backbones/wheels
MMCV := onedl_mmcv-$(shell sed -n 's/^onedl-mmcv==//p' constraints.txt)
BUILT_FOR := import sysconfig, torch; print("torch", torch.__version__, sysconfig.get_platform(), sysconfig.get_config_var("SOABI"), sep="-")

# a process per core, each with one thread; a file's tests stay together, for they share what is costly, in the order of
# tests/conftest.py
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 25
# what needs the applications' packages; test-fast is of the library alone
APPLICATION_TESTS := tests/test_soak.py tests/classification tests/npu tests/openmmlab tests/detection tests/segmentation tests/video

.PHONY: install install-all demo test test-core test-fast test-lowest soak lint format clean

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
# operators, silently. What was compiled is kept outside of the clone, by the versions that it was compiled for, for the
# next one (remove the folder to compile anew). The others go without their dependencies, one of which would replace numpy and OpenCV.
$(VENV)/.installed-all: $(VENV)/.installed
	$(CONSTRAINED) ninja packaging
	folder=$(WHEELS)/$$($(BIN)/python -c '$(BUILT_FOR)') && \
		{ ls $$folder/$(MMCV)-*.whl > /dev/null 2>&1 || MAX_JOBS=$$(nproc) $(PIP) wheel -q -c constraints.txt \
			--no-cache-dir --no-build-isolation --no-deps -w $$folder onedl-mmcv; } && \
		$(PIP) install -q --no-deps $$folder/$(MMCV)-*.whl
	$(CONSTRAINED) --no-deps onedl-mmengine onedl-mmdetection onedl-mmsegmentation mmaction2 ./stubs/imgaug
	$(CONSTRAINED) numpy opencv-python-headless addict matplotlib pyyaml rich termcolor yapf packaging pillow scipy six \
		shapely terminaltables tqdm pycocotools ftfy regex prettytable einops importlib_metadata av \
		'decord; platform_machine == "x86_64"'
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

test: install-all $(VENV)/.torch_npu_sources
	$(PYTEST)

# every pipeline for long, on data with people's oddities: up to an hour, by hand
soak: install-all
	$(BIN)/python -m soak --out benchmarks/results/soak_cpu.txt

# the library and the trainer with the lowest versions that pyproject.toml allows, by hand. Left out: what needs
# packages of dev; huggingface_hub goes on with a cut file only lately; torch 2.6 leaves the import of
# sympy to us, and its threads have no names.
test-lowest: $(VENV)/.pip
	$(CONSTRAINED) uv
	$(BIN)/uv venv -q --clear --python $(BIN)/python $(VENV)-lowest
	$(BIN)/uv pip install -q --python $(VENV)-lowest --resolution lowest-direct \
		-e '.[classification]' 'pytest>=8' 'pytest-xdist>=3.7' 'hypothesis>=6.100'
	$(VENV)-lowest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow" \
		$(patsubst %,--ignore=%,$(filter-out tests/classification,$(APPLICATION_TESTS)) tests/clients \
		tests/classification/test_readers.py) \
		-k "not transformers and not huggingface- and not companion and not cut_connection and not costs and not no_thread"

# the library and the trainer, without OpenMMLab: no compiling
test-core: install
	$(PYTEST) $(patsubst %,--ignore=%,$(filter-out tests/classification,$(APPLICATION_TESTS)))

test-fast: install
	$(PYTEST) -m "not slow" $(APPLICATION_TESTS:%=--ignore=%)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist outputs *.egg-info .pytest_cache .ruff_cache .hypothesis
