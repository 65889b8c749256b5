#!/usr/bin/env bash
# Everything there is to learn from a GPU, in under ten minutes: tests, compute-sanitizer, the sweep. Results go to the folder given, or
# benchmarks/results. Without a GPU, its CPU half: the kernels under the interpreter, and compiled ahead of time.
#
#     benchmarks/gpu.sh [folder]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD:$PWD/tests PYTHONUNBUFFERED=1
failed=0
step() { echo "== $1"; shift; "$@" || { failed=1; echo "== failed: $*"; }; }

step "what is here" "$python" -m kdkernels info
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export TRITON_INTERPRET=0
    name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_").replace("/", "_"))')
    [ -e kdkernels/_cuda.so ] || step "the CUDA library" env KDKERNELS_CUDA=1 "$python" setup.py -q build_ext --inplace
    step "tests" timeout 200 "$python" -m pytest -q -m gpu tests/test_gpu.py
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
            for backend in triton cuda; do
                step "$tool, $backend" timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" benchmarks/gpu_exercise.py $backend
            done
        done
    fi
    step "predicted and measured" timeout 60 "$python" benchmarks/traffic.py --here
    step "the sweep" timeout 200 "$python" -m kdkernels bench --dtypes bf16 --divergences kl 'renyi(0.5)' --json "$out/$name.json" --shapes \
        4096x32768 4096x50257 4096x128256 2048x151936 1024x262144 64x262144 1x128256
    step "from hidden states" timeout 200 "$python" -m kdkernels bench --linear 8192x32768x1024 8192x128256x1024 8192x128256x4096 \
        8192x262144x4096 --dtypes bf16 --divergences kl 'jsd(0.5)' --json "$out/linear_$name.json"
    step "as a table" "$python" benchmarks/to_csv.py "$out/$name.json"
else
    echo "== no GPU: its half is left out"
    step "interpreter" env TRITON_INTERPRET=1 "$python" -m pytest -q tests/test_triton.py
    step "ahead of time" env TRITON_INTERPRET=0 "$python" benchmarks/aot.py --check
    step "CUDA kernels on host threads" "$python" -m pytest -q tests/test_cuda.py
    [ -e kdkernels/_cuda.so ] && step "CUDA kernels as compiled" "$python" benchmarks/cuda_aot.py --check
    step "predicted" env TRITON_INTERPRET=0 "$python" benchmarks/traffic.py
fi
exit $failed
