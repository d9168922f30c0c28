# Everything a person or a machine runs here. `make` lists it.
# Each target prepares what it needs: a virtual environment in .venv with the package in it.

PYTHON ?= python3
# Installed first, so that the package does not choose another; any torch from 2.11 on will do.
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help demo test test-slow coverage mutants verify asan check fmt lint docs bench gpu-test \
	gpu-bench gpu-wheels gpu-first gpu-second aarch64 x86-64 emulator has-emulator browser dist doctor \
	clean

help:
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.installed ## teacher, pairs, student, report on scanned digits, in minutes
	$(BIN)/dstudent demo

test: $(VENV)/.test ## the tests, minutes on two CPU cores
	$(PYTEST) --dist worksteal -m "not slow"

# A file is run by one process, since what its tests share takes the longest.
test-slow: $(VENV)/.test-slow ## the tests that take longer: kills, several processes, an emulated GPU, machine code
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m slow

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

# With every line, which tests run it: that is how a mutant finds the tests that should notice it.
coverage: $(VENV)/.test ## which lines and branches of ds/ the tests run; as pages in build/coverage/pages
	$(PYTEST) --dist worksteal -m "not slow" --junitxml=build/coverage/tests.xml \
		--cov=ds --cov-context=test --cov-report=term --cov-report=html

mutants: $(VENV)/.test ## break ds/ a little, 300 times: do the tests notice? MUTANTS="ds/pairs --count 50"
	test -e build/coverage/tests.xml || $(MAKE) coverage
	OMP_NUM_THREADS=1 nice $(BIN)/python -m tests.mutants $(MUTANTS)

verify: $(VENV)/.installed ## hold every method against the truth, beside its controls, a process for each core
	$(BIN)/python -c 'from ds.cli.verb import methods; print(*methods())' | \
		OMP_NUM_THREADS=1 xargs -n 1 -P "$$(nproc)" $(BIN)/dstudent verify

# Built without optimization, which takes a quarter of the time, and one test asks for fused products.
# PyTorch throws C++ exceptions, which the sanitizer only sees if it was given libstdc++ at the start.
asan: $(VENV)/.test ## the C++ kernels under sanitizers: the ops' tests, and any calls for a minute
	cmake -S . -B build/asan -G Ninja -D DS_LIBRARY=cpu -D CMAKE_BUILD_TYPE=None \
		-D CMAKE_CXX_FLAGS="-O0 -g1 $(SANITIZERS)" >/dev/null
	cmake --build build/asan
	$(SANITIZED_PYTHON) -m tests.fuzz --seconds 60 --log build/asan/last-call || \
		{ cat build/asan/last-call; false; }
	$(SANITIZED_PYTHON) -m pytest -q -p tests.sanitized $(KERNEL_TESTS) \
		--deselect tests/ops/group_norm_silu/test_forward.py::test_silu_over_its_whole_range

SANITIZERS = -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED_PYTHON = DS_SANITIZED=build/asan OMP_NUM_THREADS=1 \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	$(BIN)/python
KERNEL_TESTS = tests/ops/group_norm_silu $(addprefix tests/ops/test_,$(addsuffix .py,adam gather_rows \
	noise prepare_batch quantize solver_update)) \
	$(addprefix tests/ops/conv/test_,conv3x3.py winograd.py winograd_int16.py)

# The tests stay on this processor; the library, and what calls it, are run by qemu (tests/foreign.py).
aarch64: $(VENV)/.test has-emulator ## the C++ kernels on an emulated AArch64: the ops' tests
	cmake -S . -B build/$@ -G Ninja -D DS_LIBRARY=cpu -D CMAKE_CXX_COMPILER=$@-linux-gnu-g++ \
		-D CMAKE_SYSTEM_NAME=Linux -D CMAKE_SYSTEM_PROCESSOR=$@ -D CMAKE_CXX_FLAGS=-Werror >/dev/null
	cmake --build build/$@
	$@-linux-gnu-g++ $(FOREIGN_FLAGS) -o build/$@/foreign tests/foreign.cpp -ldl
	DS_FOREIGN="qemu-$@ -L /usr/$@-linux-gnu build/$@/foreign build/$@/libds_cpu.so" $(FOREIGN_TESTS)

x86-64: $(VENV)/.test has-emulator ## the installed C++ kernels on an emulated x86-64 without AVX: the ops' tests
	mkdir -p build/$@
	$(CXX) $(FOREIGN_FLAGS) -o build/$@/foreign tests/foreign.cpp -ldl
	DS_FOREIGN="qemu-x86_64 -cpu qemu64 build/$@/foreign ds/ops/lib/libds_cpu.so" $(FOREIGN_TESTS)

emulator: ## install what those two need, Debian's compiler for AArch64 and qemu, if it is missing
	@$(HAS_EMULATOR) || { $(APT) update -qq && $(APT) install -qq -y $(EMULATOR); }

browser: ## install what the tests of pages need, Debian's chromium, if it is missing
	@which chromium >/dev/null || { $(APT) update -qq && $(APT) install -qq -y chromium; }

has-emulator:
	@$(HAS_EMULATOR) || { echo "needs $(EMULATOR) of Debian (run: make emulator)" >&2; false; }

EMULATOR = g++-aarch64-linux-gnu qemu-user
HAS_EMULATOR = { which aarch64-linux-gnu-g++ qemu-aarch64 qemu-x86_64 >/dev/null; }
APT = timeout 300 apt-get -o Acquire::http::Timeout=10 -o Acquire::Retries=1
FOREIGN_FLAGS = -std=c++17 -O1 -Wall -Wextra
FOREIGN_TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p tests.foreign $(KERNEL_TESTS)

check: fmt lint test ## what a change must pass

fmt: $(VENV)/.lint ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --quiet .

lint: $(VENV)/.lint ## check format, style and types without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs ## the documentation site, into build/site, without a warning or a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	$(LINKS) --root-dir $(CURDIR)/build/site 'build/site/**/*.html'
	$(LINKS) '*.md' 'docs/**/*.md'

LINKS = $(BIN)/lychee --offline --include-fragments --quiet

bench: $(VENV)/.test ## time this library and its peers on this machine; CASES="NAME --size quick" for less
	$(BIN)/python -m benchmarks $(CASES)

# A GPU machine often brings its own PyTorch: make gpu-test GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python

gpu-test: ## on a GPU: the tests, and kernels under compute-sanitizer
	$(GPU_PYTHON) setup.py -q build_ext --inplace
	$(GPU_PYTHON) -m pytest $(GPU_TESTS) tests/ops tests/nets tests/engine
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 \
		$(GPU_PYTHON) -m pytest tests/kernels tests/cuda -k "$(SANITIZED)"

# In a tree without git the commit is DS_COMMIT. DS_GPU_RESULTS is a folder for what is measured.
gpu-bench: ## on a GPU: time this library and its peers
	$(GPU_PYTHON) -m benchmarks --device cuda $(if $(DS_GPU_RESULTS),--out $(DS_GPU_RESULTS))

gpu-first: ## on a GPU, 7 minutes: what is right there, and the loop beside its peers
	$(GPU_RUN) first --python "$(GPU_PYTHON)" --size $(SIZE)

gpu-second: ## on a GPU, 7 minutes: every convolution, one image, training, the sanitizer
	$(GPU_RUN) second --python "$(GPU_PYTHON)" --size $(SIZE)

gpu-wheels: ## fetch the packages that a GPU machine without a network may lack, for Python 3.12
	$(PYTHON) -m pip download --quiet --no-deps --dest wheels --only-binary :all: \
		--python-version 3.12 --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
		$(TRAVEL)

GPU_TESTS = tests/kernels tests/cuda tests/gpu
SANITIZED = (written or in_place or more_tensors or any_number) and not interpreted
GPU_RUN = $(firstword $(GPU_PYTHON)) -m benchmarks.gpu
SIZE = full
# tyro, diffusers and what they import; parallel tests
TRAVEL = tyro docstring_parser typeguard diffusers importlib_metadata huggingface_hub httpx2 \
	httpcore2 h11 anyio idna truststore certifi requests urllib3 charset_normalizer pyyaml \
	pytest-xdist execnet pytest-timeout

# auditwheel gives the wheel its tag, or refuses: what it links to must be as old as that. Both files
# are tried in an environment with nothing else, the archive with no compiler that works.
dist: ## the source archive and a wheel for Linux since 2018, in dist/
	rm -rf $(DIST) dist/denoising_student-*
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(DIST)/bin/pip install --quiet --group dist
	$(DIST)/bin/pip install --quiet --group nvcc --target $(DIST)/cuda
	ln -s lib $(DIST)/cuda/nvidia/cu13/lib64
	CUDACXX=$(DIST)/cuda/nvidia/cu13/bin/nvcc \
		LDFLAGS="$$($(DIST)/bin/python release/old_glibc.py 2.28 $(DIST)/glibc)" \
		$(DIST)/bin/python -m build --outdir $(DIST)/built
	PATH="$(DIST)/bin:$$PATH" auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat \
		--wheel-dir dist $(DIST)/built/*.whl
	mv $(DIST)/built/*.tar.gz dist
	$(PYTHON) -m venv $(DIST)/bare
	$(DIST)/bare/bin/pip install --quiet "$(TORCH)" dist/*.whl
	cd $(DIST) && bare/bin/python $(CURDIR)/release/bare.py && PATH=bare/bin dstudent doctor
	CXX=false CUDACXX=false $(DIST)/bare/bin/pip install --quiet --no-deps --force-reinstall dist/*.tar.gz
	cd $(DIST) && PATH=bare/bin dstudent doctor

DIST := $(CURDIR)/build/dist

doctor: $(VENV)/.installed ## what this machine has and which kernels run here
	$(BIN)/dstudent doctor

clean: ## remove the environment and what was built
	rm -rf $(VENV) build ds/ops/lib *.egg-info

BUILT_FROM := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILT_FROM)
	$(PIP) install --editable .
	@$(SAY_BUILT)
	@touch $@

# The package is there already, so this brings the packages of an extra and builds no kernels again.
$(VENV)/.test $(VENV)/.test-slow $(VENV)/.lint $(VENV)/.docs: $(VENV)/.installed
	$(PIP) install "denoising-student[$(@F:.%=%)]"
	@touch $@

$(VENV)/.test: $(VENV)/.triton
$(VENV)/.test-slow: $(VENV)/.test
$(VENV)/.lint: $(VENV)/.test-slow

$(VENV)/.triton: $(VENV)/.torch
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install --no-deps "triton>=3.9,<3.10"
	@touch $@

SAY_BUILT = $(BIN)/python -c 'from ds.ops import build_info as b; i = b(); \
	print("C++ kernels:", i["compiler"] if i["built"] else i["reason"])'
