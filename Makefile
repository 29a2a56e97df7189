# Everything runs from a virtual environment in .venv; a stamp file in it stands for each finished installation,
# so only the first run, or a changed pyproject.toml, installs anything.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Engines live in environments of their own; their installers leave what is complete as it is.
ENGINES ?= .engines
# How many bytes each fuzz target is given, and the most seconds that may take.
FUZZ_BYTES ?= 10000000
FUZZ_SECONDS ?= 1800
# How long the cluster of real processes is in trouble, and from which seed (none: another one each time).
MINUTES ?= 10
SEED ?=
# How many seeds are simulated.
SEEDS ?= 1000
# Tests wait for processes and sockets more than for the CPU.
WORKERS ?= 3
# Errors only: the rest of what pip says is noise here. It begins anew after a download that broke off.
PIP := bash scripts/again.sh $(BIN)/python -m pip --disable-pip-version-check -qq
CREATED := $(VENV)/.stamp-created
BENCH := $(VENV)/.stamp-bench
TEST := $(VENV)/.stamp-test
NATIVE := $(VENV)/.stamp-native
PEERS_READY := $(VENV)/.stamp-peers
# As in pyproject.toml, but without the torch that it asks for and does not import.
NIXL := nixl-cu12>=1.5.1,<1.6
# Other caches, each in an environment of its own, made by the benchmark itself.
PEERS ?= .peers

.DEFAULT_GOAL := help
# One environment: two installations at once would break each other, so `make -j` runs one target at a time too.
.NOTPARALLEL:
.PHONY: help demo native test check fuzz simulate faults soak engines test-engines test-engines-full \
	test-engines-cluster bench-peers

help:
	@echo "make demo    install, then run the main job: mmcache bench media"
	@echo "make native  install, with mmcache-native, the optional C extension"
	@echo "make test    install (Node too, for its client), then run check and all tests with coverage"
	@echo "make check   install, then run ruff, mypy and the import contracts"
	@echo "make fuzz    install, then give every fuzz target FUZZ_BYTES=10000000 bytes"
	@echo "make simulate    install, then simulate clusters from SEEDS=1000 seeds"
	@echo "make faults  install, then break a cluster of real processes in every way for MINUTES=10 (SEED=N: the same way again)"
	@echo "make soak    install, then run eight clients against a server for five minutes, then 10,000 connections"
	@echo "make bench-peers   install other caches into .peers, then measure them and mmcache (a quarter of an hour; QUICK=1: minutes)"
	@echo "make test-engines        install the real vLLM and SGLang (CPU) into .engines, then run the engine suites"
	@echo "make test-engines-full   the same, with every case (half an hour)"
	@echo "make test-engines-cluster   the quick ones before three servers and a real Redis (QUICK=1: a part of them, minutes)"
	@echo "PYTHON=...   the Python to build .venv with (default: python3; 3.11 or newer)"

demo: $(BENCH)
	$(BIN)/mmcache bench media

check: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

native: $(NATIVE)

test: check $(NATIVE)
	bash tests/clients/install-node.sh
	bash tests/install-redis.sh
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not alone" --cov --cov-report=term
	$(BIN)/python -m pytest -m alone

fuzz: $(TEST)
	$(BIN)/python -m tests.fuzz --bytes $(FUZZ_BYTES) --seconds $(FUZZ_SECONDS)

simulate: $(BENCH)
	$(BIN)/python -m mmcache.testing.simulator --seeds $(SEEDS) $(ARGS)

# Tests' own servers and checks need what tests need.
faults: $(TEST)
	bash tests/install-redis.sh
	bash tests/install-iproute2.sh
	$(BIN)/python -m tests.faults --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

soak: $(BENCH)
	$(BIN)/python benchmarks/soak.py --minutes 5 --connects 10000

bench-peers: $(PEERS_READY) $(NATIVE)
	$(BIN)/python -m benchmarks.peers --environments $(PEERS) $(if $(QUICK),--quick) $(ARGS)

$(CREATED):
	@command -v $(PYTHON) >/dev/null || \
	    { echo "error: no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python"; exit 1; }
	@case "$$($(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>&1)" in \
	    True) ;; \
	    False) echo "error: $$($(PYTHON) -V) is too old; name Python 3.11 or newer: make PYTHON=/path/to/python"; exit 1;; \
	    *) echo "error: $(PYTHON) is no working Python; name Python 3.11 or newer: make PYTHON=/path/to/python"; exit 1;; \
	esac
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(BENCH): $(CREATED) pyproject.toml mmcache/_version.py
	@echo "installing mmcache[bench] into $(VENV): about half a minute"
	@$(PIP) install --editable '.[bench]'
	@touch $@

$(PEERS_READY): $(BENCH)
	@$(PIP) install --editable '.[bench,grpc]'
	@$(PIP) install --no-deps '$(NIXL)' || echo "mmcache-nixl is not measured: no wheel of NIXL for this Python" >&2
	@touch $@

# Brings torch and NIXL, which the tests use and mmcache does not need.
$(TEST): $(BENCH)
	@echo "installing mmcache[test] into $(VENV): minutes where torch has to be downloaded"
	@$(PIP) install --editable '.[test]'
	@touch $@

$(NATIVE): $(CREATED) $(wildcard kernels/native/src/* kernels/native/pyproject.toml kernels/native/install.sh)
	@bash kernels/native/install.sh $(abspath $(BIN))/python
	@! $(BIN)/python -c 'import mmcache_native' 2>/dev/null || touch $@

engines:
	bash tests/engines/install-vllm.sh $(ENGINES)/vllm
	bash tests/engines/install-sglang.sh $(ENGINES)/sglang

# Each suite alone leaves cores idle, while its engines start.
SIDE_BY_SIDE := $(ENGINES)/vllm/bin/python tests/engines/side_by_side.py
test-engines: engines
	$(SIDE_BY_SIDE) vllm '$(ENGINES)/vllm/bin/python -m pytest tests/engines/vllm -m "not full"' \
	    sglang '$(ENGINES)/sglang/bin/python -m pytest tests/engines/sglang -m "not full"'
	SGLANG_PYTHON=$(ENGINES)/sglang/bin/python $(ENGINES)/vllm/bin/python -m pytest tests/engines/cross -m "not full"

# Before a cluster of three servers that join a Redis (tests/engines/cache.py).
VLLM_CASES := $(addprefix tests/engines/vllm,$(if $(QUICK),/test_hits.py /test_encoder_cache.py,/))
SGLANG_CASES := $(addprefix tests/engines/sglang,$(if $(QUICK),/test_text.py,/))
test-engines-cluster: export MMCACHE_TEST_SHARDS = 3
test-engines-cluster: engines
	bash tests/install-redis.sh
	$(SIDE_BY_SIDE) vllm '$(ENGINES)/vllm/bin/python -m pytest $(VLLM_CASES) -m "not full"' \
	    sglang '$(ENGINES)/sglang/bin/python -m pytest $(SGLANG_CASES) -m "not full"'
	$(if $(QUICK),,SGLANG_PYTHON=$(ENGINES)/sglang/bin/python $(ENGINES)/vllm/bin/python -m pytest tests/engines/cross -m "not full")

test-engines-full: engines
	bash tests/engines/install-sglang.sh $(ENGINES)/sglang-diffusion tests/data/sglang-diffusion-cpu-0.5.23.txt
	$(ENGINES)/vllm/bin/python -m pytest tests/engines/vllm
	$(ENGINES)/sglang/bin/python -m pytest tests/engines/sglang
	$(ENGINES)/sglang-diffusion/bin/python -m pytest tests/engines/sglang_diffusion
	SGLANG_PYTHON=$(ENGINES)/sglang/bin/python $(ENGINES)/vllm/bin/python -m pytest tests/engines/cross
