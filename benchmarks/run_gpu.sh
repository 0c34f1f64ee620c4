#!/usr/bin/env bash
# What a machine with a GPU should run and measure, in one call; results as JSON under $OUT. (`make test` hides the GPU:
# its tests prove values on CPUs.)
#   OUT=benchmarks/results benchmarks/run_gpu.sh [demo|train ...]     (all of them without a word)
# On a machine without a package index, put wheels of what is missing into .whl/ first.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
if compgen -G '.whl/*.whl' >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl || exit 2
  export PYTHONPATH=/tmp/site
fi
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$PYTHON" setup.py -q build_ext --inplace || exit 2
want() { [ $# -eq 1 ] || { local w=$1; shift; for x; do [ "$x" = "$w" ] && return 0; done; return 1; }; }
failed=0

if want demo "$@"; then
  stdlib=$("$PYTHON" -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
  "$PYTHON" -m engine.cli prepare --input "$stdlib" --exclude site-packages --exclude dist-packages \
    --output /tmp/demo/data --vocab_size 4096 --validation_fraction 0.02 &&
  "$PYTHON" engine/pretrain.py --config configs/pretrain/demo_cpu.yaml --data.path /tmp/demo/data --output_dir /tmp/demo/run &&
  "$PYTHON" -m engine.cli report --run /tmp/demo/run && cp /tmp/demo/run/report.json "$OUT/gpu_demo.json" || failed=1
fi
if want train "$@"; then
  "$PYTHON" benchmarks/run.py train --model 125m --precision bf16 --json "$OUT/gpu_train_125m.json" || failed=1
  "$PYTHON" benchmarks/run.py train --model 1b --precision bf16 --sides engine,eager --json "$OUT/gpu_train_1b_eager.json" || failed=1
  "$PYTHON" benchmarks/run.py train --model 1b --precision bf16 --sides engine,compile --json "$OUT/gpu_train_1b_compile.json" || failed=1
fi
exit $failed
