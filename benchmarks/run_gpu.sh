#!/usr/bin/env bash
# What a machine with a GPU should run and measure, in one call of under ten minutes. (`make test` hides the GPU: its
# tests prove values on CPUs.)
#
#   OUT=benchmarks/results benchmarks/run_gpu.sh [PART ...]
#
# Parts: tests (tests/kernels natively: no interpreter), kernels, train-1b, train-3b, train-8b (train: all three),
# profile, stages-1b, stages-8b (SFT, DPO, LoRA and QLoRA beside pretraining; stages: both); without a word all but the
# stages. By name only: ahead (compiling for other GPUs), demo, train-125m.
# Each part may take its share of what is left of SECONDS_LIMIT (570), by its weight; one that hangs is ended and the
# others go on. Results: $OUT/<gpu>/results.json, results.md (all parts in one), log.txt; a summary is printed at the end.
# A part for which fewer than LEAST (25) seconds are left is not begun. DRY=1 runs every part at its smallest on the CPU.
#
# Where nothing can be downloaded, wheels of what is missing travel in .whl/ (ignored by git). On a machine that has pip,
# for an x86-64 machine with Python 3.12, torch and transformers:
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
#     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl \
#     megatron-core==0.16.1 pydantic==2.14.3 pydantic-core==2.50.4 typing-inspection annotated-types liger-kernel==0.8.5
# (QuACK needs nvidia-cutlass-dsl-libs-cu13, 92 MB: more than 64 MiB that may travel.)
set -uo pipefail
cd "$(dirname "$0")/.."
STARTED=$(date +%s)
SECONDS_ALL=${SECONDS_LIMIT:-570}
PYTHON=${PYTHON:-python3}
DRY=${DRY:-}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
GPU=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')
[ -n "$DRY" ] && GPU=dry
RESULTS=${OUT:-benchmarks/results}/${GPU:-cpu}
mkdir -p "$RESULTS"
LOG=$RESULTS/log.txt
: >"$LOG"

if [ -z "$DRY" ]; then
  if compgen -G '.whl/*.whl' >/dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 2
    export PYTHONPATH=/tmp/site
  fi
  export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
  "$PYTHON" setup.py -q build_ext --inplace >>"$LOG" 2>&1 || { tail -20 "$LOG"; exit 2; }
fi
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

PARTS=() TODO=()
for word in "${@:-all}"; do
  case $word in
    all) PARTS+=(tests kernels train-1b train-3b train-8b profile) ;;
    train) PARTS+=(train-1b train-3b train-8b) ;;
    stages) PARTS+=(stages-1b stages-8b) ;;
    tests | kernels | train-125m | train-1b | train-3b | train-8b | profile | stages-1b | stages-8b | ahead | demo) PARTS+=("$word") ;;
    *) echo "error: no part '$word'; there are: $(sed -n 's/^# Parts: //p' "$0")" >&2; exit 2 ;;
  esac
done
TODO=("${PARTS[@]}")

weight() {
  case $1 in tests | train-1b) echo 4 ;; kernels) echo 6 ;; train-3b) echo 3 ;; *) echo 2 ;; esac
}

# Seconds for the first of TODO: its share, by weight, of what is left; a few are kept for the summary.
share() {
  local total=0 part
  for part in "${TODO[@]}"; do total=$((total + $(weight "$part"))); done
  echo $(((SECONDS_ALL - 8 - $(date +%s) + STARTED) * $(weight "${TODO[0]}") / total))
}

suite() { # part, arguments of run.py...: TERM lets Python clean up, so that no worker stays on the GPU
  local part=$1; shift
  timeout -k 10 "$LIMIT" "$PYTHON" benchmarks/run.py "$@" --json "$WORK/$part.json"
}

train() { # model, precisions, sides
  local each=$((LIMIT * 6 / 10))
  if [ -n "$DRY" ]; then set -- tiny "$2" engine,mcore --device cpu --threads 1; else set -- "$1" "$2" "$3"; fi
  local model=$1 precisions=$2 sides=$3; shift 3
  suite "$PART" train --model "$model" --precision "$precisions" --sides "$sides" --one-at-a-time --rounds 4 \
    --steps-per-round 2 --side-seconds "$each" "$@"
}

stages() { # model, kinds
  if [ -n "$DRY" ]; then set -- tiny pretrain,sft,lora --stages-device cpu --stages-precision fp32 --threads 1; fi
  local model=$1 kinds=$2; shift 2
  suite "$PART" stages --stages-model "$model" --kinds "$kinds" --one-by-one --stages-rounds 3 "$@"
}

run_part() {
  case $PART in
    stages-1b) stages 1b pretrain,sft,dpo,lora ;;
    stages-8b) stages 8b lora,qlora ;;
    tests)
      local options=(-n 8); "$PYTHON" -c 'import pytest_timeout' 2>/dev/null && options+=(--timeout 120)
      [ -n "$DRY" ] && options=(-k occupancy)
      timeout -s INT -k 15 "$LIMIT" "$PYTHON" -m pytest tests/kernels -p no:cacheprovider "${options[@]}" --tb short \
        --junitxml "$WORK/tests.xml" ;;
    kernels)
      if [ -n "$DRY" ]; then suite kernels kernels_gpu --scale tiny --device cpu --ops rms_norm --compile none --threads 1 --samples 3
      else suite kernels kernels_gpu --seconds $((LIMIT - 20)); fi ;;
    train-125m) train 125m bf16 engine,compile,liger,mcore ;;
    train-1b) train 1b bf16,fp8 "${SIDES:-engine,liger,liger-pure,mcore}" ;;
    train-3b) train 3b bf16,fp8 "${SIDES:-engine,liger-pure,mcore}" ;;
    train-8b) train 8b bf16 "${SIDES:-engine,liger-pure,mcore}" ;;
    profile)
      if [ -n "$DRY" ]; then suite profile profile --profile-model tiny --device cpu --threads 1
      else suite profile profile --profile-model "${PROFILE:-1b}" --profile-precision bf16,fp8; fi ;;
    ahead)
      if [ -n "$DRY" ]; then suite ahead ahead --ahead-ops rms_norm --targets 90; else suite ahead ahead; fi ;;
    demo)
      local stdlib; stdlib=$("$PYTHON" -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
      timeout -k 10 "$LIMIT" bash -c "
        '$PYTHON' -m engine.cli prepare --input '$stdlib' --exclude site-packages --exclude dist-packages \
          --output '$WORK/demo/data' --vocab_size 4096 --validation_fraction 0.02 &&
        '$PYTHON' engine/pretrain.py --config configs/pretrain/demo_cpu.yaml --data.path '$WORK/demo/data' \
          --output_dir '$WORK/demo/run' && '$PYTHON' -m engine.cli report --run '$WORK/demo/run'" &&
        cp "$WORK/demo/run/report.json" "$RESULTS/demo_report.json" ;;
  esac
}

STATUS=() JSONS=() JUNIT=() FAILED=0
for PART in "${PARTS[@]}"; do
  LIMIT=$(share)
  TODO=("${TODO[@]:1}")
  if [ "$LIMIT" -lt "${LEAST:-25}" ]; then
    STATUS+=("$PART: no time left"); FAILED=1
    continue
  fi
  echo "== $PART, at most $LIMIT s" | tee -a "$LOG"
  began=$(date +%s)
  run_part >>"$LOG" 2>&1
  code=$?
  [ $code -eq 0 ] || FAILED=1
  STATUS+=("$PART: $([ $code -eq 124 ] && echo "ended at its limit" || echo "exit code $code") after $(($(date +%s) - began)) s")
  echo "   ${STATUS[-1]}"
  if [ "$PART" = tests ]; then JUNIT=(--junit "$WORK/tests.xml"); elif [ "$PART" != demo ]; then JSONS+=("$WORK/$PART.json"); fi
done
"$PYTHON" benchmarks/merge.py --output "$RESULTS" "${JUNIT[@]}" --status "${STATUS[@]}" -- "${JSONS[@]}" || FAILED=1
[ "$(stat -c %s "$LOG")" -le 15000000 ] || { tail -c 15000000 "$LOG" >"$LOG.end" && mv "$LOG.end" "$LOG"; }
exit $FAILED
