#!/usr/bin/env bash
# Make the optional environment of torchvision and timm in .venv-vision, then measure their rows of docs/growability.md:
#   bash benchmarks/vision-env.sh [MODEL...]
# All other rows stay as they are in docs/growability.json. PYTHON and VENV say which interpreter and where.
# CPU wheels: PIP_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_EXTRA_INDEX_URL=https://pypi.org/simple
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-vision}
if [ ! -e "$venv/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    grep -v -E '^(torch|triton)==' constraints.txt >"$venv/constraints.txt"
    "$venv/bin/python" -m pip install --quiet -c "$venv/constraints.txt" -r benchmarks/vision-requirements.txt -e .
    touch "$venv/.installed"
fi
[ $# -gt 0 ] || set -- torchvision timm
exec "$venv/bin/python" -m benchmarks growability "$@" --rows docs/growability.json
