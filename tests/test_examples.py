"""The distillation example learns and can be interrupted; the benchmark suite and the accuracy figure run."""

import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import distill_text
import mean_logits
import pytest
import theory
import torch
from progress import Progress

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return distill_text, distill_text.main(["--quick", "--out", str(out)]), out


def test_distillation_learns(distilled):
    example, results, out = distilled
    students = results["students"]
    assert set(students) == set(example.LOSSES)
    for name, x in students.items():
        first, last = x["curve"][0][1], x["curve"][-1][1]
        # at first it knows the tokens' frequencies
        assert last < (first if name == "hard labels" else 0.93 * first), name
    assert results["teacher"]["perplexity"] < min(x["perplexity"] for x in students.values())
    table = next(out.rglob("distill_text.md")).read_text()
    assert all(f"| {name} |" in table for name in students)
    assert "<svg" in next(out.rglob("distill_text.svg")).read_text()


def test_fused_and_eager_students_are_the_same(distilled):
    """The same loss in two spellings, from the same weights on the same batches, ends in the same place."""
    fused, eager = (distilled[1]["students"][name] for name in ("KL", "KL, eager PyTorch"))
    assert fused["perplexity"] == pytest.approx(eager["perplexity"], rel=1e-3)


def test_interrupted_distillation_goes_on(distilled, tmp_path, monkeypatch):
    """Stopped in the teacher, then in the students, it ends with the figures of the run that was not."""
    example, whole, _ = distilled
    keep = example.keep
    for last in ("teacher", "students"):

        def stop(path, *args, last=last, **more):
            keep(path, *args, **more)
            if path.stem == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(example, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            example.main(["--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(example, "keep", keep)
    results = example.main(["--quick", "--out", str(tmp_path)])
    for name, x in results["students"].items():
        assert x["perplexity"] == whole["students"][name]["perplexity"], name
        assert [tuple(point) for point in x["curve"]] == [
            tuple(point) for point in whole["students"][name]["curve"]
        ]


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accuracy_figure(tmp_path):
    accuracy = benchmark("accuracy")
    records = accuracy.main(["--out", str(tmp_path), "--shape", "2x3000", "--points", "4"])
    assert "<svg" in (tmp_path / "docs/figures/accuracy.svg").read_text()
    assert len((tmp_path / "benchmarks/results/accuracy.csv").read_text().splitlines()) == len(records) + 1
    fused = [r for r in records if r["contender"] == "kdkernels"]
    assert len(fused) == 12 and all(r["loss_error"] < 2e-6 and r["grad_error"] < 1e-6 for r in fused)
    assert any(r["grad_error"] > 1e-2 for r in records)  # eager's, at 1e6: the figure has something to show


def test_costs_of_divergences(tmp_path, monkeypatch, capsys):
    """A line for each, and none for a wrong one."""
    costs = benchmark("divergences")
    monkeypatch.setattr(costs, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(costs, "SPREADS", (3.0,))
    costs.main(["--shapes", "2x3000", "--repeats", "1", "--write", "--machine", "a machine"])
    text = (tmp_path / "page.md").read_text()
    assert "a machine, " in text and all(f"| `{name}` |" in text for name in costs.DIVERGENCES)
    monkeypatch.setattr(costs, "DTYPES", {"fp32": (torch.float32, 0.0)})
    with pytest.raises(SystemExit, match="wrong here"):
        costs.main(["--shapes", "2x3000"])


def test_benchmark_suite():
    """Its checks, on the small cases; times are for `make regress`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "benchmarks",
        "--benchmark-disable",
        "-k",
        "tiny or one-row or log_softmax",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


# ---------------------------------------------------------------- where stdout is no terminal


class Pipe:
    """What arrives at the other end of a pipe, which sees nothing before it is flushed."""

    def __init__(self, monkeypatch):
        self.raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(self.raw))

    def arrived(self) -> str:
        return self.raw.getvalue().decode()


def test_progress_in_a_file_is_lines(monkeypatch):
    """Each arrives when its step is done; about ten in all, the last one among them."""
    pipe, counts = Pipe(monkeypatch), []
    for step in (steps := Progress(range(3, 40), "steps", done=3)):
        steps.note(f"loss {step}")
        counts.append(pipe.arrived().count("\n"))
    lines = pipe.arrived().splitlines()
    assert counts[0] == 0 and counts[2] == 1 and counts[-1] == len(lines) - 1 == 9
    assert all(re.fullmatch(r"steps: \d+ of 40 steps, \d+ s, loss \d+", x) for x in lines)
    assert "40 of 40" in lines[-1] and lines[-1].endswith("loss 39") and "4 of 40" in lines[0]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for step in (steps := Progress(range(3), "steps")):
        steps.note(f"loss {step}")
    out, err = capsys.readouterr()
    assert out == "" and "steps" in err and "loss 1" in err and "\r" in err


EXAMPLES = {
    distill_text: ["learning a vocabulary of 600 from", "teacher: 60 of 120 steps", "students: 48 of 48"],
    mean_logits: ["mean over seeds", "ResNet-8: 6 of 12 seeds", r"ResNet-20 .* \d+ s$", "12 seeds"],
    theory: [r"temperature\.svg$", "zebra at T = 4"],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda x: x.__name__)
def test_an_example_in_a_file_is_lines(example, monkeypatch, tmp_path, capfd):
    """That have all arrived when it ends, with no carriage return and nothing on stderr."""
    pipe = Pipe(monkeypatch)
    example.main(["--quick", "--out", str(tmp_path)])
    text = pipe.arrived()
    assert text.endswith("\n") and "\r" not in text and capfd.readouterr().err == ""
    for line in EXAMPLES[example]:
        assert re.search(line, text, re.M), line
