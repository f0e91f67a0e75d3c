#!/usr/bin/env bash
# Writes the Python stubs of proto/ to segue/v1 (or below the folder given). Run through `make proto`.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
python=${PYTHON:-.venv/bin/python}
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -I proto --python_out="$out" --grpc_python_out="$out" \
  --mypy_out="$out" --mypy_grpc_out="$out" proto/segue/v1/*.proto
