# Commands for users and developers of the collection; `make` or `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
WORK ?= ckpt/nano
comma := ,
# MONAI Label's pins (numpy 1, pydicom 2) need an environment of their own.
VIEWER_VENV ?= .venv-monailabel
VIEWER_APP := bundles/vila_m3_with_experts/monailabel_app
# A folder of images, or the address of a DICOMweb server.
STUDIES ?= out/studies
# More of the start command, such as CONF="--conf device cuda:0".
CONF ?=
# A new bundle brings a new package, which the editable install must learn of.
PACKAGES := $(wildcard */*/__init__.py bundles/*/*/__init__.py)
# Two threads are as fast as many for the nano models, and leave the machine usable.
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo serve monailabel monailabel-venv train-nano evaluate-nano ablations test test-slow check format zips bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.packages  ## create .venv with pinned requirements and the packages of this checkout

$(VENV)/.requirements: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

$(VENV)/.packages: $(VENV)/.requirements pyproject.toml setup.py $(PACKAGES)
	$(BIN)/python -m pip install --no-deps --editable .
	@touch $@

demo: venv  ## ask the nano model about synthetic images; writes a report
	$(BIN)/python -m vila_m3_composite.demo

serve: PORT ?= 8080
serve: venv  ## start the OpenAI-compatible service and the chat page on 127.0.0.1:8080; PORT= for another port
	$(BIN)/python -m monai.bundle run --port $(PORT) \
	    --config_file "['bundles/vila_m3_with_experts/configs/inference.json','bundles/vila_m3_with_experts/configs/serve.json']"

train-nano: venv  ## train the nano model from DATA= through all stages into WORK=; SMOKE=1 tries the chain on slices
	$(BIN)/python -m monai.bundle run --data $(abspath $(DATA)) --work $(abspath $(WORK)) --config_file \
	    "['bundles/vila_m3_with_experts/configs/train_nano.json'$(if $(SMOKE),$(comma)'bundles/vila_m3_with_experts/configs/train_nano_smoke.json')]"

evaluate-nano: venv  ## measure the trained nano model of WORK= on the test sets, triggers and phantoms
	$(BIN)/python -m monai.bundle run --config_file bundles/vila_m3_with_experts/configs/evaluate_nano.json \
	    --data $(abspath $(DATA)) --trained $(abspath $(WORK))

ablations: venv  ## train and measure variants of nano, three seeds each, after train-nano and evaluate-nano
	$(BIN)/python -m monai.bundle run --config_file bundles/vila_m3_with_experts/configs/ablations.json \
	    --data $(abspath $(DATA)) --trained $(abspath $(WORK)) --evaluated $(abspath $(WORK))/evaluation --work $(abspath $(WORK))/ablations

monailabel-venv: $(VIEWER_VENV)/.packages  ## create the environment of MONAI Label, .venv-monailabel

$(VIEWER_VENV)/.requirements: $(VIEWER_APP)/requirements.txt
	@test -x $(VIEWER_VENV)/bin/python || $(PYTHON) -m venv $(VIEWER_VENV)
	$(VIEWER_VENV)/bin/python -m pip install --no-deps -r $<
	@touch $@

$(VIEWER_VENV)/.packages: $(VIEWER_VENV)/.requirements pyproject.toml setup.py $(PACKAGES)
	$(VIEWER_VENV)/bin/python -m pip install --no-deps --editable .
	@touch $@

monailabel: PORT ?= 8000
monailabel: monailabel-venv  ## start MONAI Label on 127.0.0.1:8000 with phantom studies; PORT= and STUDIES= for others
	@case "$(STUDIES)" in http*) ;; *) test -e "$(STUDIES)" || \
	    $(VIEWER_VENV)/bin/python -m vila_m3_composite.viewer.studies "$(STUDIES)";; esac
	MONAI_LABEL_AUTO_UPDATE_SCORING=$${MONAI_LABEL_AUTO_UPDATE_SCORING:-false} \
	$(VIEWER_VENV)/bin/python -m monailabel.main start_server --app $(VIEWER_APP) --studies "$(STUDIES)" \
	    --host 127.0.0.1 --port $(PORT) $(CONF)

test: venv  ## run the tests, without the slow ones
	$(BIN)/python -m pytest

test-slow: venv  ## run the slow tests only
	$(BIN)/python -m pytest -m slow

check: venv  ## lint, format check and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

zips: venv  ## pack every bundle into dist/, the Model Zoo way
	$(BIN)/python -m vila_m3_common.package --output dist

bench: venv  ## measure time and memory of the bundles
	$(BIN)/python -m pytest -m bench -s

clean:  ## remove caches and dist/; .venv stays
	rm -rf dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +
