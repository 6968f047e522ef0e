#!/usr/bin/env bash
# Make an environment with the peers in .venv-peers, then measure: bash benchmarks/peers-env.sh [options of the benchmark]
# A peer that does not install stands in the table with that word. PYTHON and VENV say which interpreter and where.
# CPU wheels: PIP_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_EXTRA_INDEX_URL=https://pypi.org/simple
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-peers}
if [ ! -e "$venv/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet -c constraints.txt -e .
    grep -v '^#' benchmarks/peers-requirements.txt | while read -r peer; do
        "$venv/bin/python" -m pip install --quiet -c constraints.txt "$peer" || echo "$peer does not install" >&2
    done
    touch "$venv/.installed"
fi
exec "$venv/bin/python" -m benchmarks peers "$@"
