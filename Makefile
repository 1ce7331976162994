PYTHON ?= python3
VENV ?= .venv
# Every package at the version the tests were last run with. `make setup LOCK=` takes the newest of everything instead.
LOCK ?= constraints/cpu.txt
# Where torch alone comes from, e.g. https://download.pytorch.org/whl/cpu; empty means pip's own index.
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
WITH_LOCK := $(if $(LOCK),-c $(LOCK))
NATIVE := setup.py $(wildcard csrc/*)

.PHONY: setup demo test check gpu gpu-rehearsal upstream peers mutants mutate ci-long aot-versions lock clean

setup: $(VENV)/.installed

demo: setup
	$(BIN)/rlhf run

test: setup
	$(BIN)/python -m pytest -m "not gpu and not long"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a GPU, by its own Python and torch: nothing is installed, so that it also runs where nothing can be.
# Its own versions' warnings are shown and no more.
gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest -W default -m gpu tests

# The same tests on a CPU, in small shapes: do they say what they mean? See tests/gpu_tier.py.
gpu-rehearsal: setup
	RLHF_GPU_REHEARSAL=1 $(BIN)/python -m pytest -q -m gpu tests

# --no-deps: an index of torch builds holds other versions of what torch needs; the next step gets those from pip's own.
$(VENV)/.torch: $(LOCK)
	@echo "setup: $(VENV) with build tools and torch ($(if $(LOCK),versions from $(LOCK),newest versions))"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade $(WITH_LOCK) setuptools wheel ninja pybind11
	$(PIP) install --no-deps $(WITH_LOCK) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

# torch first, and no build isolation: the extension compiles against the headers of the torch that will load it.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	@echo "setup: rlhf_engine, editable, with what the demo and the tests need"
	$(PIP) install $(WITH_LOCK) --no-build-isolation -e ".[demo,test]"
	@$(BIN)/python -m rlhf_engine.native
	@touch $@

# Other packages in folders of their own: what they pin contradicts this package and each other. Only these tests see it.
.upstream/.installed .peers/.installed: .%/.installed: constraints/%.txt $(VENV)/.torch
	rm -rf .$*
	$(PIP) install --no-deps --target .$* -r $<
	@touch $@

upstream: setup .upstream/.installed
	HF_HUB_OFFLINE=1 UPSTREAM=$(CURDIR)/.upstream $(BIN)/python -m pytest -q tests/upstream

peers: setup .peers/.installed
	HF_HUB_OFFLINE=1 PEERS=$(CURDIR)/.peers $(BIN)/python -m pytest -q tests/peers

# Tests of the tests: every bug planted in the C++ ops and in the CUDA kernels is one that some test sees.
mutants: setup
	$(BIN)/python -m pytest -q -m long tests/mutants tests/test_shim.py

# The same for the reference and the front door, by mutmut: an hour or more. Writes bench/results/mutation.json.
mutate: setup
	$(PIP) install $(WITH_LOCK) mutmut
	$(BIN)/python bench/mutation.py

# What `make test` leaves out, twenty times as many examples of every C++ op, and the unlocked job: does the newest of
# everything still import and pass a quick test? Only torch stays as it is in $(VENV), since another build is gigabytes.
ci-long: setup gpu-rehearsal aot-versions mutants upstream peers
	$(BIN)/python -m pytest -q -m "long and not gpu" --ignore tests/mutants --ignore tests/test_shim.py
	$(BIN)/python -m pytest -q --hypothesis-profile=long --timeout=3600 tests/test_compiled.py
	@echo "ci-long: unlocked install"
	$(BIN)/python -m pip freeze | grep -E '^torch==' > $(VENV)/torch.txt
	$(MAKE) setup VENV=.venv-unlocked LOCK=$(VENV)/torch.txt
	.venv-unlocked/bin/python -m pytest -q tests/test_layers.py tests/test_native.py tests/test_head_kernels.py tests/test_loss_kernels.py

# The kernels compiled by the oldest triton in use: that of torch 2.11, which CUDA machines still have.
OLD_TRITON := 3.6.0
OLD_PATH := PYTHONPATH=$(CURDIR)/.triton-$(OLD_TRITON):$(CURDIR)
aot-versions: setup
	@echo "aot-versions: kernels compiled by triton $(OLD_TRITON)"
	test -d .triton-$(OLD_TRITON) || $(PIP) install --no-deps --target .triton-$(OLD_TRITON) triton==$(OLD_TRITON)
	$(OLD_PATH) $(BIN)/python -c 'import triton; assert triton.__version__ == "$(OLD_TRITON)", triton.__version__'
	$(OLD_PATH) $(BIN)/python tests/test_head_kernels.py compile
	$(OLD_PATH) $(BIN)/python tests/test_loss_kernels.py compile

# A new lock: everything at its newest in a clean environment, except torch and the triton it was tested with. Where the
# newest needs Python 3.11, a second line holds what 3.10 gets; those lines are kept as they are.
lock:
	rm -rf .venv-lock
	printf 'torch==2.13.0\ntriton==3.7.1\n' > .lock-base.txt
	$(MAKE) setup VENV=.venv-lock LOCK=.lock-base.txt
	.venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' > .lock-new.txt
	(echo "# Written by 'make lock' with $$(.venv-lock/bin/python -V)"; awk -F== \
		'NR == FNR { if (/python_version </) old[$$1] = $$0; next } \
		$$1 in old { print $$0 "; python_version >= \"3.11\""; print old[$$1]; next } { print }' \
		constraints/cpu.txt .lock-new.txt) > .lock.txt
	mv .lock.txt constraints/cpu.txt
	rm -rf .venv-lock .lock-base.txt .lock-new.txt

clean:
	rm -rf $(VENV) .venv-unlocked .venv-lock .lock-base.txt .upstream .peers .triton-* build dist *.egg-info
	rm -f rlhf_engine/_C.so rlhf_engine/_C.json rlhf_engine/_raw.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
