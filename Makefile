# Everything a newcomer needs. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
PAGE := .venv-page
PROTOS := $(wildcard proto/knnlm/v1/*.proto)
# tests and services are some hundred processes: each would compile the project again
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
.PHONY: help venv demo up down test test-all test-faults test-compose test-page test-clients test-cluster browser bench paper check format proto proto-check clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## create the environment in .venv, pinned by requirements.lock

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; this is " + sys.version.split()[0] + ". Name one: make PYTHON=/path/to/python3.12")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing what requirements.lock names (torch alone is some 200 MB)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

demo: $(STAMP) ## build two domains from text on this machine, start the three services, show what they do
	@$(BIN)/python -m demo.run

up: $(STAMP) ## start the services with what `make demo` built
	@$(BIN)/python -m demo.services up

down: ## stop the services
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m demo.services down; else echo "nothing is installed, so nothing runs"; fi

# three workers for two cores: each waits now and then, for a service it started or for the clock
test: $(STAMP) ## the tests: offline, on CPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not faults and not compose and not page and not clients and not cluster"

test-all: $(STAMP) ## the tests that take longer, too
	@HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -q -m "not faults and not compose and not page and not clients and not cluster"

test-faults: $(STAMP) ## overload, kills, full disks, fuzzing, leaks: some fifteen minutes, figures printed
	@HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -q -s -m faults tests/faults

test-compose: $(STAMP) ## docker-compose.yml on the Docker engine of this machine: replicas killed, added, switched under load
	@KNNLM_TEST_COMPOSE=1 $(BIN)/python -m pytest -q -s -m compose tests/compose

test-page: browser ## the web page in headless Chromium
	@PYTHONPATH=$(PAGE) $(BIN)/python -m pytest -q -m page tests/page

browser: $(PAGE)/.installed # Chromium and what drives it, installed where they are missing
	@PYTHONPATH=$(PAGE) bash tests/page/browser.sh $(BIN)/python

$(PAGE)/.installed: tests/page/requirements.txt | $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $(PAGE) -r tests/page/requirements.txt
	@touch $@

test-clients: $(STAMP) $(CLIENTS)/.installed ## clients of other makes against `knnlm serve`: lm-eval, openai (also for node), LangChain, LiteLLM
	@$(BIN)/python -m pytest -q -m clients tests/foreign

$(CLIENTS)/.installed: tests/foreign/requirements.txt tests/foreign/package.json
	@test -x $(CLIENTS)/bin/python || { echo "creating $(CLIENTS)"; $(PYTHON) -m venv $(CLIENTS); }
	@$(CLIENTS)/bin/python -m pip install --disable-pip-version-check -q --no-deps -r tests/foreign/requirements.txt
	@mkdir -p $(CLIENTS)/node && cp tests/foreign/package.json $(CLIENTS)/node/
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix $(CLIENTS)/node; fi
	@touch $@

test-cluster: $(VENV)/.cluster ## several Ray nodes on this machine: builds and searches while workers and nodes are killed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m cluster tests/cluster

$(VENV)/.cluster: tests/cluster/requirements.txt $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock -e '.[cluster]'
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r tests/cluster/requirements.txt
	@touch $@

bench: $(STAMP) ## every benchmark at the small size, one after another; ends with a JSON line per figure
	@$(BIN)/python -m benchmarks

paper: $(STAMP) ## the papers' tables and figures at a small size; ends with a page in build/paper; TEXT=FOLDER: of that text
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m experiments $(if $(TEXT),--text $(TEXT))

check: $(STAMP) proto-check ## style, types, layers, generated code
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(STAMP) ## put the code into the one format
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

proto: $(STAMP) ## generate knnlm/v1 from proto/
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. \
		--grpc_python_out=. --mypy_grpc_out=. $(PROTOS)
	@rm -f knnlm/v1/common_pb2_grpc.py knnlm/v1/common_pb2_grpc.pyi

proto-check: $(STAMP) # generated code must be what proto/ gives
	@rm -rf build/proto && mkdir -p build/proto
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=build/proto \
		--pyi_out=build/proto --grpc_python_out=build/proto --mypy_grpc_out=build/proto $(PROTOS)
	@rm -f build/proto/knnlm/v1/common_pb2_grpc.py* && cp knnlm/v1/__init__.py build/proto/knnlm/v1/
	@diff -r -x __pycache__ build/proto/knnlm/v1 knnlm/v1 || { echo "knnlm/v1 is not what proto/ gives: run \`make proto\`"; exit 1; }

clean: down ## remove what was built and installed
	rm -rf $(VENV) $(PAGE) $(CLIENTS) build store *.egg-info
