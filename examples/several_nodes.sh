#!/usr/bin/env bash
# Several machines without a scheduler: the same command on each of them, in any order.
#
#   NODES=4 HEAD=node1:29400 examples/several_nodes.sh --config configs/pretrain/7b.yaml --data.path /shared/data …
#
# NODES: how many. HEAD: name or address of one of them, and a free port. RANKS: processes on each (default: as many
# as GPUs). LOCAL_ADDR: this machine's address, where others cannot resolve its name. STAGE: the driver.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${NODES:?set it to the number of machines}" "${HEAD:?set it to one machine and a free port, host:29400}"

exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "${RANKS:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-mainspring}" \
  ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
  "${STAGE:-$home/engine/pretrain.py}" "$@"
