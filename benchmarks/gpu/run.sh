#!/usr/bin/env bash
# What there is to learn from a GPU, in a budget of seconds (README.md beside this):
#
#     benchmarks/gpu/run.sh FOLDER [--budget SECONDS] [--stages NAMES] [--resume FILE]
#     benchmarks/gpu/run.sh [FOLDER] --rehearse        every stage on the CPU, with small shapes
#
# What `make gpu-pack` has made is used where it is: .gpu/cache.tar.xz, Triton's cache, and .gpu/whl, packages to compare with.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
rehearse=false
for x in "$@"; do [ "$x" = --rehearse ] && rehearse=true; done
case "${1:-}" in "" | --*) set -- "$(mktemp -d)" "$@" ;; esac
if ! $rehearse && [ -e .gpu/manifest.json ]; then
    TRITON_CACHE_DIR=$("$python" -c 'import json; print(json.load(open(".gpu/manifest.json"))["cache"])')
    export TRITON_CACHE_DIR
    mkdir -p "$TRITON_CACHE_DIR"
    tar -xJf .gpu/cache.tar.xz -C "$TRITON_CACHE_DIR" || echo "the cache could not be unpacked: kernels are compiled here"
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .gpu/whl/*.whl || echo "the packages to compare with are left out"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" -u -m benchmarks.gpu.drive "$@"
