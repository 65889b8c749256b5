"""Every Python snippet of the README runs, in order, and the quick start learns something."""

import importlib.util
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


def test_quickstart(capsys):
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    for divergence in ("kl", "renyi(0.5)"):
        result = quickstart.main(["--steps", "25", "--vocab", "1000", "--files", "8", "--divergence", divergence])
        assert result["last"] < 0.7 * result["first"]
        assert result["perplexity"] < 700
    assert "held-out perplexity" in capsys.readouterr().out
