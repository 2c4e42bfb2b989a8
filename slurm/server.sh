#!/usr/bin/env bash
# One task of a step of vLLM servers, on its node (in its container): a server that registers itself while it serves.
#   server.sh RUN_DIR NAME ATTEMPT [ARGUMENT of vLLM ...]
# A3PO_ADDRESSES has "NODE=ADDRESS ..." of every node; A3PO_SERVER_PYTHON an interpreter that has vLLM.
set -euo pipefail
run_dir=$1 name=$2-$SLURM_PROCID attempt=$3
shift 3

address=127.0.0.1
for pair in $A3PO_ADDRESSES; do
    if [[ ${pair%%=*} == "$SLURMD_NODENAME" ]]; then address=${pair#*=}; fi
done
exec "$A3PO_SERVER_PYTHON" -m a3po_vllm.registered "$run_dir/servers/recipe.json" "$run_dir/servers" "$name" \
    --address "$address" --attempt "$attempt" --until "$run_dir/summary.json" -- "$@"
