#!/usr/bin/env bash
# The gate for people and CI, run by `make check`: every tool runs, and any complaint fails the whole.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

failed=()
run() {
    echo "--- $*"
    "$@" || failed+=("$1")
}

mapfile -t scripts < <(git ls-files '*.sh' '*.sbatch' .ci/run)

run ruff format --check .
run ruff check .
run basedpyright
run lint-imports --no-cache
run shellcheck "${scripts[@]}"
run python tools/tail.py

if ((${#failed[@]})); then
    echo "check failed: ${failed[*]}" >&2
    exit 1
fi
echo "check passed"
