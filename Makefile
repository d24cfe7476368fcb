# make install   a virtual environment in .venv with everything in it
# make demo      fine-tune a small model through a service of your own
# make cookbook  run every recipe and write one page of what came out
# make test      lint, types and tests
# make test-versions, test-vllm, compatibility, fuzz: other SDKs and clients, vLLM; see below
# make bench-train, bench-gpu, bench-service, bench-sample, bench-agree, bench-scale, bench-hold, bench-control, bench-load, bench-abuse,
# chaos, proto, lint, gpu-check, base: see below

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.PHONY: install demo cookbook test test-versions test-cookbook test-vllm fuzz compatibility lint
.PHONY: bench-train bench-gpu bench-service bench-sample bench-agree bench-scale bench-hold bench-control bench-load bench-abuse chaos proto gpu-check base

# Which Python makes the environment: the first that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Where pip finds PyTorch without CUDA, if not where it finds the rest (docs/decisions/0003-installing-torch.md).
TORCH_INDEX ?=
TORCH := $(shell sed -n 's/^ *"\(torch[><=].*\)",$$/\1/p' pyproject.toml)

# Which torch pip would take, from the index pages alone: a --dry-run may download every wheel to read it.
FINDS_CPU_TORCH := { .venv/bin/pip index versions torch 2>/dev/null || true; } | .venv/bin/python -c "$$CHOSEN_IS_CPU" '$(TORCH)'
define CHOSEN_IS_CPU
import sys
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version
allowed = Requirement(sys.argv[1]).specifier
listed = sys.stdin.read().partition("Available versions: ")[2].split("\n")[0]
found = [v for v in map(Version, listed.split(", ")) if v in allowed] if listed else []
sys.exit(bool(found) and max(found).local != "cpu")
endef
export CHOSEN_IS_CPU

PIP := .venv/bin/python -m pip --disable-pip-version-check install -qq
WIRE := client/tinsmith/wire

install: .venv/.installed

.venv/.installed: pyproject.toml
	[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is missing (Debian, Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=…"; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	[ -x .venv/bin/pip ] || $(PYTHON) -m venv .venv
	if [ -n "$(TORCH_INDEX)" ]; then
		$(PIP) --index-url "$(TORCH_INDEX)" "$(TORCH)"
	elif [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && ! $(FINDS_CPU_TORCH); then
		echo "Stopped: this machine has no NVIDIA GPU, yet pip would download PyTorch for CUDA (gigabytes). Give the address of PyTorch's CPU index, which PyTorch's install page names: make install TORCH_INDEX=https://…"
		exit 1
	fi
	echo "Installing into .venv; the first time this takes a few minutes"
	$(PIP) -e '.[api,worker,fleet,cookbook,dev]'
	touch $@

demo: install
	.venv/bin/python -m tinsmith_cookbook.demo

# Every recipe at its short setting, compared with what must come out: runs/cookbook/index.html (ARGS="--only sft dpo").
cookbook: install
	.venv/bin/python -m tinsmith_cookbook.book $(ARGS)

# Two processes share the tests, whatever else there is: each starts services of several processes (ARGS="-n 0": one).
test: install lint
	.venv/bin/python -m pytest -n 2 --no-loadscope-reorder $(ARGS)

# Every supported version of the official SDK, each in an environment of its own. Those are built the first time, in
# $TINSMITH_TEST_CACHE or ~/.cache/tinsmith (2 GB); a version is a line of tests/versions/environments.py.
test-versions: install
	.venv/bin/python -m pytest tests/versions/matrix.py $(ARGS)

# The official cookbook as it is: supervised training and reinforcement learning, offline.
test-cookbook: install
	.venv/bin/python -m pytest tests/versions/cookbook.py $(ARGS)

# vLLM as it is, for CPUs, sampling for workers (3.5 GB, built the first time).
test-vllm: install
	.venv/bin/python -m pytest tests/versions/vllm.py tests/versions/vllm_pool.py $(ARGS)

# 5,000 examples of what the OpenAPI document allows.
fuzz: install
	TINSMITH_FUZZ_EXAMPLES=5000 .venv/bin/python -m pytest tests/e2e/test_openapi.py $(ARGS)

# The same versions, and docs/compatibility.md written anew from what came of it.
compatibility: install
	rm -f docs/compatibility.json
	TINSMITH_RECORD_COMPATIBILITY=1 .venv/bin/python -m pytest tests/versions/matrix.py

lint: install
	.venv/bin/ruff check -q .
	.venv/bin/ruff format -q --check . || { .venv/bin/ruff format --check . | head -20; exit 1; }
	.venv/bin/mypy --no-error-summary

# Whole training steps of the engine and of transformers + PEFT (ARGS="--parts tenants,profile"). On a CUDA machine
# with PyTorch, transformers and peft but nothing of ours: PYTHONPATH=client:api:worker python3 tests/benchmarks/train.py
bench-train: install
	.venv/bin/python tests/benchmarks/train.py $(ARGS)

# Parts of the two benchmarks of training, each a command of nine minutes at most (PARTS="small mixture"), on a CUDA
# machine with PyTorch, transformers and peft; the last one needs what the service needs as well.
PARTS ?= memory,deterministic small mixture service
bench-gpu:
	export PYTHONPATH=.:client:api:worker
	for parts in $(PARTS); do
		case $$parts in
			service) run="-m tests.benchmarks.service --shape 8B --cases one,many" ;;
			*) run="tests/benchmarks/train.py --parts $$parts --seconds 3 --limit 500" ;;
		esac
		timeout 540 python3 $$run --to bench-$$parts.json || echo "$$parts: not all of it, see bench-$$parts.json"
	done

# The sampler beside transformers' generate (ARGS="--parts beside,decode"). On a CUDA machine with nothing of ours
# installed: PYTHONPATH=client:api:worker python3 tests/benchmarks/sample.py
bench-sample: install
	.venv/bin/python tests/benchmarks/sample.py $(ARGS)

# The sampler's logprobs beside the trainer's.
bench-agree: install
	.venv/bin/python tests/benchmarks/agree.py $(ARGS)

# Training through the service, beside the engine alone (ARGS="--cases one --steps 20").
bench-service: install
	.venv/bin/python -m tests.benchmarks.service $(ARGS)

# One worker on several GPUs against one of them; on any machine a rehearsal of it (ARGS="--tiny").
bench-scale: install
	.venv/bin/python tests/benchmarks/scale.py $(ARGS)

# A base whole, in four bits, and in parts off the GPU; on any machine a rehearsal of it (ARGS="--shape tiny").
bench-hold: install
	.venv/bin/python tests/benchmarks/hold.py $(ARGS)

# The control plane alone: a service with an engine that computes nothing.
bench-control: install
	.venv/bin/python -m tests.benchmarks.control $(ARGS)

# Kill everything again and again while tenants train; minutes (ARGS="--points 100 --seed 1").
chaos: install
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.chaos.harness $(ARGS)

# 200 clients on a fleet whose engine computes nothing (ARGS="--seconds 600").
bench-load: install
	.venv/bin/python -m tests.benchmarks.load $(ARGS)

# What a tenant that misbehaves costs the others, and the memory it takes (ARGS="--seconds 20 --rounds 3").
bench-abuse: install
	.venv/bin/python -m tests.benchmarks.abuse $(ARGS)

# Generate the codec from its schema.
proto: install
	.venv/bin/python -m grpc_tools.protoc -I $(WIRE) --python_out=$(WIRE) --pyi_out=$(WIRE) tinsmith.proto

# On a CUDA machine with PyTorch and transformers, nothing installed.
gpu-check:
	PYTHONPATH=client:api:worker python3 tests/worker/gpu_check.py

# Train the built-in base model anew, into build/base: two minutes of such a machine, hours of a CPU.
base:
	PYTHONPATH=client:api:worker python3 -m tinsmith_worker.tiny_base.train $(ARGS)
