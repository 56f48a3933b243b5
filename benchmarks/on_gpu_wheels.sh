#!/usr/bin/env bash
# Wheels of what benchmarks/on_gpu.sh needs beside jax, flax, optax, Orbax and
# PyTorch, for a GPU machine without a network:
#
#   benchmarks/on_gpu_wheels.sh DIR [PYTHON_VERSION]
#
# then there: benchmarks/on_gpu.sh OUT --wheels=DIR. About 5 MB in all. The Python
# version is the GPU machine's, 3.12 unless given.
set -euo pipefail
[[ $# -ge 1 ]] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
platforms=()
for glibc in 2_31 2_28 2_27 2_24 2_17; do
  platforms+=(--platform "manylinux_${glibc}_x86_64")
done
"${PIP_PYTHON:-python3}" -m pip download --quiet --no-deps \
  --only-binary=:all: --implementation cp --python-version "${2:-3.12}" \
  "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$1" \
  array_record googleapis-common-protos grain ml_collections portpicker \
  tensorboardX
du -ch "$1"/*.whl
