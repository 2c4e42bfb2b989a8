#!/usr/bin/env bash
# Print a Python interpreter that can make virtual environments: the MAJOR.MINOR asked for where there is one,
# otherwise the oldest newer one, otherwise nothing. pyenv's versions are looked at as well.
set -euo pipefail

wanted_minor=${1#3.}
pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}

can_make_environments() {
    "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, $2))" >/dev/null 2>&1
}

for ((minor = wanted_minor; minor <= 14; minor++)); do
    for candidate in "python3.$minor" python3 "$pyenv_root"/versions/3."$minor".*/bin/python3; do
        if can_make_environments "$candidate" "$minor"; then
            command -v "$candidate"
            exit 0
        fi
    done
done
