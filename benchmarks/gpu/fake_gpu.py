"""A GPU that is not there: Triton's own compiler, cache and launcher over a libcuda that does nothing
(cuda_stub.c), for sm_90.

    KD_STUB=FOLDER TRITON_INTERPRET=0 TRITON_CACHE_DIR=FOLDER python -m benchmarks.gpu.fake_gpu [--share I/N]
    [--rehearse]

runs all that the stages launch with Triton, on CPU tensors that nothing reads, so that Triton's cache holds
it. KD_STUB: the folder of the stub, made by build_stub().
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

CAPABILITY = 90
# bytes of the second-level cache, of an H100 and an H200: a plan depends on them
PROCESSORS = 132


def build_stub(folder: Path) -> Path:
    """libcuda.so.1 in a folder; RuntimeError without a C compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = Path(__file__).with_name("cuda_stub.c"), folder / "libcuda.so.1"
    command = [
        os.environ.get("CC", "cc"),
        "-shared",
        "-fPIC",
        "-O2",
        "-w",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-300:]}")
    return folder


def install() -> ctypes.CDLL:
    """Make it Triton's active driver, and the Triton backend's device for CPU tensors; the stub, which counts
    launches."""
    folder = os.environ["KD_STUB"]
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    stub = ctypes.CDLL(f"{folder}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    import triton
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: divmod(CAPABILITY, 10)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

    triton.runtime.driver.set_active(Driver())
    from kdkernels.backends import triton as backend

    backend.unavailable = lambda *_, **__: None
    return stub


def work(rehearsal: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what it is, the step) of all that stages launch with Triton."""
    import torch

    from kdkernels import fused_linear_kd_loss
    from kdkernels.bench import linear

    from . import cases, simple_kl, timing, training

    def step(case: cases.Case) -> None:
        """Of a case, on logits that are never written: their pages are not there."""
        dtype = getattr(torch, case.dtype)
        z, v = (
            torch.empty(case.rows, case.vocab, dtype=dtype, requires_grad=True),
            torch.empty(case.rows, case.vocab, dtype=dtype),
        )
        labels = torch.zeros(case.rows, dtype=torch.int64) if case.labels else None
        # in place z itself stands for the copy that the loss would overwrite
        case.loss(z, v, labels, "triton", inplace=False).sum().backward()

    if rehearsal:
        yield "kl", lambda: step(cases.Case("kl", rows=8, vocab=1000))
        return
    for case in cases.covering():
        yield str(case), lambda case=case: step(case)
    for (rows, vocab), divergence in (
        (s, d) for s in (timing.BIG, (64, 32768), *timing.SHAPES) for d in timing.DIVERGENCES
    ):
        case = cases.Case(divergence, rows=rows, vocab=vocab)
        yield str(case), lambda case=case: step(case)
    for divergence in timing.DIVERGENCES:
        for knob, value in timing.knobs("triton"):

            def tuned(divergence=divergence, knob=knob, value=value) -> None:
                with timing.turned("triton", knob, value):
                    step(cases.Case(divergence))

            yield f"{divergence} {knob}={value}", tuned
    for variant in simple_kl.VARIANTS:
        for rows, vocab in (timing.BIG, *timing.SHAPES):

            def simple(variant=variant, rows=rows, vocab=vocab) -> None:
                z, v = (torch.empty(rows, vocab, dtype=torch.bfloat16) for _ in range(2))
                simple_kl.kl(z, v, 1.0, 1.0, variant)

            yield f"simple {variant} {rows}x{vocab}", simple
    for text in training.LINEAR:
        for divergence in training.LINEAR_DIVERGENCES:

            def hidden(text=text, divergence=divergence) -> None:
                tokens, vocab, _ = linear.shape(text)  # the width is the products' alone
                h, w = (
                    torch.zeros(tokens, 8, dtype=torch.bfloat16, requires_grad=True),
                    torch.zeros(vocab, 8, dtype=torch.bfloat16),
                )
                options = dict(
                    divergence=divergence,
                    temperature=2.0,
                    t_squared=True,
                    backend="triton",
                    memory_budget=linear.linear.GPU_BUDGET,
                )
                fused_linear_kd_loss(h, w.requires_grad_(), h.detach(), w.detach(), **options).backward()

            yield f"linear {divergence} {text}", hidden


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    stub = install()
    from kdkernels.backends import triton as backend
    from kdkernels.backends.triton.plan import Device

    i, n = map(int, args.share.split("/"))
    launches = ctypes.c_int64.in_dll(stub, "kd_stub_launches")
    backend.figures = lambda device: Device(PROCESSORS, 32, True)
    for number, (name, step) in enumerate(work(args.rehearse)):
        if number % n == i:
            before = launches.value
            try:
                step()
            except RuntimeError as error:  # a kernel that this Triton does not compile
                print(f"{name}: failed, {str(error).splitlines()[0][:100]}", flush=True)
            else:
                print(f"{name}: {launches.value - before} launches", flush=True)


if __name__ == "__main__":
    main()
