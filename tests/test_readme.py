"""Every Python snippet of the README, and the docstring's example, runs."""

import re
from pathlib import Path

import kdkernels

ROOT = Path(__file__).parent.parent


def test_snippets():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
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
