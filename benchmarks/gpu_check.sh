#!/usr/bin/env bash
# Everything that only a GPU can tell, on a machine that may have no network: bash benchmarks/gpu_check.sh [--rehearse] [--part NAME]
# Needs torch and triton in PYTHON (else python3). What else is missing there is taken from the wheels that
# benchmarks/gpu_wheels.sh has put into out/gpu-wheels. Ends within eight minutes; run it again to go on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import torch' || { echo "$python has no torch: set PYTHON to one that has" >&2; exit 2; }
site=out/gpu-site
missing=$("$python" - <<'PY'
import importlib.util as u
names = {"networkx": "networkx", "numpy": "numpy", "pydantic": "pydantic", "yaml": "pyyaml", "safetensors": "safetensors",
         "typer": "typer", "rich": "rich", "pytest": "pytest"}
print(*(package for module, package in names.items() if u.find_spec(module) is None))
PY
)
if [ -n "$missing" ] && [ ! -d "$site" ]; then
  # shellcheck disable=SC2086
  "$python" -m pip install --quiet --no-index --find-links out/gpu-wheels --target "$site" $missing ||
    { echo "missing: $missing. benchmarks/gpu_wheels.sh, where there is a network, fills out/gpu-wheels" >&2; exit 2; }
fi
export PYTHONPATH="$PWD:$PWD/$site${PYTHONPATH:+:$PYTHONPATH}"
exec timeout 480 "$python" -W ignore -m benchmarks gpu_check "$@"
