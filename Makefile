# What a user and a developer type.  Everything lives in .venv, data and runs of this checkout.
#
#   make demo    install, write a small data set, convert it, train on it, evaluate      (CUDA=cuda12 for CUDA 12)
#   make test    install what the tests need and run them all                            (ARGS="-k views" for some)
#   make check   linters, types, import directions, spelling: what pre-commit and CI run
#   make dev     install for development
#   make bench   time the steps of a recipe                                              (RECIPE=… STEPS=…)
#   make prove   long proofs: shards killed and damaged, images damaged, training killed, two nodes in network
#                namespaces (as root); losses and step times against another commit    (BASE=… RECIPE=…)
#   make fashion_mnist   PL-MAE and MAE on Fashion-MNIST, side by side       (FASHION_MNIST=folder of the idx files)
#   make stamps  pack 802 labelled photographs and drawings for configs/stamps_*.yaml    (STAMPS=folder of the images)
#   make clean   remove the demo's data and run, builds and caches; .venv and other runs stay

PYTHON ?= python3
CUDA ?= cuda13
ARGS ?=
BASE ?= HEAD
RECIPE ?= configs/demo.yaml
STEPS ?= 60
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist
STAMPS ?= /usr/share/tuxpaint/stamps

BIN := .venv/bin
RUNTIME := .venv/.installed-$(CUDA)
DEV := .venv/.installed-$(CUDA)-dev
TESTED := .venv/.installed-$(CUDA)-tested
DIGITS := data/digits
SHARDS := data/digits_shards

.DELETE_ON_ERROR:
.PHONY: demo fashion_mnist stamps dev test check lint format types imports spelling bench prove clean

# --------------------------------------------------------------------------------------------------- installation

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	    echo "make: Maestri needs Python 3.11, 3.12 or 3.13, not $$($(PYTHON) --version 2>/dev/null || echo '$(PYTHON)');" \
	         "name one by make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

$(RUNTIME): pyproject.toml setup.py | $(BIN)/python
	@echo "Installing into .venv; the libraries are several gigabytes."
	@$(BIN)/python -m pip install --quiet --editable '.[$(CUDA)]'
	@touch $@

$(DEV): pyproject.toml setup.py | $(BIN)/python
	@echo "Installing into .venv; the libraries are several gigabytes."
	@$(BIN)/python -m pip install --quiet --editable '.[$(CUDA),dev]'
	@touch $@ $(RUNTIME)

# ffcv comes as source and is built here; the tests let it read what we write.
$(TESTED): $(DEV)
	@pkg-config --exists libturbojpeg opencv4 || { \
	    echo "make: the tests need ffcv, and building it some libraries; on Debian or Ubuntu:" \
	         "apt-get install g++ python3-dev pkg-config libturbojpeg0-dev libopencv-dev" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --editable '.[ffcv]'
	@touch $@

dev: $(DEV)
	@$(BIN)/python tools/typing_tree.py
	@echo "Ready.  '$(BIN)/pre-commit install' runs the checks before each commit."

# ----------------------------------------------------------------------------------------------------------- demo

$(DIGITS): | $(RUNTIME)
	@$(BIN)/python tools/write_digits.py $@

$(SHARDS)/%/manifest.json: | $(DIGITS)
	@$(BIN)/maestri shards convert $(DIGITS)/$* $(@D)

demo: $(RUNTIME) $(SHARDS)/train/manifest.json $(SHARDS)/test/manifest.json
	@$(BIN)/python train.py configs/demo.yaml
	@echo "The run is in runs/demo: summary.json has the figures, views.png what the model saw," \
	    "curves.png losses and accuracy."

# ------------------------------------------------------------------------------------------------- Fashion-MNIST

data/fashion_mnist/train/manifest.json data/fashion_mnist/test/manifest.json: | $(RUNTIME)
	@$(BIN)/maestri shards convert \
	    $(FASHION_MNIST)/$(if $(findstring train,$@),train,t10k)-images-idx3-ubyte.gz $(@D)

fashion_mnist: $(RUNTIME) data/fashion_mnist/train/manifest.json data/fashion_mnist/test/manifest.json
	@$(BIN)/python train.py configs/fashion_mnist_plmae.yaml
	@$(BIN)/python train.py configs/fashion_mnist_mae.yaml
	@$(BIN)/python benchmarks/compare_runs.py runs/fashion_mnist_plmae runs/fashion_mnist_mae

# ---------------------------------------------------------------------------------- labelled photographs and drawings

data/stamps/manifest.json: | $(RUNTIME)
	@$(BIN)/maestri shards convert $(STAMPS) $(@D)

stamps: data/stamps/manifest.json

# ---------------------------------------------------------------------------------------------- tests and checks

test: $(TESTED)
	@$(BIN)/python tools/typing_tree.py
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	    --durations 20 --durations-min 10 $(ARGS)

check: lint format types imports spelling

lint: $(DEV)
	@$(BIN)/ruff check .

format: $(DEV)
	@$(BIN)/ruff format --check .

types: $(DEV)
	@$(BIN)/python tools/typing_tree.py
	@$(BIN)/mypy .typing/maestri train.py tools

imports: $(DEV)
	@$(BIN)/python tools/typing_tree.py
	@PYTHONPATH=.typing $(BIN)/lint-imports --no-logo

spelling: $(DEV)
	@$(BIN)/codespell

# ------------------------------------------------------------------------------------------------- measured claims

bench: $(DEV)
	@$(BIN)/python tools/prove.py $(RECIPE) --steps $(STEPS)

prove: $(DEV)
	@$(BIN)/python tools/prove_shards.py
	@$(BIN)/python tools/prove_training.py
	@$(BIN)/python tools/rehearse_nodes.py
	@$(BIN)/python tools/rehearse_nodes.py --launcher deepspeed
	@$(BIN)/python tools/rehearse_nodes.py --proof cable
	@$(BIN)/python tools/fuzz_data_path.py
	@$(BIN)/python tools/prove.py $(RECIPE) --steps $(STEPS) --base $(BASE)

clean:
	rm -rf build dist *.egg-info .typing .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf $(DIGITS) $(SHARDS) runs/demo
	find . -path ./.venv -prune -o -type d -name __pycache__ -print | xargs rm -rf
