# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= auto
PEERS ?= .venv-peers
LLAMA_CMAKE ?= -DGGML_NATIVE=ON
KVPRESS ?= .venv-kvpress
WEIGHT_PEERS ?= .venv-weight-peers
PLACEMENT ?= .venv-placement

.PHONY: demo test test-slow test-oldest test-environments check bench bench-peers weight-peers placement docs aot quality quality-weights quality-cache methods methods-peers fuzz \
	release-check clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

## Compile the shipped trained model, run it, measure it, show the report.
demo: $(READY)
	$(BIN)/einfold compile examples/tiny_llama -o build/demo --weights int4 --force
	@echo; echo '--- it writes:'
	$(BIN)/einfold run build/demo -p 'def read_lines(path):' --max-new-tokens 64
	@echo; echo '--- it remembers:'
	$(BIN)/einfold run build/demo --max-new-tokens 5 -p "$$(cat examples/pass_key.txt)"
	@echo; echo '--- what it cost:'
	$(BIN)/einfold eval build/demo --against examples/tiny_llama
	@echo; echo '--- what was done:'
	$(BIN)/einfold inspect build/demo

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

## The tests that are left out there, for their time.
test-slow: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

## The tests where torch, Triton and all else are as old as the package claims, and under every other Python that this
## machine has; says what was not run. Environments take gigabytes. ENVIRONMENTS: make test-oldest ENVIRONMENTS='-- tests/ir'
test-oldest: $(READY)
	$(BIN)/python .ci/environments.py oldest $(ENVIRONMENTS)

test-environments: $(READY)
	$(BIN)/python .ci/environments.py $(ENVIRONMENTS)

## Style, types, tests.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

## einfold beside Hugging Face and inductor, and onnxruntime-genai and llama.cpp after `make bench-peers`.
## BENCH takes options: make bench BENCH='--quick --minutes 10'
bench: $(READY)
	$(BIN)/python -m benchmarks.cpu_peers $(if $(wildcard $(PEERS)/.ready),--peers-python $(PEERS)/bin/python) $(BENCH)

## Peers of the benchmark, in an environment of their own. llama.cpp is built for this CPU: some minutes.
bench-peers: $(PEERS)/.ready

$(PEERS)/.ready: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	CMAKE_ARGS="$(LLAMA_CMAKE)" $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

## Placements under a memory budget beside baselines and CP-SAT's optimum, in an environment of its own: ortools wants an
## older protobuf. PLACES takes options: make placement PLACES='--cases 1B --json'
placement: $(PLACEMENT)/.ready
	$(PLACEMENT)/bin/python -m benchmarks.placement $(PLACES)

$(PLACEMENT)/.ready: benchmarks/requirements-placement.txt
	$(PYTHON) -m venv $(PLACEMENT)
	$(PLACEMENT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PLACEMENT)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[onnx]' -r $<
	touch $@

## Writes docs/attention.md, cli.md, recipe.md and api.md; tests check that the committed ones are current.
docs: $(READY)
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/attention_table.py

## What weights and caches cost on the toy and on a real model of 135M parameters, which is fetched from PyPI once:
## docs/quality.md. QUALITY takes options: make quality QUALITY=--no-again
quality quality-weights quality-cache: $(VENV)/.quality
	$(BIN)/python -m benchmarks.quality $(patsubst quality-%,%,$(patsubst quality,quick,$@)) $(QUALITY)
	$(BIN)/python -m benchmarks.methods --table

$(VENV)/.quality: benchmarks/requirements-quality.txt $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	touch $@

## Measures every method for the KV cache on the shipped model and writes docs/methods.md.
methods: $(READY)
	$(BIN)/python -m benchmarks.methods

## The same at equal budgets beside kvpress, in an environment of its own.
methods-peers: $(READY) $(KVPRESS)/.ready
	$(BIN)/python -m benchmarks.kvpress_peers --kvpress-python $(KVPRESS)/bin/python

$(KVPRESS)/.ready: benchmarks/requirements-kvpress.txt
	$(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(KVPRESS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

## What weights of other tools cost beside einfold's, in an environment of its own with llama.cpp's programs built (ten
## minutes): benchmarks/results/weight-peers.md. WEIGHTS takes options: make weight-peers WEIGHTS=--again
weight-peers: $(VENV)/.quality $(WEIGHT_PEERS)/.ready
	$(BIN)/python -m benchmarks.weight_peers --peers-python $(WEIGHT_PEERS)/bin/python \
		--tools $(WEIGHT_PEERS)/build/bin $(WEIGHTS)

$(WEIGHT_PEERS)/.ready: benchmarks/requirements-weight-peers.txt
	$(PYTHON) -m venv $(WEIGHT_PEERS)
	$(WEIGHT_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(WEIGHT_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(WEIGHT_PEERS)/bin/python -m pip download --quiet --no-deps --no-binary :all: \
		--dest $(WEIGHT_PEERS) llama-cpp-python==0.3.36
	tar xzf $(WEIGHT_PEERS)/llama_cpp_python-0.3.36.tar.gz -C $(WEIGHT_PEERS)
	cmake -S $(WEIGHT_PEERS)/llama_cpp_python-0.3.36/vendor/llama.cpp -B $(WEIGHT_PEERS)/build \
		-DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
	cmake --build $(WEIGHT_PEERS)/build -j2 --target llama-quantize llama-imatrix
	touch $@

## Compiles every kernel for sm_80, sm_90 and sm_100 with no GPU and writes benchmarks/results/aot.md.
aot: $(READY)
	$(BIN)/python -m benchmarks.aot

## Mutated artifacts, 5,000 of each target: some minutes each. FUZZ takes options: make fuzz FUZZ='--count 300'
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz.driver --target onnx $(FUZZ)
	$(BIN)/python -m tests.fuzz.driver --target reference $(FUZZ)
	$(BIN)/python -m tests.fuzz.driver --target triton $(FUZZ)

## Builds the sdist and the wheel of the last commit into dist/ and looks for what keeps them from being a release.
release-check: $(READY)
	$(BIN)/python .ci/release_check.py

clean:
	rm -rf build dist *.egg-info
