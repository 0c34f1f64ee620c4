#!/usr/bin/env bash
# One machine, a rank for each of its GPUs. Arguments go to the engine:
#
#   examples/one_node.sh --config configs/pretrain/7b.yaml --data.path data/mine --parallel.tensor 2
#
# RANKS: processes (default: as many as GPUs; give a number on a CPU). STAGE: the driver (default engine/pretrain.py).
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${RANKS:-gpu}" \
  "${STAGE:-$home/engine/pretrain.py}" "$@"
