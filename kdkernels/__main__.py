"""`python -m kdkernels info`: what this machine runs, and why it does not run the rest. `python -m kdkernels
bench`: how fast."""

from __future__ import annotations

import argparse
import os
import platform
import sys

import torch

from . import __version__, backends, bench


def info() -> str:
    """Versions, the CPU library's own account of itself, and each backend with the reason when it cannot
    run."""
    from .backends import cpu, cuda

    lines = [
        f"kdkernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"machine: {platform.machine()}, {os.cpu_count()} CPUs",
        f"threads: {torch.get_num_threads()} (torch.set_num_threads)",
    ]
    library = cpu.library()
    if isinstance(library, str):
        lines.append(f"CPU library: none: {library}")
    else:
        threads = "OpenMP" if library.openmp else "single-threaded: its compiler had no OpenMP"
        lines.append(f"CPU library: {library.isa}, {threads}")
    library = cuda.library()
    lines.append(f"CUDA library: {'none: ' + library if isinstance(library, str) else library.isa}")
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.append(torch.device(torch.accelerator.current_accelerator().type))
    for device in devices:
        described = backends.describe(device)
        chosen = next((name for name, reason in described if reason is None), "none")
        lines.append(f'{device.type} tensors: backend="auto" is {chosen}')
        lines += [f"    {name}: {'available' if reason is None else reason}" for name, reason in described]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kdkernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was chosen, what is not available, and why")
    benchmark = commands.add_parser(
        "bench", help="the fused loss against PyTorch's own, checked and timed on this machine"
    )
    bench.add_arguments(benchmark)
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
    else:
        bench.main(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
