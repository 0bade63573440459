# Works with GNU and BSD make. On Windows, in a shell that has make: make BIN=.venv/Scripts PYTHON=py
BIN = .venv/bin
PYTHON = python3
READY = .venv/ready

# What `make quantize` makes, of what and where to; empty: all default types of the bundled model.
MODEL =
QUANT =
OUT =
# In place of QUANT: the memory of a device, the context and the kv_cache's type that go with it.
FIT =
CTX = 32768
KV = f16
# What `make eval` measures against MODEL.
FILES = models/nano-qwq/*.gguf
# What `make gate` holds the bundled model's files against.
BASELINE = quant_eval/data/nano-baseline.json
# Calibration texts that `make bench-calibrate` and `make bench-second` make everything from.
DRAWS = 1
# What `make test` hands to pytest, as in TESTS="tests/convert -k golden".
TESTS =

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make .venv with every package at its pinned version (TORCH_INDEX=, QWQ_BACKEND=)

$(READY): pyproject.toml constraints.txt scripts/setup.py scripts/install.py scripts/llama_wheel.py
	@command -v $(PYTHON) >/dev/null || { \
	printf 'setup: needs Python 3.11 or newer, and there is no %s; install it:\n' '$(PYTHON)'; \
	printf '  %-15s %s\n' 'Debian, Ubuntu' 'sudo apt install python3 python3-venv python3-dev' \
	Fedora 'sudo dnf install python3 python3-devel' macOS 'brew install python@3.13' \
	Windows 'winget install Python.Python.3.13'; exit 1; }
	@$(PYTHON) scripts/setup.py
	@touch $(READY)

quantize: $(READY) ## quantize, check and evaluate a model (MODEL=, QUANT="Q4_K_M gptq-4bit", FIT=24GiB CTX=32768, OUT=)
	@model='$(MODEL)'; out='$(OUT)'; fit='$(FIT)'; set --; \
	for type in $(QUANT); do set -- "$$@" --type "$$type"; done; \
	[ -z "$$fit" ] || set -- "$$@" --fit "$$fit" --context '$(CTX)' --kv '$(KV)'; \
	$(BIN)/qwq quantize $${model:+"$$model"} "$$@" $${out:+--out "$$out"}

eval: $(READY) ## measure files that are there against MODEL (FILES="a.gguf b.gguf", OUT=)
	@model='$(MODEL)'; out='$(OUT)'; \
	$(BIN)/qwq eval run $(FILES) --reference "$${model:-quant_eval/nano/checkpoint}" \
	$${out:+--out "$$out"}

autogptq: build/autogptq/ready ## make build/autogptq, where the tests have AutoGPTQ read our folders

build/autogptq/ready: tests/autogptq.txt scripts/readers.py $(READY)
	@$(BIN)/python scripts/readers.py autogptq

vllm: build/vllm/ready ## make build/vllm, where the tests have vLLM read our folders

build/vllm/ready: tests/vllm.txt scripts/readers.py $(READY)
	@$(BIN)/python scripts/readers.py vllm

gate: $(READY) ## fail where a file of `make quantize` is worse than the committed baseline
	@for name in Q8_0.gguf Q6_K.gguf Q4_K_M.gguf Q2_K.gguf gptq-4bit; do echo "nano-qwq-$$name:"; \
	$(BIN)/qwq eval gate models/nano-qwq/nano-qwq-$$name --baseline $(BASELINE) \
	--reference quant_eval/nano/checkpoint -o models/nano-qwq || exit; done

baseline: $(READY) ## make the baseline of `make gate` anew, from what `make quantize` made
	@$(BIN)/qwq eval baseline models/nano-qwq/nano-qwq-Q8_0.gguf models/nano-qwq/nano-qwq-Q6_K.gguf \
	models/nano-qwq/nano-qwq-Q4_K_M.gguf models/nano-qwq/nano-qwq-Q2_K.gguf \
	models/nano-qwq/nano-qwq-gptq-4bit --floor models/nano-qwq/nano-qwq-BF16.gguf \
	--floor quant_eval/nano/checkpoint --reference quant_eval/nano/checkpoint \
	-o models/nano-qwq --save $(BASELINE) --force

test: $(READY) ## run all tests (TESTS="tests/convert -k golden" for some)
	@$(BIN)/python -m pytest $(TESTS)

lint: $(READY) ## check layout, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## lay the code out
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: bench-encoders bench-convert bench-calibrate bench-layer bench-run bench-serve bench-eval ## run all benchmarks; docs/LOG.md holds their figures

bench-encoders: $(READY) ## compare our block encoders with three builds of ggml's: bytes and speed
	@$(BIN)/python benchmarks/encoders.py

bench-convert: $(READY) ## compare our one pass to GGUF with a BF16 file and llama.cpp's quantizer
	@$(BIN)/python benchmarks/one_pass.py

bench-calibrate: $(READY) ## compare imatrix, GPTQ rounding and GPTQ: KL, time, memory
	@$(BIN)/python benchmarks/calibration.py --draws $(DRAWS)

bench-second: $(READY) ## the same on a checkpoint unlike nano-qwq, which is trained first: half an hour
	@[ -f build/second-checkpoint/model.safetensors ] || $(BIN)/python benchmarks/second_checkpoint.py
	@$(BIN)/python benchmarks/calibration.py --checkpoint build/second-checkpoint \
	--text build/second-checkpoint/calibration.jsonl \
	--evaluation build/second-checkpoint/evaluation.jsonl --only gguf --only gptq --only gptqmodel \
	--draws $(DRAWS)

bench-layer: $(READY) ## run calibration and GPTQ on a layer of QwQ-32B's shapes: what the whole costs
	@$(BIN)/python benchmarks/real_layer.py

bench-run: $(READY) ## compare the runtime with llama.cpp's bare loop, llama-cpp-python and transformers
	@$(BIN)/python benchmarks/runtime.py

bench-serve: $(READY) ## compare our server with llama-cpp-python's: 1, 4, 8 clients, second turns
	@$(BIN)/python benchmarks/serving.py

bench-eval: $(READY) ## compare the suite's own work with the engine's on a pass of KL
	@$(BIN)/python benchmarks/evaluation.py

soak: $(READY) ## ask a server for 15 minutes, wildly: flat memory, no reply lost
	@$(BIN)/python benchmarks/soak_server.py

constraints: $(READY) ## resolve all packages anew and rewrite constraints.txt
	@$(BIN)/python scripts/constraints.py

clean: ## remove what was made, but not .venv and not models/
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

.PHONY: help setup quantize eval autogptq vllm gate baseline test lint format bench bench-encoders bench-run bench-convert bench-calibrate bench-second bench-eval bench-layer bench-serve soak constraints clean
