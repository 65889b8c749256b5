"""Cases in a process of their own, loss and backward once each, for tools that watch kernels: one.py DEVICE
BACKEND CASE [CASE ...].

python -m benchmarks.gpu.one cuda triton "kl T=2 4096x128256 bfloat16"
"""

import sys

from .cases import Case, run


def main(device: str, backend: str, *cases: str) -> None:
    if backend == "triton" and device == "cpu":
        import interpreter

        interpreter.install()
    for text in cases:
        print(f"case {text}", flush=True)
        loss, grad, _ = run(Case.parse(text), backend, device)
        if not (loss.isfinite().all() and grad.isfinite().all()):
            raise SystemExit(f"{text}: not finite")
        print(f"done {text}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
