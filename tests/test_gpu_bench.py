"""benchmarks/gpu without a GPU: every stage runs on the CPU, a fault costs itself alone, results survive, the
report says what it means."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import cases, drive, log, pack, report, tools
from benchmarks.gpu.cases import Case
from benchmarks.gpu.log import suspects, wrong_cases
from benchmarks.gpu.setting import Setting
from kdkernels import fused_kd_loss

ROOT = Path(__file__).parent.parent
CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """(what the rehearsal printed, its folder)."""
    folder = tmp_path_factory.mktemp("rehearsal")
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "benchmarks/gpu/run.sh", folder, "--rehearse"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, folder


@pytest.mark.slow
def test_every_stage_is_rehearsed(rehearsed):
    """All of them get to their end, and what can be right on a CPU is."""
    printed, folder = rehearsed
    outcomes = log.Log(folder / "results.jsonl").outcomes()
    steps = [x for key, x in outcomes.items() if key.startswith("step ")]
    assert len(steps) == 6 and all(x["finished"] for x in steps), (folder / "log.txt").read_text()[-3000:]
    planned = {
        x
        for step in (drive.HERE, drive.right(1), *drive.TIMES, *drive.AFTER)
        for stage in step.stages
        for x in stage.split("+")
    }
    run = {
        x
        for key in outcomes
        if key.startswith("step ")
        for stage in key.split()[1:]
        for x in stage.split("+")
    }
    assert planned <= run
    for backend in ("triton", "cuda"):
        found = [x for key, x in outcomes.items() if key.startswith(f"right {backend} ")]
        assert len(found) == 16 and all(x["right"] for x in found)
    planted = [key for key in outcomes if key.startswith("planted ")]
    assert [key for key, x in outcomes.items() if "error" in x and key not in planted] == []
    simple = [x["loss"] for key, x in outcomes.items() if key.startswith("time simple") and "2x500" in key]
    exact = outcomes["time cuda kl 2x500 bf16"]["loss"]
    assert len(simple) == 4 and simple == pytest.approx([exact] * 4, rel=1e-4)
    if "skipped" not in outcomes.get("launches", {}):
        found = outcomes["launches kl"]
        assert found["launches"] == 2 and found["compiled"] >= 2 and found["compiled_again"] == 0
    assert "A rehearsal on a CPU" in printed and "| cuda | wide | KL |" in printed


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "crash", "hang"])
def test_a_fault_costs_itself_alone(rehearsed, fault):
    """What was measured before it is there, and another process has gone on with what comes after."""
    outcomes = log.Log(rehearsed[1] / "results.jsonl").outcomes()
    assert "error" in outcomes[f"planted {fault}"]
    assert all("error" not in outcomes[f"planted {fault} {when}"] for when in ("before", "after"))


@pytest.mark.slow
def test_what_is_done_is_not_done_again(rehearsed, tmp_path):
    """A second call on the results of the first begins nothing."""
    shutil.copy(rehearsed[1] / "results.jsonl", tmp_path / "earlier.jsonl")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.drive",
        tmp_path / "new",
        "--rehearse",
        "--resume",
        tmp_path / "earlier.jsonl",
    ]
    subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert (tmp_path / "new" / "results.jsonl").read_bytes() == (tmp_path / "earlier.jsonl").read_bytes()


def test_a_box_and_a_budget_are_kept(tmp_path, capsys):
    """A step that has no end is over when its seconds are, its case may be tried again, and no step begins
    that cannot be ended in time."""
    driver = drive.Driver(tmp_path, 60, rehearse=True)
    start = time.time()
    driver.take(drive.Step(("planted:hang",), 1), 1)
    assert time.time() - start < 20
    assert driver.log.outcomes()["step planted:hang"]["ends"] == ["cut"]
    driver.end = time.time() + drive.LEAST - 1
    driver.run([drive.HERE])
    assert driver.log.outcomes()["stopped"]["before"] == "here+copy" and "here" not in driver.log.outcomes()


def test_nothing_outlives_its_process():
    """Also what has become a group of its own, as a program under compute-sanitizer."""
    code = (
        "import subprocess, time; subprocess.Popen(['sleep', '60'], process_group=0); "
        "print('begun', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    drive.end_session(child.pid)
    assert child.wait(10) == -signal.SIGKILL

    def left():
        stats = [
            x.read_text().rsplit(")", 1)[1].split() for x in Path("/proc").glob("[0-9]*/stat") if x.exists()
        ]
        return [x for x in stats if int(x[3]) == child.pid and x[0] != "Z"]

    stop = time.time() + 10
    while left() and time.time() < stop:
        time.sleep(0.05)
    assert not left()


def test_log(tmp_path, capsys):
    """Outcomes are kept, what was cut is tried once more, what never ends is not tried a third time; a
    half-written line is passed over."""
    calls = []
    found = log.Log(tmp_path / "x.jsonl", card="none", by="a 0/1")
    for _ in range(2):
        found.once("number", lambda: calls.append(1) or {"ms": 1.0}, 5)
        found.once("error", lambda: calls.append(2) or 1 / 0, 5)
        found.once("refusal", lambda: calls.append(3) or sys.exit("wrong here"), 5)
    assert (
        calls == [1, 2, 3]
        and "ZeroDivisionError" in found.outcomes()["error"]["error"]
        and found.outcomes()["number"]["card"] == "none"
    )
    assert "SystemExit: wrong here" in found.outcomes()["refusal"]["error"]
    for tries in (1, 2):
        found.write("slow", begun=True)
        assert found.unfinished("a 0/1") == ["slow"] and found.unfinished("b 0/1") == []
        found.write("slow", cut=True)
        assert "slow" not in found.outcomes() and found.unfinished("a 0/1") == []
        found.once("slow", lambda: {"ms": 2.0}, 5) if tries == 2 else None
    assert "slow" not in found.outcomes()
    with open(found.path, "a") as file:
        file.write('{"key": "half')
    assert len(found.outcomes()) == 3


def test_the_course(tmp_path, capsys):
    """All right: times, shapes, tuning, tests. Something wrong: the sanitizers on that very case come before
    any time."""
    found = log.Log(tmp_path / "x.jsonl")
    assert [str(x) for x in drive.course(found)] == ["here+copy"]  # no device
    found.write("here", cache_fits=True)
    found.write("right cuda kl T=2 9x128256 bfloat16", right=True)
    names = [str(x) for x in drive.course(found)]
    assert names[1] == "right:triton right:cuda in 2" and not [x for x in names if "wrong" in x]
    assert [x for x in names if x in ("shapes", "tests")] == ["shapes", "tests"] and names.index("shapes") > 2
    found.write("here", cache_fits=False)
    found.write("right cuda tvd T=2 9x128256 bfloat16", right=False)
    found.write("right triton kl T=2 9x128256 bfloat16", error="no outcome")
    names = [str(x) for x in drive.course(found)]
    assert (
        names[1] == "right:triton right:cuda in 8"
        and names[2].startswith("sanitize:wrong")
        and names[3].startswith("time:")
    )
    assert wrong_cases(found) == [
        ("cuda", "tvd T=2 9x128256 bfloat16"),
        ("triton", "kl T=2 9x128256 bfloat16"),
    ]
    assert Setting(found).wrong("cuda") == {"tvd"} and Setting(found).wrong("triton") == {"kl"}
    assert len(suspects(found)) == 2
    found.write("right triton kl T=2 9x128256 bfloat16", error="RuntimeError: PassManager::run failed")
    assert len(wrong_cases(found)) == 2 and suspects(found) == [("cuda", "tvd T=2 9x128256 bfloat16")]
    assert [str(x) for x in drive.named("shapes,ncu:cuda,right:cuda")] == [
        "shapes",
        "ncu:cuda",
        "right:cuda in 8",
    ]


@pytest.mark.parametrize("case", cases.covering(((3, 301, "bfloat16"), (4096, 50257, "float32"))), ids=str)
def test_a_case_is_its_text(case):
    assert Case.parse(str(case)) == case


@pytest.mark.parametrize("what", ["loss", "gradient", "one row", "nan"])
@pytest.mark.parametrize("case", cases.covering(((3, 301, "bfloat16"), (2, 700, "float32"))), ids=str)
def test_what_is_wrong_is_seen(case, what, monkeypatch):
    """The comparison with fp64 lets nothing through that is off by more than the bounds."""
    right = cases.run

    def off(*call):
        loss, grad, seconds = right(*call)
        if what == "loss":
            loss = loss * (1 + 1e-3)
        elif what == "gradient":
            grad = grad * (1 + (2e-2 if case.dtype == "bfloat16" else 1e-2))
        elif what == "one row":
            grad[-1] = grad[-1].roll(1)
        else:
            grad[-1, 0] = torch.nan
        return loss, grad, seconds

    assert cases.examine(case, "cpu", "cpu")["right"]
    monkeypatch.setattr(cases, "run", off)
    assert not cases.examine(case, "cpu", "cpu")["right"]


def test_each_test_is_a_line(tmp_path, monkeypatch):
    """Passed, failed, or taken along with its process; those of an earlier run are left out."""
    (tmp_path / "test_some.py").write_text(
        "import os\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "def test_fatal(): os._exit(3)\n"
        "def test_later(): pass\n"
    )
    lines = tmp_path / "lines.jsonl"
    log.Log(lines).write("test test_some.py::test_good", outcome="passed", seconds=0.0)
    environment = {
        "KD_TEST_LINES": str(lines),
        "KD_TEST_SINCE": f"{time.time() + 1:.1f}",
        "PYTHONPATH": str(ROOT),
    }
    command = "-m pytest -q -s -n 1 -p benchmarks.gpu.pytest_lines -p no:cacheprovider test_some.py".split()
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    outcomes = {key.split("::")[1]: x["outcome"] for key, x in log.Log(lines).outcomes().items()}
    assert outcomes == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_fatal": "failed",
        "test_later": "passed",
    }, done.stdout
    assert (
        "test_bad: outcome=failed" in done.stderr
        and "test_later" not in done.stderr
        and "test_good" not in done.stdout
    )


@pytest.mark.slow
def test_gpu_tests_under_the_interpreter_are_an_error(tmp_path):
    """On a machine with a GPU they would all be skipped, and seem to have passed."""
    (tmp_path / "with_a_gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "TRITON_INTERPRET": "1"}

    def collect(expression):
        command = [
            "-m",
            "pytest",
            "-q",
            "-p",
            "with_a_gpu",
            "--collect-only",
            "-m",
            expression,
            "tests/test_gpu.py",
        ]
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    done = collect("gpu")
    assert done.returncode == 4 and "TRITON_INTERPRET=0" in done.stderr
    assert "TRITON_INTERPRET=0" not in collect("not slow").stderr


def test_ncu_figures():
    head = [
        "ID",
        "Kernel Name",
        "gpu__time_duration.sum",
        "dram__bytes_read.sum",
        "dram__bytes_write.sum",
        "launch__registers_per_thread",
    ]
    rows = [
        head,
        ["", "", "ns", "byte", "byte", "register/thread"],
        ["0", "loss_rows", "1,050,000", "2100000000", "1050000000", "116"],
    ]
    text = "==PROF== a line of ncu's own\n" + "\n".join(",".join(f'"{x}"' for x in row) for row in rows)
    found = tools.figures(text)
    assert found == {
        "kernel": "loss_rows",
        "ns": 1.05e6,
        "bytes_read": 2.1e9,
        "bytes_written": 1.05e9,
        "registers": 116.0,
    }
    assert tools.figures("==ERROR== no counters") == {}


def result(cuda_ms=1.2, **changes):
    """Lines as an H100 might give: a copy of 3 TB/s, KL in 1.5 ms with Triton."""
    times = {
        "triton": 1.5,
        "cuda": cuda_ms,
        "kl_div(log_target=True)": 9.0,
        "torch.compile": 4.0,
        "log_softmax + Liger KLDiv": 6.0,
    }
    lines = [
        {"key": "here", "torch": "2.11.0"},
        {"key": "time copy 4096x128256 bf16", "ms": 0.7, "gb_s": 3000.0},
    ]
    lines += [
        {"key": f"time {x} kl 4096x128256 bf16", "ms": ms, "p20": ms, "p80": ms, "memory": 1.0}
        for x, ms in times.items()
    ]
    lines += [
        {
            "key": f"right {x} kl T=2 9x128256 bfloat16",
            "right": True,
            "value_of_bound": 0.5,
            "gradient_of_bound": 0.25,
        }
        for x in report.BACKENDS
    ]
    lines += [
        {"key": f"tune triton kl MOST_PARTS={x}", "ms": ms, "default": x == 16}
        for x, ms in ((8, 1.2), (16, 1.5))
    ]
    lines += [
        {"key": "test a::b", "outcome": "failed", "error": "E assert"},
        {"key": "tests", "failed": 1, "passed": 7},
    ]
    lines += [{"key": "time half kl 4096x128256 bf16", "begun": True}]
    return [x | {"card": CARD} | changes for x in lines]


def test_report():
    text = report.text(result())
    assert text.startswith(f"# {CARD}") and "a copy moves 3.00 TB/s" in text
    for line in (
        "| cuda | 1.200 | 1.200, 1.200 | 0.88 | 1.00 |",
        "| triton | MOST_PARTS | KL | 16 | 8 | 1.25 x | 8: 1.200, 16: 1.500 |",
        "| triton | KL, V >= 128k: of copy speed | at least 0.78 | 0.70 | not reached |",
        "| cuda | KL: times as fast as torch.compile | at least 4.5 | 3.33 | not reached |",
        "| triton | KL: times as fast as the best eager spelling | at least 6 | 6.00 | reached |",
        "| cuda | KL, V = 256k: of copy speed | at least 0.85 |  | not measured |",
        "7 passed, 1 failed\n* `a::b`: E assert",
        "`auto` should take cuda.",
    ):
        assert line in text, line
    assert "half" not in text
    assert "`auto` should take triton." in report.text(result(cuda_ms=1.6))
    wrong = [x | ({"right": False} if x["key"].startswith("right cuda") else {}) for x in result()]
    assert "cuda is not right here" in report.text(wrong) and "`auto` should take cuda" not in report.text(
        wrong
    )
    assert "beyond its bound" in report.text(wrong)
    assert report.readme(result()) == [
        f"| KL, 4096 x 128256 bf16, {CARD}, cuda | **1.20** | 9.0 (7.5 x) | 4.0 (3.3 x) |"
    ]


def mismatches(root):
    """What README and docs/results say otherwise than the results of GPUs that are committed."""
    found, readme = [], (root / "README.md").read_text()
    for path in report.kept(root):
        lines = log.Log(path).lines()
        page = root / "docs" / "results" / f"{path.stem}.md"
        found += [] if page.exists() and page.read_text() == report.text(lines) else [str(page)]
        found += [x for x in report.readme(lines) if x not in readme]
    return found


def test_results_of_gpus_are_quoted(tmp_path, monkeypatch, capsys):
    assert mismatches(ROOT) == []
    for folder in ("benchmarks/results", "docs/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(x) + "\n" for x in result()))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "run.jsonl"), "--write"])
    report.main()
    (line,) = report.readme(result())
    assert capsys.readouterr().out.rstrip().endswith(line)
    (tmp_path / "README.md").write_text("| nothing |")
    assert mismatches(tmp_path) == [line]
    (tmp_path / "README.md").write_text(line)
    assert mismatches(tmp_path) == []
    page = tmp_path / "docs" / "results" / "gpu_nvidia_h100_80gb_hbm3.md"
    page.write_text(page.read_text().replace("0.88", "0.98"))
    assert mismatches(tmp_path) == [str(page)]


def test_the_pack(monkeypatch, tmp_path):
    """Nothing that is brought is in the repository's own files, and a machine without Python 3.12 is told
    so."""
    names = [*pack.LIBRARIES, ".gpu/manifest.json", ".venv-gpu/ready"]
    ignored = subprocess.run(
        ["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert ignored == names or not (ROOT / ".git").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PYTHON312", raising=False)
    if sys.version_info[:2] != (3, 12):
        monkeypatch.setenv("PYTHON312", sys.executable)  # another version
    with pytest.raises(SystemExit, match="needs Python 3.12"):
        pack.python312()


def test_the_yardstick():
    """The simple kernel's loss and gradient, each variant, on whole and broken tiles, against fp64."""
    pytest.importorskip("triton")
    from benchmarks.gpu import simple_kl

    for vocab in (300, 2048, 5000):
        z, v, _ = Case("kl", rows=2, vocab=vocab, dtype="float32").inputs("cpu")
        x = z.detach().double().requires_grad_()
        exact = fused_kd_loss(x, v.double(), temperature=2.0, t_squared=True, backend="eager")
        exact.backward()
        for name, loss in simple_kl.variants().items():
            z.grad = None
            value = loss(z, v)
            value.backward()
            assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-4), name
            assert float((z.grad.double() - x.grad).norm() / x.grad.norm()) < 1e-4, name
