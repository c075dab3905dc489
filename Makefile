# `make demo` and `make test` need only Python 3.10-3.13 (with venv), gcc, make and git; they set up .venv themselves.
PYTHON ?= python3
OLDEST ?= python3.10
NEWEST ?= python3.13
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := constraints.txt
CONSTRAINED := $(PIP) install -q $(CONSTRAINTS:%=-c %)
EXTRAS := classification,dev
export PYTHONUNBUFFERED = 1

WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/hvt_backbones/wheels
MMCV := onedl_mmcv-$(shell sed -n 's/^onedl-mmcv==//p' constraints.txt)
BUILT_FOR := import sysconfig, torch; print("torch", torch.__version__, sysconfig.get_platform(), sysconfig.get_config_var("SOABI"), sep="-")

# a process per core, each with one thread; a file's tests stay together, for they share what is costly, in the order of
# tests/conftest.py; where a process dies the run ends and names the test: replaced, it leaves pytest-xdist waiting
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder \
	--durations 25
# what needs the applications' packages; test-fast is of the library alone
APPLICATION_TESTS := tests/test_soak.py tests/classification tests/npu tests/openmmlab tests/detection tests/segmentation tests/video

.PHONY: install install-all demo test test-core test-fast test-versions test-oldest test-newest soak lint format clean

install: $(VENV)/.installed

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null || \
		{ echo "error: $(PYTHON) is no Python from 3.10 to 3.13: name one with PYTHON= (of test-versions OLDEST=, NEWEST=)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -U pip
	$(CONSTRAINED) -U setuptools wheel
	touch $@

$(VENV)/.installed: $(VENV)/.pip pyproject.toml setup.py constraints.txt
	@echo "installing hvt_backbones into $(VENV) (the first time takes some minutes: PyTorch is large)"
	$(CONSTRAINED) torch torchvision numpy
	$(CONSTRAINED) -e '.[$(EXTRAS)]'
	touch $@

install-all: $(VENV)/.installed-all

# onedl-mmcv is compiled against the installed torch: with build isolation it would see none and build without its
# operators, silently. Without symbols for a debugger, which Python's own flags ask for, it takes about half the time.
# What was compiled is kept outside of the clone, by the versions that it was compiled for, for the next one (remove the
# folder to compile anew). The others go without their dependencies, one of which would replace numpy and OpenCV.
$(VENV)/.installed-all: $(VENV)/.installed
	$(CONSTRAINED) ninja packaging
	folder=$(WHEELS)/$$($(BIN)/python -c '$(BUILT_FOR)') && \
		{ ls $$folder/$(MMCV)-*.whl > /dev/null 2>&1 || MAX_JOBS=$$(nproc) CFLAGS=-g0 CXXFLAGS=-g0 $(PIP) wheel -q -c constraints.txt \
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

# the quick tests of the library and the trainer on the oldest and the newest pair of Python and PyTorch, each in an
# environment of its own, by hand: the lowest versions that pyproject.toml allows, and the newest that install
test-versions: test-oldest test-newest

# left out: what needs packages of dev; huggingface_hub goes on with a cut file only lately; torch 2.6 leaves the import
# of sympy to us, and its threads have no names
test-oldest: export PYTEST_ADDOPTS = -m "not slow" --ignore=tests/clients --ignore=tests/classification/test_readers.py \
	-k "not transformers and not huggingface- and not companion and not cut_connection and not costs and not no_thread"
test-oldest:
	mkdir -p $(VENV)-oldest
	sed -n 's/^ *"\([^"]*\)>=\([^"]*\)",$$/\1==\2/p' pyproject.toml > $(VENV)-oldest/lowest.txt
	$(MAKE) test-core VENV=$(VENV)-oldest PYTHON=$(OLDEST) CONSTRAINTS=$(VENV)-oldest/lowest.txt EXTRAS=classification,test

test-newest: export PYTEST_ADDOPTS = -m "not slow"
test-newest:
	$(MAKE) test-core VENV=$(VENV)-newest PYTHON=$(NEWEST) CONSTRAINTS=

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
