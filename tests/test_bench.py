"""`python -m kdkernels bench`: its reference is right, it refuses wrong results, and what it writes can be
read back."""

import importlib.util
import json
import math
import sys
import types

import numpy as np
import oracle
import pytest
import torch
from names import APART, USUAL

from kdkernels import parse
from kdkernels.__main__ import main
from kdkernels.bench import contenders, linear, measure, report
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


SMALL = ["bench", "--shapes", "8x5000", "--repeats", "1", "--device", "cpu"]


def test_table_json_and_plot(capsys, tmp_path):
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg")]
    cases = [
        "--dtypes",
        "fp32",
        "bf16",
        "fp16",
        "--divergences",
        "kl",
        "renyi(2)",
        "--temperatures",
        "1",
        "4",
        "inf",
    ]
    assert main([*SMALL, "--no-compile", *cases, *files]) == 0
    out = capsys.readouterr().out
    assert out.count("\nkdkernels ") == 18 and " x " in out and "kl_div(log_target=True)" in out
    results = json.loads((tmp_path / "b.json").read_text())
    assert results["machine"]["torch"] == torch.__version__ and len(results["cases"]) == 18
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
    monkeypatch.setattr(measure.Bench, "run", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(SystemExit, match=says):
        main([*SMALL, *bad])


@pytest.mark.parametrize("missing", ["tqdm", "matplotlib"])
def test_what_is_missing_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=missing):
        main([*SMALL, "--plot", "b.svg"])


def test_memory_is_seen():
    """One gradient for the fused loss, several for eager: the measure itself, on a size that malloc gives
    back."""
    case = measure.Case(64, 40000, "fp32", "kl", 2.0)
    memory = {
        name: x["memory_in_gradients"]
        for name, x in measure.Bench("cpu", 1, compiled=False).run(case)["contenders"].items()
    }
    if memory["kdkernels"] is None:
        pytest.skip("this system does not tell")
    assert 0.9 < memory["kdkernels"] < 1.3 and memory["kl_div(log_target=True)"] > 3.5


LIBRARIES = ("liger_kernel", "trl", "fla")


def test_libraries_are_those_installed(monkeypatch):
    """None on a machine without them; KL, reverse KL and JSD at a finite temperature have some."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    case = linear.Case(4, 10, 8, "fp32", "kl", 2.0)
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    assert contenders.libraries(parse("kl"), 2.0) == {} == linear.libraries(case, gpu)
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: name)
    assert contenders.libraries(parse("renyi(2)"), 2.0) == contenders.libraries(parse("kl"), math.inf) == {}
    assert list(contenders.libraries(parse("kl"), 2.0)) == [
        "log_softmax + Liger KLDiv",
        "log_softmax + Liger JSD",
    ]
    assert list(contenders.libraries(parse("jsd(0.3)"), 2.0)) == ["log_softmax + Liger JSD"]
    assert list(linear.libraries(case, cpu)) == ["Liger chunked JSD", "TRL chunked divergence"]
    assert list(linear.libraries(case, gpu))[1::2] == ["Liger Triton JSD", "flash-linear-attention KL"]
    assert "flash-linear-attention KL" not in linear.libraries(
        linear.Case(4, 10, 8, "fp32", "reverse_kl", 2.0), gpu
    )
    assert linear.libraries(linear.Case(4, 10, 8, "fp32", "tvd", 2.0), gpu) == {}


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd(0.3)"])
@pytest.mark.parametrize("package", LIBRARIES)
def test_libraries_are_the_same_loss(package, divergence):
    """Where they are installed: what runs here, Triton kernels under the interpreter, gives our loss and its
    gradient."""
    pytest.importorskip(package)
    which = parse(divergence)
    case = linear.Case(40, 60, 16, "fp32", divergence, 2.0)
    h, w, th, tw = case.inputs(torch.device("cpu"))
    ours = linear.steps(case)["kdkernels"](h, w, th, tw)
    right = torch.autograd.grad(ours, (h, w))
    mine = {"liger_kernel": "Liger", "trl": "TRL", "fla": "flash"}[package]
    for name, step in linear.libraries(case, torch.device("cuda")).items():
        if name.startswith(mine):
            loss = step(h, w, th, tw)
            assert float(loss) == pytest.approx(float(ours), rel=1e-5), name
            for g, x in zip(torch.autograd.grad(loss, (h, w)), right, strict=True):
                assert float((g - x).norm() / x.norm()) < 1e-4, name
    if package == "liger_kernel":
        z, v = (h @ w.t()).detach().requires_grad_(), th @ tw.t()
        (x,) = torch.autograd.grad(contenders.fused(which, 2.0)(z, v), z)
        for name, loss in contenders.libraries(which, 2.0).items():
            if name.endswith("KLDiv"):  # takes a number for a tensor, which the interpreter does not
                continue
            (g,) = torch.autograd.grad(loss(z, v), z)
            assert float((g - x).norm() / x.norm()) < 1e-4, name


def test_functions_are_the_same_loss():
    """TRL's and torchtune's, where they are installed; torchtune's forward KL is higher by the teacher's
    entropy."""
    z, v = measure.logits(4, 60)
    z.requires_grad_()
    for name in ("kl", "reverse_kl", "jsd(0.3)", "cross_entropy"):
        which = parse(name)
        for contender, loss in contenders.functions(which, 2.0).items():
            check = measure._Check(measure.Case(4, 60, "fp32", name, 2.0), z, v)
            errors = check.errors(loss, contenders.VALUES.get(contender))
            assert max(errors) < 1e-5, contender
            if contender in contenders.VALUES and name == "kl":
                assert check.errors(loss)[0] > 1


def test_functions_are_those_installed(monkeypatch):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: name)
    names = {
        "kl": ["TRL generalized_jsd_loss", "torchtune forward KL"],
        "reverse_kl": ["TRL generalized_jsd_loss", "torchtune reverse KL"],
        "jsd(0.3)": ["TRL generalized_jsd_loss"],
        "cross_entropy": ["torchtune forward KL"],
        "renyi(2)": [],
    }
    for name, found in names.items():
        assert list(contenders.functions(parse(name), 2.0)) == found
    assert contenders.functions(parse("kl"), math.inf) == {}
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    assert contenders.functions(parse("kl"), 2.0) == {}


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


@pytest.mark.parametrize("compiled", [False, True])
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
    from kdkernels.bench import peers

    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    assert main([*PEERS, "--no-compile", "--dtypes", "fp32", "--divergences", "kl"]) == 0
    out = capsys.readouterr().out
    assert f"left out: {', '.join(peers.PACKAGES)}" in out and "TRL" not in out
    with pytest.raises(SystemExit, match="--plot"):
        main([*PEERS, "--plot", "p.svg"])


def unable(*_):
    raise ModuleNotFoundError("No module named 'flux'")


def test_a_library_that_cannot_run_is_left_out(monkeypatch, capsys):
    """With a line that says why; the others are measured."""
    monkeypatch.setattr(linear, "libraries", lambda case, device: {"another": unable})
    assert (
        main(
            [
                "bench",
                "--linear",
                "96x500x16",
                "--dtypes",
                "fp32",
                "--divergences",
                "kl",
                "--device",
                "cpu",
                "--repeats",
                "1",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "left out: another: ModuleNotFoundError: No module named 'flux'" in out
        and "\nkdkernels " in out
        and "\nanother" not in out
    )
    monkeypatch.setattr(contenders, "libraries", lambda which, T: {"another": unable})
    bench = measure.Bench("cpu", 1, compiled=False)
    monkeypatch.setattr(bench, "device", types.SimpleNamespace(type="like a GPU"))
    monkeypatch.setattr(bench, "_peak_memory", lambda step: None)
    monkeypatch.setattr(bench, "_times", lambda steps, repeats: {name: (1.0, 1.0, 1.0) for name in steps})
    monkeypatch.setattr(
        measure.Case,
        "logits",
        lambda case, device: [x.requires_grad_(i == 0) for i, x in enumerate(measure.logits(8, 50))],
    )
    assert "another" not in bench.run(measure.Case(8, 50, "fp32", "kl", 2.0))["contenders"]
    assert "left out: another" in capsys.readouterr().out


def test_nothing_is_left_of_a_contender_that_raises():
    """In its second call; its gradient would be counted as memory."""
    case, calls = measure.Case(8, 50, "fp32", "kl", 2.0), iter([torch.sum])
    z, v = case.logits(torch.device("cpu"))
    with pytest.raises(StopIteration):
        measure._Check(case, z, v).errors(lambda z, v: next(calls)(z))
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
    assert (
        main(
            [
                "bench",
                "--linear",
                "96x500x16",
                "--dtypes",
                "fp32",
                "--divergences",
                "kl",
                "--device",
                "cpu",
                "--backends",
                "eager",
            ]
        )
        == 0
    )
    assert "\nkdkernels (eager) " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"), [("cpv", "must be one of auto, cpu"), ("cuda", "it takes CUDA tensors, not cpu")]
)
@pytest.mark.parametrize("more", [[], ["--linear", "96x500x16"]])
def test_a_backend_that_cannot_run(name, says, more, monkeypatch):
    monkeypatch.setattr(measure.Bench, "run", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(SystemExit, match=says):
        main([*SMALL, *more, "--backends", name])


@pytest.mark.parametrize("more", [[], ["--linear", "96x500x16"]])
def test_what_was_measured_is_kept(more, monkeypatch, tmp_path):
    """Of a run that ends in its second case."""
    where = (linear, "run") if more else (measure.Bench, "run")
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
    small = [
        "bench",
        "--linear",
        "96x500x16",
        "--dtypes",
        "fp32",
        "bf16",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    assert main([*small, "--divergences", "kl", "--json", str(tmp_path / "l.json")]) == 0
    out = capsys.readouterr().out
    assert "on paper" in out and out.count("\nkdkernels ") == 2 and "eager kl_div(log_target=True)" in out
    for case in json.loads((tmp_path / "l.json").read_text())["cases"]:
        assert case["contenders"]["kdkernels"]["weight_error"] < (1e-5 if case["dtype"] == "fp32" else 0.1)
    with pytest.raises(SystemExit, match="TOKENSxVOCABxWIDTH"):
        main(["bench", "--linear", "96x500"])


def test_no_time_for_a_wrong_chunk(monkeypatch):
    right = linear.linear.fused_linear_kd_loss
    monkeypatch.setattr(
        linear.linear, "fused_linear_kd_loss", lambda h, *rest, **options: right(h * 1.01, *rest, **options)
    )
    with pytest.raises(SystemExit, match="wrong here"):
        main(["bench", "--linear", "96x500x16", "--dtypes", "fp32", "--divergences", "kl", "--device", "cpu"])
