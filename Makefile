# Everything a person types. `make help` lists it; docs/ explains it.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup lab lab-down lint test test-unit test-ocr test-lab test-vm test-long test-gpu test-gpu-inputs bench

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## the controller's environment in .venv (a no-op when nothing changed)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; fix: make PYTHON=python3.12 ...")'
	@$(PYTHON) scripts/setup.py

lab: ## boot three lab hosts, provision them with site.yml, verify them, ask the model a question
	@$(PYTHON) -m lab check
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python scripts/make_lab.py

lab-down: ## remove every host, mount, interface and nftables table the lab made
	@$(PYTHON) -m lab down

lint: setup ## ruff (rules and format), mypy, yamllint, ansible-lint, shellcheck
	@$(BIN)/python tests/run.py lint

test: setup ## the gate: lint, unit tests, a lab of its own, deploy tests
	@$(BIN)/python tests/run.py gate

test-unit: setup ## unit tests: no root, no network
	@$(BIN)/python tests/run.py unit

test-ocr: setup ## the OCR service with real Redis, PostgreSQL and Samba
	@$(BIN)/python tests/run.py ocr

test-lab: setup ## the lab part of the gate
	@$(BIN)/python tests/run.py lab

test-vm: setup ## the UEFI machine: firmware, boot loader, reboots, the second system
	@$(BIN)/python tests/run.py vm

test-long: setup ## what takes longer than the gate may; FROM=case resumes, ONLY=text selects
	@$(BIN)/python tests/run.py long $(if $(FROM),--from $(FROM)) $(if $(ONLY),--only $(ONLY))

test-gpu: ## build llama.cpp for the NVIDIA GPU of this machine and measure on it; no network (docs/gpu.md)
	@$(PYTHON) tests/run.py gpu

test-gpu-inputs: setup ## collect in build/gpu-inputs what test-gpu needs; GPU_PYTHON=3.12: that machine's Python
	@$(BIN)/python scripts/bench_gpu.py --prepare $(if $(GPU_PYTHON),--python $(GPU_PYTHON))

bench: setup ## benchmarks against the running lab, written to docs/benchmarks
	@$(BIN)/python scripts/bench.py
	@$(BIN)/python scripts/bench_gateway.py
	@$(BIN)/python scripts/bench_update.py
	@$(BIN)/python scripts/bench_local_claude.py

TRAIN := build/train-detector
DETECTOR := apps/ocr_pipeline/src/ocr_pipeline/data/plates
train-detector: ## the plate detector, anew: an environment with torch for the CPU, synthetic photos, ONNX
	@test -x $(TRAIN)/bin/python || $(PYTHON) -m venv $(TRAIN)
	@$(TRAIN)/bin/pip install -q torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6 pillow==13.0.0 \
	  opencv-python-headless==5.0.0.93 onnxruntime==1.32.0 PyYAML==6.0.3 pydantic==2.14.3
	@PYTHONPATH=apps/ocr_pipeline/src $(TRAIN)/bin/python scripts/train_detector.py \
	  --out $(DETECTOR).onnx --metrics $(DETECTOR).json
