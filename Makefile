# Two commands: `make demo` (from raw text to a trained model) and `make test` (tests and lint).
# Both make .venv, install and build the C++ extensions first; what is already there is reused.

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= demo
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install -qq --disable-pip-version-check
STDLIB  = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
SOURCES = setup.py pyproject.toml $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.hpp csrc/*/*.inc)

# What reads bytes that others wrote, under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
CHECKED   = build/sanitized
SANITIZED = $(addprefix tests/data/test_,indexed.py samples.py shards.py verified.py index_cache.py blend.py packing.py fast_bpe.py text_scan.py \
  cleaning.py contamination.py dedup.py near_dedup.py minhash.py)

.PHONY: demo pipeline test sanitize lint layouts bench clean

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit('error: Python 3.11 or newer is needed, this is %d.%d: set PYTHON=' % sys.version_info[:2] if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)

# Torch first and by itself: its version range decides which build pip takes.
$(VENV)/.torch: $(VENV)/bin/python
	@command -v c++ >/dev/null || { echo "error: no C++ compiler found. Install one (Debian: apt-get install g++)" >&2; exit 2; }
	$(PIP) 'torch>=2.11,<2.14'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable .
	@touch $@

# Not after .installed: the extensions would be built twice.
$(VENV)/.installed-dev: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.installed $@

# What the stages after pretraining and the exports read and write besides.
$(VENV)/.installed-post: $(VENV)/.installed
	$(PIP) --editable '.[post]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/mainspring prepare --input $(STDLIB) --exclude site-packages --exclude dist-packages --output $(DEMO)/data --vocab_size 4096 --validation_fraction 0.02
	$(BIN)/python engine/pretrain.py --config configs/pretrain/demo_cpu.yaml --data.path $(DEMO)/data --output_dir $(DEMO)/run
	$(BIN)/mainspring report --run $(DEMO)/run

# Every stage from raw text to exported models, with gates between, on two CPU cores. A second run goes on, or says that
# all is done; runs/pipeline/report.html is the report.
pipeline: $(VENV)/.installed-post
	$(BIN)/mainspring pipeline --config configs/pipeline.yaml

# Two workers with one thread each; parallel tests are 2 processes over gloo. A GPU is hidden: these tests prove values
# on CPUs, and two workers would share it.
test: $(VENV)/.installed-dev lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	$(MAKE) sanitize

# A copy of the package beside extensions that were built with the sanitizers; Python itself was not, hence the preload.
sanitize: $(VENV)/.installed-dev
	rm -rf $(CHECKED) && mkdir -p $(CHECKED) && cp -r engine $(CHECKED)/ && find $(CHECKED) -name '*.so' -delete
	MAINSPRING_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib $(CHECKED) --build-temp $(CHECKED)/objects
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 PYTHONPATH=$(CHECKED):kernels MAINSPRING_SANITIZED=$(CHECKED) \
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -p no:cacheprovider $(SANITIZED)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/pyright

# Every parallel layout against one rank, on CPUs.
layouts: $(VENV)/.installed-dev
	$(BIN)/python -m engine.verification.table --output docs/layouts.md

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/run.py train

clean:
	rm -rf build dist *.egg-info $(DEMO) $(VENV)
