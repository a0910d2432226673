# make env    create .venv and install everything into it
# make demo   train, explain and check a ViT and a CNN on digits: runs/demo/
# make test   the tests, Triton's kernels in its interpreter and the CUDA ones on the processor included
# make test-slow  the slow ones
# make coverage  which lines of Python the tests run: in the terminal, and as pages in build/coverage/html/
# make test-processors  the tests as on other processors: older instruction sets, more threads, unfused attention
# make test-matrix  tests and gate with the oldest and the newest versions, each in an environment of its own
# make sanitize  the tests of the ops under AddressSanitizer and UndefinedBehaviorSanitizer
# make fuzz   random configurations and malformed calls, counted in bench/results/fuzz/; FUZZ="--malformed 1000" and so on
# make gate   compile every GPU kernel for every device and hold it to gate/budget.json
# make lint   ruff, mypy, clang-format
# make bench  every op beside plain PyTorch, written to bench/results/pairs/<processor>.json
# make bench-short  those that CI holds against the committed ratios
# make bench-digits  three seeds of the demo, both heads, written to bench/results/
# make bench-step  a whole training step beside dense ones, and how it grows, written to bench/results/ and docs/
# make build  recompile in place what has changed of the CPU library, with ninja: MAX_JOBS files at a time
# make bench-explanation  what an explanation costs beside the prediction, written to bench/results/
# make bench-offline  what explaining many images costs beside predicting them, written to bench/results/
# make bench-service  what a served explanation costs, and what it withstands
# make bench-recordings  what recorded coalitions cost, and what is lost in what is kept of them
# make bench-precision  what lower precision of v(S) changes, on digits, written to bench/results/
# make gpu-step  after make gpu: the training step on that device, under nine minutes; again, it goes on
# make gpu    on a machine with a CUDA device: build, check and measure everything, in PYTHON as it is, no .venv

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HEADERS := $(wildcard csrc/include/fastshap/*.h)
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.cu tests/emulation/*.cu tests/emulation/fastshap/*.h) $(HEADERS)

# The ops' tests with the CUDA kernels on the processor.
EMULATED := $(CURDIR)/build/_C_cuda_emulated.so
EMULATE := FASTSHAP_BACKEND=cuda FASTSHAP_EMULATE_CUDA=$(EMULATED)

# Where there is no device, compiling for it is left to `make gate`.
export FASTSHAP_SKIP_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),0,1)

.PHONY: env build demo test test-main test-triton test-cuda test-slow sanitize fuzz test-processors test-matrix matrix-oldest matrix-newest gate lint format bench bench-short bench-digits bench-step bench-precision bench-explanation bench-offline bench-service bench-refinement bench-recordings bench-fidelity gpu gpu-step clean

env: $(INSTALLED)

# torch comes first: the build needs it, and pip would hide it from an isolated one. The libraries are built apart from
# the install, which would compile all of them anew and keep to itself what the build says.
$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/cpu/*.cpp) $(HEADERS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check timm "setuptools>=77" wheel ninja
	FASTSHAP_SKIP_CPP=1 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[dev]"
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m fastshap_kernels.info
	touch $@

build: $(INSTALLED)
	FASTSHAP_FORCE_BUILD=1 $(BIN)/python setup.py --quiet build_ext --inplace

demo: $(INSTALLED)
	$(BIN)/python -m bench.digits --output runs/demo

# The default tests, which end with the 25 slowest of them.
DEFAULT := -m "not slow and not gpu" --durations=25 --durations-min=1

# A core each: two threads a process would wait for one another.
test: $(INSTALLED) $(EMULATED)
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 --output-sync test-main test-triton test-cuda

test-main: $(INSTALLED)
	$(BIN)/python -m pytest $(DEFAULT)

# The ops' tests once more, with Triton's kernels in its interpreter. kernel_shap has no kernels.
test-triton: $(INSTALLED)
	FASTSHAP_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops $(DEFAULT) \
		--ignore=tests/ops/test_kernel_shap.py

# And with the CUDA kernels on the processor. packed_attention has none.
test-cuda: $(EMULATED)
	$(EMULATE) $(BIN)/python -m pytest tests/ops $(DEFAULT) \
		--ignore=tests/ops/test_kernel_shap.py --ignore=tests/ops/test_packed_attention.py

$(EMULATED): $(INSTALLED) $(NATIVE) tests/emulation/build.py
	$(BIN)/python tests/emulation/build.py $@

test-slow: $(INSTALLED) $(EMULATED)
	$(BIN)/python -m pytest -m "slow and not gpu"
	$(EMULATE) $(BIN)/python -m pytest tests/ops/test_large_tensors.py

# Without the CUDA kernels: their launches are not Python. Triton's run in its interpreter.
coverage: $(INSTALLED)
	mkdir -p build/coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(DEFAULT) --cov --cov-report=
	OMP_NUM_THREADS=1 FASTSHAP_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops \
		$(DEFAULT) --ignore=tests/ops/test_kernel_shap.py --cov --cov-append --cov-report=term --cov-report=html

sanitize: $(INSTALLED)
	$(BIN)/python tests/sanitize.py

fuzz: $(INSTALLED) $(EMULATED)
	$(BIN)/python tests/fuzz/run.py $(FUZZ)

# Each of these settings in at least one run of all default tests. PyTorch, our kernels and OpenBLAS choose by processor.
PROCESSOR_baseline := ATEN_CPU_CAPABILITY=default FASTSHAP_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Prescott OMP_NUM_THREADS=1
PROCESSOR_unfused := TIMM_FUSED_ATTN=0 OMP_NUM_THREADS=1
PROCESSOR_threads := OMP_NUM_THREADS=2
PROCESSOR_avx2 := ATEN_CPU_CAPABILITY=avx2 FASTSHAP_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=1
PROCESSOR_avx512 := FASTSHAP_CPU_CAPABILITY=avx512 OMP_NUM_THREADS=1
PROCESSOR_avx512_bf16 := FASTSHAP_CPU_CAPABILITY=avx512_bf16 OMP_NUM_THREADS=1
CAPABILITIES = $(shell $(BIN)/python -c "from fastshap_kernels import _native; print(*_native.cpu_capabilities()[1:])")

# Those of this processor's instruction sets; two runs at a time.
test-processors: $(INSTALLED)
	$(MAKE) --jobs=2 --output-sync --keep-going $(addprefix test-processor-,baseline unfused threads $(CAPABILITIES))

test-processor-%: $(INSTALLED)
	@echo "== $*: $(PROCESSOR_$*)"
	env $(PROCESSOR_$*) $(BIN)/python -m pytest $(DEFAULT) -p no:cacheprovider

# Needs both Pythons; a run that was stopped goes on where it was.
PYTHON_OLDEST ?= python3.10
PYTHON_NEWEST ?= python3.13

test-matrix: matrix-oldest matrix-newest

matrix-oldest:
	tests/matrix.sh oldest $(PYTHON_OLDEST) tests/oldest.txt

matrix-newest:
	tests/matrix.sh newest $(PYTHON_NEWEST)

# Every GPU kernel compiled for every device, with none of them here.
gate: $(INSTALLED)
	$(BIN)/python gate/compile_gate.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: $(INSTALLED)
	$(BIN)/python -m bench.pairs --runs 3 --write
	$(BIN)/python -m bench.tables

bench-short: $(INSTALLED)
	$(BIN)/python -m bench.pairs --short

RECORD := $(BIN)/python -m bench.digits --models {} --output runs/digits-{} --record bench/results/digits_{}.json

bench-digits: $(INSTALLED)
	printf 'vit\ncnn\n' | xargs -P 2 -I{} sh -c '$(RECORD) --seeds 0 1 2 && $(RECORD) --heads votes'
	$(BIN)/python -m bench.tables

bench-step: $(INSTALLED)
	$(BIN)/python -m bench.step --set bars --anew
	$(BIN)/python -m bench.step --set growth --anew --visits 2
	$(BIN)/python -m bench.tables

bench-refinement: $(INSTALLED)
	$(BIN)/python -m bench.refinement
	$(BIN)/python -m bench.tables

bench-explanation: $(INSTALLED)
	$(BIN)/python -m bench.explanation
	$(BIN)/python -m bench.tables

bench-offline: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.offline

bench-service: $(INSTALLED)
	$(BIN)/python -m bench.service

# DATA: as of bench-fidelity, for CIFAR-10 too.
bench-recordings: $(INSTALLED)
	$(BIN)/python -m bench.recordings $(if $(DATA),--data $(DATA))
	$(BIN)/python -m bench.tables

bench-precision: $(INSTALLED)
	$(BIN)/python -m bench.precision
	$(BIN)/python -m bench.tables

# DATA: the folder of cifar10_train.npz and cifar10_test.npz. BUDGET: small, medium or full.
# SETTINGS: others than the budget's own, of those in bench/fidelity/runs.py.
bench-fidelity: $(INSTALLED)
	$(BIN)/python -m bench.fidelity --data $(DATA) --budget $(or $(BUDGET),small) $(if $(SETTINGS),--settings $(SETTINGS))
	$(BIN)/python -m bench.tables

gpu:
	PYTHONPATH=python $(PYTHON) -m bench.gpu.steps $(if $(OUTPUT),--output $(OUTPUT) --logs $(OUTPUT)/logs)

# The last step may begin at 420 seconds: what it compiles takes up to a minute and a half.
gpu-step:
	PYTHONPATH=python $(PYTHON) -m bench.step --device cuda --set full --until $$(($$(date +%s) + 420)) $(if $(OUTPUT),--output $(OUTPUT))

clean:
	rm -rf build dist runs *.egg-info fastshap_kernels/*.so
