#!/usr/bin/env bash
# Make a virtual environment and install the project into it, with its development tools.
#   tools/install.sh PYTHON VENV [REQUIREMENT ...]       extra requirements narrow versions, e.g. megatron-core==0.19.2
# Without an NVIDIA GPU, torch's CPU build is taken where a package index has one.
set -euo pipefail

torch_version=2.13.0
python=$1 venv=$2
shift 2
log=$venv/install.log

if [ -z "$python" ]; then
    echo "No Python 3.11 or newer that can make virtual environments was found; name one: make PYTHON=/path/to/python3 ..." >&2
    exit 2
fi

say() { echo "install: $*"; }

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >>"$log" 2>&1
}

install_torch() {
    if nvidia-smi -L >/dev/null 2>&1; then
        install "torch==$torch_version"
    elif ! install "torch==$torch_version+cpu"; then
        say "no CPU build of torch $torch_version in the package index: taking the default one, with gigabytes of CUDA packages"
        say "(PIP_EXTRA_INDEX_URL may name an index with PyTorch's CPU wheels)"
        install "torch==$torch_version"
    fi
}

fail() {
    echo "install failed; the end of $log:" >&2
    grep -v '^WARNING' "$log" | tail -n 20 >&2
    exit 1
}

say "$("$python" --version) -> $venv (once; minutes; log: $log)"
"$python" -m venv "$venv"
: >"$log"
install_torch || fail
install --editable '.[dev]' "$@" || fail
say "done"
