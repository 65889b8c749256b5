"""Every Python snippet of the README, and the docstring's example, runs; its table of times is that of the
committed results."""

import itertools
import json
import re
from pathlib import Path

import kdkernels
from kdkernels.bench import linear

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_snippets():
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) >= 4
    scope: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), scope)
    assert scope["student_logits"].grad.isfinite().all()


def test_docstring_example():
    text = kdkernels.fused_kd_loss.__doc__
    lines = [line.strip()[4:] for line in text.splitlines() if line.strip().startswith(">>> ")]
    scope: dict = {}
    exec("\n".join(lines), scope)
    assert scope["student"].grad.isfinite().all()


def test_times_are_the_measured_ones():
    path = re.search(r"\]\((\S*results/cpu\S*\.json)\)", README).group(1)
    cases = json.loads((ROOT / path).read_text())["cases"]
    for case in cases:
        x = dict(case["contenders"])
        fused, compiled = x.pop("kdkernels"), x.pop("torch.compile")
        eager = min(x.values(), key=lambda contender: contender["ms"])
        name = {"kl": "KL", "renyi(0.5)": "Renyi(0.5)"}[case["divergence"]]
        times = " | ".join(
            f"{contender['ms']:.0f} ({contender['speed_up']:.1f} x)" for contender in (eager, compiled)
        )
        assert (
            f"| {name}, {case['rows']} x {case['vocab']} {case['dtype']} | **{fused['ms']:.1f}** | {times} |"
            in README
        )


def test_the_first_screen_names_its_machine():
    """The headline's figures are the tables', and say in the same sentence whose they are."""
    top = " ".join(README.split("## Install")[0].split())
    fp32 = re.search(r"\| KL, 256 x 128256 fp32 \|[^|]*\| \d+ \(([\d.]+) x\) \| \d+ \(([\d.]+) x\)", README)
    eager, compiled = (round(float(x)) for x in fp32.groups())
    said = (
        f"On a CPU {eager} times as fast as the best eager spelling of the KL loss and {compiled} "
        "times as fast as `torch.compile`"
    )
    assert said in top
    gpu = re.search(
        r"\| KL, 4096 x 128256 bf16, NVIDIA (\w+), triton \|[^|]*\| [\d.]+ \(([\d.]+) x\) \| [\d.]+ "
        r"\(([\d.]+) x\)",
        README,
    )
    card, eager, compiled = gpu.groups()
    said = (
        f"On an {card} {eager} times as fast as the best eager spelling of the KL loss and "
        f"{compiled} times as fast as `torch.compile`"
    )
    assert said in top


def test_memory_is_the_models():
    """Of the loss that takes hidden states, on paper."""
    names = ("full logits, in place", "full logits", "eager")
    for vocab, width in itertools.product(linear.PAPER_VOCABS, linear.PAPER_WIDTHS):
        found = linear.memory(linear.PAPER_TOKENS, vocab, width)
        sizes = " | ".join(f"{found[x] / 2**30:.2f}" for x in names)
        assert (
            f"| {vocab} x {width} | {found['chunk']} | **{found['kdkernels'] / 2**30:.2f}** | {sizes} |"
            in README
        )


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
