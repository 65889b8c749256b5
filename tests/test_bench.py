"""`python -m kdkernels bench`: its reference is right, it refuses wrong results, and what it writes can be
read back."""

import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import oracle
import pytest
import torch
from names import APART, USUAL

from kdkernels import parse
from kdkernels.__main__ import main
from kdkernels.bench import contenders, forecast, linear, logits, measure, packages, report, screen
from kdkernels.bench.reference import reference


@pytest.mark.parametrize("T", [0.5, 2.0, 100.0, 1e4, 1e6, math.inf])
@pytest.mark.parametrize(
    "divergence",
    (*APART, "renyi(0.9999)", "renyi(5)", "skew_reverse_kl(0.3)"),
)
def test_reference(divergence, T):
    """Against 60 digits; T^2 belongs to the loss."""
    if math.isinf(T) and divergence in ("cross_entropy", "tvd"):
        pytest.skip("no limit")
    z, v = (torch.randn(2, 200, generator=torch.Generator().manual_seed(i)) * 3 for i in (1, 2))
    values, grads = reference(z, v, parse(divergence), T)
    for i in range(len(z)):
        D, g = oracle.divergence_row(z[i].numpy(), v[i].numpy(), divergence, T)
        square, slope = (1, 1) if math.isinf(T) else (np.longdouble(T) ** 2, np.longdouble(T))
        assert abs(values[i] / (square * D) - 1) < 1e-9
        assert np.abs(grads[i] - slope * g).max() < 1e-9 * np.abs(slope * g).max()


@pytest.mark.parametrize("T", [2.0, math.inf])
@pytest.mark.parametrize("divergence", USUAL)
def test_spellings_are_the_loss(divergence, T):
    """What the fused loss is compared with is the same loss."""
    if math.isinf(T) and divergence in ("cross_entropy", "tvd"):
        pytest.skip("no limit")
    z, v = (torch.randn(2, 200, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2))
    expected = reference(z, v, parse(divergence), T)[0].mean()
    for name, loss in contenders.spellings(parse(divergence), T).items():
        assert float(loss(z, v)) == pytest.approx(float(expected), rel=1e-9), name


LINEAR = ["bench", "--linear", "96x500x16", "--divergences", "kl", "--repeats", "1", "--device", "cpu"]
SMALL = ["bench", "--shapes", "8x5000", "--repeats", "1", "--device", "cpu"]


def test_table_json_and_plot(capsys, tmp_path):
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg")]
    cases = [
        *("--dtypes", "fp32", "fp16"),
        *("--divergences", "kl", "renyi(2)"),
        *("--temperatures", "1", "inf"),
    ]
    assert main([*SMALL, "--no-compile", *cases, *files]) == 0
    out = capsys.readouterr().out
    assert out.count("\nkdkernels ") == 8 and " x " in out and "kl_div(log_target=True)" in out
    results = json.loads((tmp_path / "b.json").read_text())
    assert results["machine"]["torch"] == torch.__version__ and len(results["cases"]) == 8
    for case in results["cases"]:
        for name, x in case["contenders"].items():
            assert 0 < x["ms_p20"] <= x["ms"] <= x["ms_p80"], name
        fused = case["contenders"]["kdkernels"]
        assert fused["speed_up"] == 1 and fused["loss_error"] < 1e-6
    assert "<svg" in (tmp_path / "b.svg").read_text()


def test_torch_compile_takes_part(capsys):
    assert main([*SMALL, "--dtypes", "fp32", "--divergences", "kl"]) == 0
    assert "torch.compile " in capsys.readouterr().out


@pytest.mark.parametrize("factor, upstream", [(1.001, 1.0), (1.0, 1.001)])
def test_no_time_for_a_wrong_result(monkeypatch, capsys, factor, upstream):
    """A wrong loss, and a right loss with a wrong gradient."""
    right = contenders.fused

    def wrong(divergence, T, backend):
        loss = right(divergence, T, backend)
        return lambda z, v: factor * (upstream * loss(z, v) + (1 - upstream) * loss(z, v).detach())

    monkeypatch.setattr(contenders, "fused", wrong)
    with pytest.raises(SystemExit, match="wrong here"):
        main([*SMALL, "--no-compile"])
    assert " x\n" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "bad, says",
    [
        (["--shapes", "8by5"], "8by5"),
        (["--shapes", "0x5"], "0x5"),
        (["--divergences", "renyi(inf)"], "orders"),
        (["--divergences", "hellinger"], "hellinger"),
        (["--temperatures", "0"], "temperature"),
        (["--divergences", "cross_entropy", "--temperatures", "inf"], "no limit"),
        (["--plot", "b.gif"], "b.gif"),
        (["--json", "nowhere/b.json"], "nowhere/b.json"),
        (["--json", "nowhere/b.json", "--linear"], "nowhere/b.json"),
        (["--json", "/dev/null"], "/dev/null"),
    ],
)
def test_bad_arguments(monkeypatch, bad, says):
    monkeypatch.setattr(forecast, "seconds", lambda *_: pytest.fail("ran"))
    with pytest.raises(SystemExit, match=says):
        main([*SMALL, *bad])


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="matplotlib"):
        main([*SMALL, "--plot", "b.svg"])


def test_memory_is_seen():
    """One gradient for the fused loss, several for eager: the measure itself, on a size that malloc gives
    back."""
    case = logits.Case(64, 40000, "fp32", "kl", 2.0)
    memory = {
        name: x["memory_in_gradients"]
        for name, x in logits.run(measure.Bench("cpu", 1, compiled=False), case)["contenders"].items()
    }
    if memory["kdkernels"] is None:
        pytest.skip("this system does not tell")
    assert 0.9 < memory["kdkernels"] < 1.3 and memory["kl_div(log_target=True)"] > 3.5


def test_packages_are_those_installed(monkeypatch):
    """None on a machine without them; KL, reverse KL and JSD at a finite temperature have some."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for found in (packages.kernels, packages.functions):
        assert found(parse("kl"), 2.0) == {}
    assert packages.from_hidden(parse("kl"), 2.0, gpu) == {} and packages.missing() == list(packages.PACKAGES)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: name)
    assert packages.missing() == []
    names = {  # from logits: Triton, PyTorch; from hidden states on a CPU; what a GPU adds to these
        "kl": (
            ["log_softmax + Liger KLDiv", "log_softmax + Liger JSD"],
            ["TRL generalized_jsd_loss", "torchtune forward KL"],
            ["Liger chunked JSD", "TRL chunked divergence", "torchtune chunked forward KL"],
            ["Liger Triton JSD", "flash-linear-attention KL"],
        ),
        "reverse_kl": (
            ["log_softmax + Liger JSD"],
            ["TRL generalized_jsd_loss", "torchtune reverse KL"],
            ["Liger chunked JSD", "TRL chunked divergence", "torchtune chunked reverse KL"],
            ["Liger Triton JSD"],
        ),
        "jsd(0.3)": (
            ["log_softmax + Liger JSD"],
            ["TRL generalized_jsd_loss"],
            ["Liger chunked JSD", "TRL chunked divergence"],
            ["Liger Triton JSD"],
        ),
        "cross_entropy": ([], ["torchtune forward KL"], ["torchtune chunked forward KL"], []),
        "renyi(2)": ([], [], [], []),
        "tvd": ([], [], [], []),
    }
    for name, (triton, plain, hidden, added) in names.items():
        which = parse(name)
        assert list(packages.kernels(which, 2.0)) == triton
        assert list(packages.functions(which, 2.0)) == plain
        assert list(packages.from_hidden(which, 2.0, cpu)) == hidden
        assert set(packages.from_hidden(which, 2.0, gpu)) == {*hidden, *added}
        for T in (math.inf,):
            assert packages.kernels(which, T) == packages.functions(which, T) == {}
            assert packages.from_hidden(which, T, gpu) == {}


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd(0.3)"])
@pytest.mark.parametrize("package", packages.PACKAGES)
def test_packages_have_the_same_loss(package, divergence):
    """Where they are installed: what runs here, Triton kernels under the interpreter, gives our loss and its
    gradient; torchtune's forward KL is higher by the teacher's entropy."""
    pytest.importorskip(package)
    which = parse(divergence)
    case = linear.Case(40, 60, 16, "fp32", divergence, 2.0)
    h, w, th, tw = inputs = case.inputs(torch.device("cpu"))
    check = linear.Check(case, inputs)
    mine = {"liger_kernel": "Liger", "trl": "TRL", "fla": "flash", "torchtune": "torchtune"}[package]
    found = packages.from_hidden(which, 2.0, torch.device("cuda"))
    of_package = [name for name in found if name.startswith(mine)]
    assert of_package or (package, divergence) in (
        ("fla", "reverse_kl"),
        ("fla", "jsd(0.3)"),
        ("torchtune", "jsd(0.3)"),
    )
    for name in of_package:
        assert max(check.errors(found[name], packages.VALUES.get(name))) < 1e-4, name
    if package == "liger_kernel":
        z, v = (h @ w.t()).detach().requires_grad_(), th @ tw.t()
        (x,) = torch.autograd.grad(contenders.fused(which, 2.0)(z, v), z)
        for name, loss in packages.kernels(which, 2.0).items():
            if name.endswith("KLDiv"):  # takes a number for a tensor, which the interpreter does not
                continue
            (g,) = torch.autograd.grad(loss(z, v), z)
            assert float((g - x).norm() / x.norm()) < 1e-4, name


def test_functions_are_the_same_loss():
    """TRL's and torchtune's, where they are installed; torchtune's forward KL is higher by the teacher's
    entropy."""
    z, v = logits.draw(4, 60)
    z.requires_grad_()
    for name in ("kl", "reverse_kl", "jsd(0.3)", "cross_entropy"):
        which = parse(name)
        for contender, loss in packages.functions(which, 2.0).items():
            check = logits.Check(logits.Case(4, 60, "fp32", name, 2.0), z, v)
            errors = check.errors(loss, packages.VALUES.get(contender))
            assert max(errors) < 1e-5, contender
            if contender in packages.VALUES and name == "kl":
                assert check.errors(loss)[0] > 1


PEERS = [
    "bench",
    "--peers",
    "--shapes",
    "8x500",
    "--linear",
    "96x500x16",
    "--repeats",
    "1",
    "--device",
    "cpu",
]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_peers(compiled, capsys, tmp_path):
    """Both parts, KL and JSD(1/2), fp32 and bf16, and what is installed of the others."""
    more = [] if compiled else ["--no-compile"]
    dtypes = ["--dtypes", "fp32"] if compiled else []
    assert main([*PEERS, *more, *dtypes, "--json", str(tmp_path / "p.json")]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "p.json").read_text())
    count = 2 if compiled else 4
    assert len(results["cases"]) == len(results["linear"]) == count and out.count("\nkdkernels ") == 2 * count
    assert {x["divergence"] for x in results["cases"]} == {"kl", "jsd(0.5)"}
    installed = importlib.util.find_spec
    for part, trl in (("cases", "TRL generalized_jsd_loss"), ("linear", "TRL chunked divergence")):
        for case in results[part]:
            assert ("torch.compile" in case["contenders"]) == compiled
            assert (trl in case["contenders"]) == bool(installed("trl"))
    assert ("Liger chunked JSD" in results["linear"][0]["contenders"]) == bool(installed("liger_kernel"))


def test_peers_that_are_missing_are_named(monkeypatch, capsys):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert main([*PEERS, "--no-compile", "--dtypes", "fp32", "--divergences", "kl"]) == 0
    out = capsys.readouterr().out
    assert f"left out: {', '.join(packages.PACKAGES)}" in out and "TRL" not in out
    for kind in (["--peers"], ["--linear"]):
        with pytest.raises(SystemExit, match="--plot"):
            main([*SMALL, *kind, "--plot", "p.svg"])


def unable(*_):
    raise ModuleNotFoundError("No module named 'flux'")


def test_a_library_that_cannot_run_is_left_out(monkeypatch, capsys):
    """With a line that says why; the others are measured."""
    monkeypatch.setattr(packages, "from_hidden", lambda *_: {"another": unable})
    assert main([*LINEAR, "--dtypes", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "left out: another: ModuleNotFoundError: No module named 'flux'" in out
    assert "\nkdkernels " in out and "\nanother" not in out
    monkeypatch.setattr(packages, "functions", lambda *_: {"another": unable})
    bench = measure.Bench("cpu", 1, compiled=False, peers=True)
    assert "another" not in logits.run(bench, logits.Case(8, 50, "fp32", "kl", 2.0))["contenders"]
    assert "left out: another" in capsys.readouterr().out


def test_a_compiler_that_is_missing_leaves_one_line_out(monkeypatch, capsys):
    monkeypatch.setattr(contenders, "compiled", lambda loss: unable)
    assert main([*SMALL, "--dtypes", "fp32", "--divergences", "kl"]) == 0
    out = capsys.readouterr().out
    assert "left out: torch.compile: " in out and "\ntorch.compile" not in out


def test_nothing_is_left_of_a_contender_that_raises():
    """In its second call; its gradient would be counted as memory."""
    case, calls = logits.Case(8, 50, "fp32", "kl", 2.0), iter([torch.sum])
    z, v = case.inputs(torch.device("cpu"))
    with pytest.raises(StopIteration):
        logits.Check(case, z, v).errors(lambda z, v: next(calls)(z))
    assert z.grad is None


def test_backends_are_lines_of_their_own(capsys, tmp_path):
    """The first is what all are compared with; every one is checked."""
    command = [
        *SMALL,
        "--no-compile",
        "--dtypes",
        "fp32",
        "--divergences",
        "kl",
        "--json",
        str(tmp_path / "b.json"),
        "--backends",
    ]
    assert main([*command, "cpu", "eager"]) == 0
    out = capsys.readouterr().out
    (case,) = json.loads((tmp_path / "b.json").read_text())["cases"]
    cpu, eager = (case["contenders"][f"kdkernels ({x})"] for x in ("cpu", "eager"))
    assert (
        cpu["speed_up"] == 1
        and eager["speed_up"] > 0
        and case["device"].startswith("cpu: ")
        and f"{case['device']}, copy" in out
    )
    assert "kdkernels" not in case["contenders"] and f"{eager['speed_up']:.1f} x" in out
    assert main([*LINEAR, "--dtypes", "fp32", "--backends", "eager"]) == 0
    assert "\nkdkernels (eager) " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"), [("cpv", "must be one of auto, cpu"), ("cuda", "it takes CUDA tensors, not cpu")]
)
@pytest.mark.parametrize("more", [[], ["--linear", "96x500x16"]])
def test_a_backend_that_cannot_run(name, says, more, monkeypatch):
    monkeypatch.setattr(forecast, "seconds", lambda *_: pytest.fail("ran"))
    with pytest.raises(SystemExit, match=says):
        main([*SMALL, *more, "--backends", name])


@pytest.mark.parametrize("more", [[], ["--linear", "96x500x16"]])
def test_what_was_measured_is_kept(more, monkeypatch, tmp_path):
    """Of a run that ends in its second case."""
    where = (linear if more else logits), "run"
    right, seen = getattr(*where), []

    def ends(*arguments, **options):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return right(*arguments, **options)

    monkeypatch.setattr(*where, ends)
    with pytest.raises(KeyboardInterrupt):
        main(
            [
                *SMALL,
                *more,
                "--no-compile",
                "--dtypes",
                "fp32",
                "bf16",
                "--divergences",
                "kl",
                "--json",
                str(tmp_path / "b.json"),
            ]
        )
    (case,) = json.loads((tmp_path / "b.json").read_text())["cases"]
    assert case["dtype"] == "fp32" and case["contenders"]


def test_json_goes_where_a_link_leads(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "b.json")
    report.write_json({"cases": []}, str(tmp_path / "link.json"))
    assert [x.name for x in sorted(tmp_path.iterdir())] == ["b.json", "link.json"] and (
        tmp_path / "link.json"
    ).is_symlink()


def test_linear(capsys, tmp_path):
    """Memory on paper, then what was measured; the loss is refused where it is wrong."""
    assert main([*LINEAR, "--dtypes", "fp32", "bf16", "--json", str(tmp_path / "l.json")]) == 0
    out = capsys.readouterr().out
    assert "on paper" in out and out.count("\nkdkernels ") == 2 and "eager kl_div(log_target=True)" in out
    for case in json.loads((tmp_path / "l.json").read_text())["cases"]:
        assert case["contenders"]["kdkernels"]["weight_error"] < (1e-5 if case["dtype"] == "fp32" else 0.1)
    with pytest.raises(SystemExit, match="TOKENSxVOCABxWIDTH"):
        main(["bench", "--linear", "96x500"])


# ---------------------------------------------------------------- what is printed

WITH_AND_WITHOUT = [
    pytest.param(True, marks=pytest.mark.skipif(screen.rich is None, reason="rich is not installed")),
    False,
]


@pytest.fixture
def rich(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(screen, "rich", None)
    screen._console.cache_clear()
    yield
    screen._console.cache_clear()


@pytest.mark.parametrize("rich", WITH_AND_WITHOUT, indirect=True)
def test_tables_have_80_columns(rich, capsys):
    """A long name breaks; figures, brackets that rich would read as markup too, stay as they are."""
    rows = [("kdkernels", "1.5", "1e-07"), ("a [red]name[/red] " + "of many words " * 8, "12345.6", "[1]")]
    screen.table(("", "ms", "err"), rows)
    out = capsys.readouterr().out
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) == 80 and lines[0].split() == ["ms", "err"]
    assert lines[1].split() == ["kdkernels", "1.5", "1e-07"] and lines[2].split()[-2:] == ["12345.6", "[1]"]
    name = " ".join(line[:60].strip() for line in lines[2:])
    assert "a [red]name[/red] of many" in name and name.count("words") == 8
    assert all(line.endswith(end) for line, end in zip(lines, ("err", "1e-07", "[1]"), strict=False))


@pytest.mark.parametrize("rich", WITH_AND_WITHOUT, indirect=True)
def test_text_has_80_columns(rich, capsys):
    screen.say("\nshort [bold]line\n" + "word " * 40 + "x" * 100)
    lines = capsys.readouterr().out.split("\n")
    assert lines[:2] == ["", "short [bold]line"] and lines[-1] == ""
    assert max(map(len, lines)) == 80 and "".join(lines).count("word") == 40


@pytest.mark.parametrize("rich", WITH_AND_WITHOUT, indirect=True)
@pytest.mark.parametrize("more", [[], ["--linear", "96x500x16"], ["--peers", "--linear", "96x500x16"]])
def test_a_run_has_80_columns(rich, more, monkeypatch, capsys):
    """On a machine with a long name, busy, with a contender that cannot run."""
    right = measure.machine
    name = "Genuine(R) Processor(R) Platinum 8480+ CPU with Many Words in Its Name @ 2.00 GHz"
    monkeypatch.setattr(measure, "machine", lambda device: right(device) | {"device": f"cpu: {name}"})
    monkeypatch.setattr(packages, "from_hidden", lambda *_: {"another": unable})
    monkeypatch.setattr(measure, "disturbed", lambda *_: "busy: " + "other programs " * 9)
    monkeypatch.setattr(measure.Bench, "peak_memory", lambda *_: 10**10)
    one = ["--no-compile", "--dtypes", "bf16", "--divergences", "kl", "--backends", "auto", "eager"]
    assert main([*SMALL, *more, *one]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert sum(line.startswith("busy: ") for line in lines) >= 2


@pytest.mark.parametrize("without", ["", "rich"])
def test_a_pipe_gets_whole_lines_at_once(without):
    """No control characters, whatever the environment asks for, and each table before the next is measured:
    the run ends without Python's own flush."""
    code = (
        f"import os, sys; sys.modules.update(dict.fromkeys({without.split()!r}));"
        "from kdkernels.__main__ import main;"
        f"main({[*SMALL, '--no-compile', '--dtypes', 'fp32', '--divergences', 'kl']!r}); os._exit(0)"
    )
    asks = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env=os.environ | asks
    )
    out = done.stdout.decode()
    assert "\nkdkernels " in out and out.endswith("\n")
    assert not [x for x in out if ord(x) < 32 and x != "\n"] and done.stderr == b""


@pytest.mark.skipif(screen.rich is None, reason="rich is not installed")
def test_a_terminal_gets_a_bar():
    """And the same lines, which it does not tear."""
    pty = pytest.importorskip("pty")
    code = (
        "from kdkernels.__main__ import main;"
        f"main({[*SMALL, '--no-compile', '--dtypes', 'fp32', '--divergences', 'kl', 'tvd']!r})"
    )
    main_end, its_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=its_end, env=environment)
    os.close(its_end)
    out = b""
    with contextlib.suppress(OSError):  # EIO when the process has ended
        while data := os.read(main_end, 1 << 16):
            out += data
    os.close(main_end)
    assert process.wait() == 0 and b"measuring" in out
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.decode()).replace("\r", "\n").split("\n")
    assert sum(line.startswith("kdkernels ") for line in lines) == 2


def test_how_long_it_will_take(monkeypatch):
    """In proportion to the steps; with the compiler's time; never without a number."""
    monkeypatch.setattr(measure.Bench, "times", lambda self, steps: {name: {"ms": 10.0} for name in steps})
    case, few = logits.Case(1600, 5000, "fp32", "kl", 2.0), 1600 // forecast.PART
    plain = measure.Bench("cpu", 5, compiled=False)
    once = forecast.seconds(plain, [(logits, case)])
    steps = 2 * (5 + forecast.ONCE)  # of two spellings
    assert once == pytest.approx(steps * 0.01 * 1600 / few + forecast.REFERENCE_SECONDS * 5000)
    assert forecast.seconds(plain, [(logits, case)] * 3) == pytest.approx(3 * once)
    compiled = measure.Bench("cpu", 5)
    assert forecast.seconds(compiled, [(logits, case)]) == pytest.approx(once + forecast.COMPILE_SECONDS)
    hidden = linear.Case(1600, 5000, 16, "fp32", "kl", 2.0)
    both = forecast.seconds(plain, [(logits, case), (linear, hidden)])
    assert both > once + steps / 2 * 0.01 * 1600 / few
    assert [forecast.words(x) for x in (0.1, 44, 130, 6000)] == [
        "about 10 seconds",
        "about 40 seconds",
        "about 2 minutes",
        "about 100 minutes",
    ]


def test_it_is_said_first(monkeypatch, capsys):
    """How long it will take, and that the machine is busy, before a case runs; after a case, that it was."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    moments = iter([(0.0, 0.0, 0.0), (1.0, 3.0, 1.0)])
    monkeypatch.setattr(measure.Watch, "_now", lambda self: next(moments))
    monkeypatch.setattr(forecast, "seconds", lambda *_: 240.0)
    monkeypatch.setattr(logits, "run", unable)
    with pytest.raises(ModuleNotFoundError):
        main([*SMALL, "--no-compile"])
    out = capsys.readouterr().out
    assert (
        "4 cases: about 4 minutes\nbusy: other programs take 2.0 of 4 cores; read ratios, not times\n" in out
    )


def test_busy(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert measure.disturbed(None) == measure.disturbed(0.4) == measure.disturbed(0.0, 0.3) == ""
    assert "take 0.5 of 4 cores;" in measure.disturbed(0.5)
    assert "4 cores, times vary by 31%;" in measure.disturbed(3.0, 0.31)
    assert measure.disturbed(None, 0.5).startswith("busy: times vary by 50%;")
    times = [{"ms": 2.0, "ms_p20": 1.8, "ms_p80": x} for x in (1.9, 2.6, 9.0)]
    assert measure.spread(dict(enumerate(times))) == pytest.approx(0.4)


def test_other_programs_are_seen():
    """A process that counts takes a core or a part of one; this one's own work does not count."""
    with measure.Watch() as quiet:
        pass
    if quiet.cores is None:
        pytest.skip("this system does not tell")
    ready = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", ready], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with measure.Watch() as busy:
            time.sleep(1)
        other.kill()
    assert busy.cores > 0.1


def test_this_process_is_not_another(monkeypatch):
    """Seconds of the clock, of all, of this one."""
    for own, others in ((6.0, 0.0), (1.0, 1.0), (7.0, 0.0)):
        moments = iter([(0.0, 1.0, 1.0), (5.0, 7.0, 1.0 + own)])
        monkeypatch.setattr(measure.Watch, "_now", lambda self, moments=moments: next(moments))
        with measure.Watch() as watch:
            pass
        assert watch.cores == pytest.approx(others)
    monkeypatch.setattr(measure.Watch, "_now", lambda self: None)
    with measure.Watch() as watch:
        pass
    assert watch.cores is None


def test_the_last_line_is_the_readmes(capsys):
    """The best eager spelling over kdkernels, where the README's case was measured, on a CPU."""
    names = {"kdkernels": 1.0, "kl_div(log_softmax, softmax)": 20.04, "kl_div(log_target=True)": 14.06}
    names |= {"torch.compile": 4.0, "TRL generalized_jsd_loss": 9.0}
    claim = report.README
    case = dict(divergence="kl", rows=claim.rows, vocab=claim.vocab, dtype=claim.dtype, temperature=2.0)
    case |= {"device": "cpu: x", "contenders": {name: {"speed_up": x} for name, x in names.items()}}
    line = report.compared([case | {"rows": 1}, case])
    assert line == (
        f"KL, 256 x 128256 bf16: 14.1 x as fast as eager; README: {claim.speed_up} x ({claim.machine})"
    )
    assert len(line) <= 80
    for other in ({"rows": 1}, {"dtype": "fp32"}, {"device": "cuda: x"}, {"temperature": 1.0}):
        assert report.compared([case | other]) == ""


def test_the_last_line_is_printed(monkeypatch, capsys):
    claim = report.Claim("kl", 8, 5000, "fp32", 2.0, 3.25, "a machine")
    monkeypatch.setattr(report.compared, "__defaults__", (claim,))
    assert main([*SMALL, "--no-compile", "--dtypes", "fp32"]) == 0
    assert re.fullmatch(
        r"KL, 8 x 5000 fp32: \d+\.\d x as fast as eager; README: 3\.25 x \(a machine\)",
        capsys.readouterr().out.splitlines()[-1],
    )


def test_processor_time(monkeypatch, tmp_path):
    """Waiting does not count in it, and it is one thread's."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n, seen=(seen := []): seen.append(n))
    right = contenders.spellings

    def waits(divergence, T):
        return {name: lambda *x, f=f: time.sleep(0.05) or f(*x) for name, f in right(divergence, T).items()}

    monkeypatch.setattr(contenders, "spellings", waits)
    one = ["--no-compile", "--dtypes", "fp32", "--divergences", "kl", "--json", str(tmp_path / "b.json")]
    for more, waited in ([], True), (["--processor-time"], False):
        assert main([*SMALL, *one, *more]) == 0
        results = json.loads((tmp_path / "b.json").read_text())
        assert (results["machine"].get("clock") == "processor time") != waited
        (case,) = results["cases"]
        times = [x["ms"] for name, x in case["contenders"].items() if name != "kdkernels"]
        assert len(times) == 2 and (min(times) >= 50) == waited
    assert seen == [1]
    with pytest.raises(SystemExit, match="for a CPU"):
        measure.Bench("meta", backends=(), processor_time=True)


def test_no_time_for_a_wrong_chunk(monkeypatch):
    right = contenders.linear.fused_linear_kd_loss
    monkeypatch.setattr(
        contenders.linear,
        "fused_linear_kd_loss",
        lambda h, *rest, **options: right(h * 1.01, *rest, **options),
    )
    with pytest.raises(SystemExit, match="wrong here"):
        main(["bench", "--linear", "96x500x16", "--dtypes", "fp32", "--divergences", "kl", "--device", "cpu"])
