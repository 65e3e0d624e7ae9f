# From a fresh clone: `make pretrain` trains the sample model, `make test` runs what CI runs.

VENV := .venv
# After an install, compile byte code on all cores; pip would use one. Some packages hold files of
# other Python versions that do not compile, which is no error.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile
# A fifth of all is transformers' models, which nothing here imports.
COMPILE := $(VENV)/bin/python -m compileall -q -j 0 -x /transformers/models/ $(VENV)/lib >/dev/null 2>&1 || true
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# The repository root stays off sys.path: its kernels/ would shadow a package of that name.
export PYTHONSAFEPATH := 1

# The first Python >= 3.11 that can make a virtual environment; set PYTHON to choose another.
PYTHON ?= $(shell for python in python3.11 /usr/bin/python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$python; break; }; done)

.PHONY: install dev pretrain pretrain-3d test test-slow test-faults test-slurm slurm lint types style format gpu-check aot bench docs docs-site clean

install: $(VENV)/.installed
dev: install $(VENV)/.installed-dev

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv was found; install one or set PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py $(VENV)/bin/python
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --editable .
	$(COMPILE)
	touch $@

$(VENV)/.installed-dev: setup.py $(VENV)/.installed
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --editable '.[dev]'
	$(COMPILE)
	touch $@

data/tiny/tokenizer.json: | install
	megatron-mode prepare --sample --out data/tiny --vocab-size 2048 --valid-share 0.05

pretrain: install data/tiny/tokenizer.json
	deepspeed --num_gpus 1 launch/pretrain.py --config configs/run/tiny.yaml

pretrain-3d: install data/tiny/tokenizer.json
	deepspeed --num_gpus 8 launch/pretrain.py --config configs/run/tiny-3d.yaml

lint: dev
	@$(MAKE) --no-print-directory -j 2 types style

types:
	mypy

style:
	ruff check .
	ruff format --check .
	lint-imports
	pytest -q tests/project/test_unused.py

# For two cores: one process begins with the Slurm cluster, which mostly waits, two with the files
# that take longest. Each file stays in one process, which prepares what its tests share once.
test:
	@$(MAKE) --no-print-directory -j 2 dev slurm
	@$(MAKE) --no-print-directory lint
	pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" --durations 25

test-slow: dev
	pytest -m "slow and not gpu and not faults"

# Sixty kills at random moments and 500 flipped bytes, within 30 minutes; KILLS=200 does more.
test-faults: dev
	pytest -m faults -s --timeout 3600

# The shipped batch files under a real Slurm on this machine, in private namespaces; needs root.
test-slurm: dev slurm
	MEGATRON_MODE_REQUIRE_SLURM=1 pytest -m slurm tests/slurm --durations 0

# Install Debian's Slurm if root may: 12 s. Without it the tests that need it say so.
slurm:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v slurmctld && command -v munged; } >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		slurm-wlm munge iproute2 util-linux >/dev/null || echo "note: Slurm could not be installed" >&2; fi

# On a machine with a GPU, at most ten minutes: parity of the fused loss on all its cases, the
# benchmark against peers, a tiny bf16 pre-training with triton; a table of figures at the end.
gpu-check: dev
	@python -c "import sys, torch; torch.cuda.is_available() or sys.exit('error: torch sees no CUDA device; run make gpu-check on a machine with a GPU and a CUDA build of torch')"
	timeout --foreground 600 pytest -m gpu -s --timeout 400

# Compile the Triton kernels for sm_80, sm_90 and sm_100 and count registers and spills; no GPU.
aot: dev
	python -m megatron_mode.kernels.aot

# The fused loss against its peers, then tokens/s against a plain Hugging Face loop.
bench: dev data/tiny/tokenizer.json
	python -m megatron_mode.kernels.bench --dtype fp32
	python tests/bench/throughput.py --config configs/run/tiny.yaml
	python tests/bench/throughput.py --config configs/run/real-small.yaml --steps 8 data.root=data/tiny mix=tiny

format: dev
	ruff check --fix .
	ruff format .

# Renew the tables of keys in configs/README.md and of metrics in docs/look-at-a-model.md.
docs: install
	python docs/tables.py

# Render README and docs/ into site/; a link to nothing is an error.
docs-site: dev
	python -m pip install $(PIP_FLAGS) --editable '.[docs]'
	mkdocs build --strict

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
