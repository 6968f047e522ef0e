#!/usr/bin/env bash
# Fills out/gpu-wheels with what benchmarks/gpu_check.sh needs beside torch and triton: bash benchmarks/gpu_wheels.sh [VERSION]
# VERSION is the Python of the GPU machine (3.12 if not given). Under 64 MiB together.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12}
rm -rf out/gpu-wheels
"${PYTHON:-python3}" -m pip download --quiet --only-binary=:all: --python-version "$version" --platform manylinux2014_x86_64 \
  --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 --dest out/gpu-wheels \
  "numpy<2.4" networkx pydantic pyyaml safetensors typer rich pytest
size=$(du -sm out/gpu-wheels | cut -f1)
echo "out/gpu-wheels: $(find out/gpu-wheels -name '*.whl' | wc -l) wheels, $size MiB"
[ "$size" -lt 64 ] || { echo "more than 64 MiB" >&2; exit 1; }
