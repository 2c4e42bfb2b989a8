#!/usr/bin/env bash
# A vLLM server on each of the GPUs named, for the run of config.yaml; ctrl-C ends them. From the folder of the repository:
#   examples/gsm8k/servers.sh VLLM_PYTHON GPU ...         VLLM_PYTHON: the interpreter of `make install-vllm`
# They register themselves in inputs/servers, where the run finds them, and are started anew when they fail.
set -euo pipefail
vllm_python=${1:?the interpreter of an environment with vLLM is missing}
shift

folder=examples/gsm8k/inputs/servers
mkdir -p "$folder"
umask 077
"${PYTHON:-python}" -c 'import secrets; print(secrets.token_urlsafe(32))' >"$folder/token"
"${PYTHON:-python}" -m megatron_a3po.rollout.vllm.recipe examples/gsm8k/config.yaml "$folder/token" >"$folder/recipe.json"

servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true; wait' INT TERM
for gpu in "$@"; do
    CUDA_VISIBLE_DEVICES=$gpu PYTHONPATH=megatron_a3po/rollout/vllm/plugin \
        "$vllm_python" -m a3po_vllm.registered "$folder/recipe.json" "$folder" "gpu-$gpu" >"$folder/gpu-$gpu.log" 2>&1 &
    servers+=($!)
done
wait
