"""The registry and the text forms; golden numbers through the public function; who imports whom."""

import ast
import itertools
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from names import USUAL
from rows import BACKENDS, DOUBLE_BACKENDS, make_rows

import kdkernels
from kdkernels import (
    JSD,
    KL,
    Alpha,
    Renyi,
    ReverseRenyi,
    SkewKL,
    SkewReverseKL,
    fused_kd_loss,
    parse,
)
from kdkernels.divergence import Form

PACKAGE = Path(kdkernels.__file__).parent
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


NUMBERS = (0, 0.5, 1, 2, 1 / 3, 1e-12, 0.9999)


@pytest.mark.parametrize(
    "divergence",
    [*map(parse, USUAL), JSD()]
    + [cls(a) for cls in (Renyi, ReverseRenyi) for a in (*NUMBERS, math.inf)]
    + [Alpha(a) for a in (*NUMBERS, -1, -2.5)]
    + [JSD(b) for b in NUMBERS if b <= 1]
    + [cls(b) for cls in (SkewKL, SkewReverseKL) for b in NUMBERS if b < 1],
    ids=str,
)
def test_text_forms_round_trip(divergence):
    assert parse(str(divergence)) == divergence == parse(f"  {divergence.text} ")
    assert pickle.loads(pickle.dumps(divergence)) == divergence and hash(divergence) == hash(
        parse(divergence.text)
    )
    assert fused_kd_loss(torch.ones(1, 3), torch.zeros(1, 3), divergence=divergence).item() >= 0


def test_other_names():
    assert parse("forward_kl") == KL() and parse(" js ") == JSD(0.5)
    z, v = torch.randn(2, 3, 7).unbind()
    for name, divergence in (("forward_kl", KL()), ("js", JSD())):
        assert torch.equal(fused_kd_loss(z, v, divergence=name), fused_kd_loss(z, v, divergence=divergence))
    for text in ("js(0.3)", "forward_kl()", "forward_js"):
        with pytest.raises(ValueError, match="divergence"):
            parse(text)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *itertools.product(BACKENDS, (torch.float32, torch.bfloat16)),
        *((b, torch.float64) for b in DOUBLE_BACKENDS),
    ],
)
def test_golden_numbers(backend, dtype):
    z, v = (torch.tensor(GOLDEN[x], dtype=dtype) for x in ("student_logits", "teacher_logits"))
    assert {x.split("(")[0] for x in GOLDEN["values"]} == set(kdkernels.divergence.REGISTRY) - {
        "logit_matching"
    }
    for name, by_temperature in GOLDEN["values"].items():
        for T, values in by_temperature.items():
            loss = fused_kd_loss(
                z, v, divergence=name, temperature=float(T), reduction="none", backend=backend
            )
            rel = 1e-12 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(
                loss.double(), torch.tensor(values, dtype=torch.float64), rtol=rel, atol=0
            )


def test_layers_import_one_way():
    """modules -> functional -> ops -> backends -> divergence -> its classes; a backend imports no other."""
    layers = [
        "terms",
        "form",
        "orders",
        "members",
        "divergence",
        "backends",
        "ops",
        "functional",
        "linear",
        "modules",
    ]

    def imported(path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [node.module] if node.module else [a.name for a in node.names]
                yield from (name.split(".")[0] for name in base)

    for i, layer in enumerate(layers):
        files = (
            sorted((PACKAGE / layer).rglob("*.py"))
            if (PACKAGE / layer).is_dir()
            else [PACKAGE / f"{layer}.py"]
        )
        for path in files:
            for name in imported(path):
                if path == PACKAGE / "backends" / "__init__.py":
                    assert name == "divergence", (path, name)
                elif name in layers:
                    assert layers.index(name) < i, (path, name)
                elif layer == "backends":
                    assert name not in ("eager", "cpu", "cuda"), (path, name)
    for path in (PACKAGE / "backends").glob("*.py"):
        assert "import_module" in path.read_text() or path.stem != "__init__"


def test_importing_loads_no_library():
    """Neither the shared library nor triton nor the compiler of torch comes with `import kdkernels`."""
    code = (
        "import torch, sys; before = set(sys.modules); import kdkernels; new = set(sys.modules) - before;"
        "assert not [m for m in new if m.split('.')[0] == 'triton' or m.startswith(('torch._dynamo', "
        "'torch._inductor'))], new;"
        "assert 'kdkernels.backends.cpu' not in new and 'kdkernels/_cpu.so' not in "
        "open('/proc/self/maps').read()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parameters_that_vanish_beside_one():
    """1 - lam rounds to 1: skew KL is KL, JSD is KL times beta; the other way round it would be another
    one."""
    assert parse("skew_kl(1e-17)").form == parse("kl").form
    for name in ("jsd", "mixed_kl"):
        with pytest.raises(ValueError, match=f"{name}: the other way round"):
            parse(f"{name}(1e-17)").reversed  # noqa: B018
    z, v = torch.randn(2, 3, 40)
    grads = []
    for name in ("kl", "jsd(1e-17)"):
        x = z.clone().requires_grad_()
        fused_kd_loss(x, v, divergence=name, backend="cpu").backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1] * 1e17, grads[0], rtol=1e-5, atol=1e-7)


def power_sum(p, q, order):
    return (p**order * q ** (1 - order)).sum(-1)


AS_WRITTEN = {
    "tsallis(0.3)": lambda p, q: (power_sum(p, q, 0.3) - 1) / (0.3 - 1),
    "tsallis(2.5)": lambda p, q: (power_sum(p, q, 2.5) - 1) / (2.5 - 1),
    "tsallis(1)": lambda p, q: (p * (p / q).log()).sum(-1),
    "reverse_tsallis(0.3)": lambda p, q: (power_sum(q, p, 0.3) - 1) / (0.3 - 1),
    "reverse_tsallis(1)": lambda p, q: (q * (q / p).log()).sum(-1),
    "squared_hellinger": lambda p, q: (p.sqrt() - q.sqrt()).square().sum(-1) / 2,
    "chi_square": lambda p, q: ((p - q) ** 2 / q).sum(-1),
    "reverse_chi_square": lambda p, q: ((p - q) ** 2 / p).sum(-1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", AS_WRITTEN)
def test_as_people_write_them(name, backend):
    """Value and both gradients of the formula as it stands in papers, differentiated by PyTorch."""
    dtype = torch.float64 if backend in DOUBLE_BACKENDS else torch.float32
    z, v = (x.to(dtype) for x in make_rows("plain", 3, 40))
    found = [x.clone().requires_grad_() for x in (z, v)]
    fused_kd_loss(
        *found, divergence=name, temperature=2.0, reduction="sum", teacher_grad=True, backend=backend
    ).backward()
    exact = [x.clone().double().requires_grad_() for x in (z, v)]
    q, p = (torch.softmax(x / 2.0, -1) for x in exact)
    loss = AS_WRITTEN[name](p, q)
    loss.sum().backward()
    rel = 1e-9 if dtype == torch.float64 else 1e-5
    rows = fused_kd_loss(z, v, divergence=name, temperature=2.0, reduction="none", backend=backend)
    torch.testing.assert_close(rows.double(), loss.detach(), rtol=rel, atol=0)
    for mine, right in zip(found, exact, strict=True):
        assert float((mine.grad - right.grad).norm()) <= rel * float(right.grad.norm())


def test_orders_of_tsallis_at_their_ends():
    """1 - 1e-9 and 1 + 1e-9 are nearly KL; the smallest order is that times reverse KL, and bounded by 1
    where masks make that infinite."""
    z, v = make_rows("plain", 3, 40, torch.float64)
    value = lambda name, v=v: fused_kd_loss(z, v, divergence=name, reduction="none")  # noqa: E731
    for order in ("0.999999999", "1.000000001"):
        torch.testing.assert_close(value(f"tsallis({order})"), value("kl"), rtol=1e-6, atol=0)
    least = 2.0**-53
    torch.testing.assert_close(value(f"tsallis({least})"), least * value("reverse_kl"), rtol=1e-9, atol=0)
    torch.testing.assert_close(value(f"reverse_tsallis({least})"), least * value("kl"), rtol=1e-9, atol=0)
    masked = v.masked_fill(torch.arange(40) % 3 == 0, -math.inf)
    lost = z.softmax(-1)[:, ::3].sum(-1)
    torch.testing.assert_close(value(f"tsallis({least})", masked), lost, rtol=1e-9, atol=0)
    for backend in BACKENDS:
        loss = fused_kd_loss(v.float(), v.float(), divergence="tsallis(1e300)", backend=backend)
        assert loss.item() == 0, backend
    for order in ("0", "-0.5", "1e-17", "inf", "nan"):
        for name in ("tsallis", "reverse_tsallis"):
            with pytest.raises(ValueError, match=r"Tsallis: order must be in \[2\^-53, inf\), got"):
                parse(f"{name}({order})")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [2.0, 0.05, math.inf])
def test_a_factor_of_alpha_is_honoured(backend, T):
    """Multiples of alpha: of a Tsallis of 3.157 two backends made 0.947."""
    z, v = make_rows("plain", 3, 40)
    z[0, 3] = -math.inf if T < math.inf else 0.0
    z[1, 0] += 60 * min(T, 1)
    names = {"tsallis(0.3)": (0.3, 0.3), "tsallis(2)": (2, 2), "reverse_tsallis(3)": (3, -2)}
    names |= {"squared_hellinger": (0.25, 0.5), "chi_square": (2, 2), "reverse_chi_square": (2, -1)}
    for name, (times, order) in names.items():
        found = []
        for divergence, factor in ((name, 1.0), (Alpha(order), times)):
            x = z.clone().requires_grad_()
            options = dict(temperature=T, t_squared=True, reduction="none", backend=backend)
            loss = fused_kd_loss(x, v, divergence=divergence, return_stats=True, **options)
            loss[0].backward(torch.full((3,), float(factor)))
            found.append((loss[0].detach() * factor, loss[1].divergence * factor, x.grad))
        for mine, right in zip(*found, strict=True):
            torch.testing.assert_close(mine, right, rtol=2e-5, atol=1e-7, equal_nan=True)


def test_a_form_refuses_what_its_family_does_not_have():
    for family, fields in (("kl", {"factor": 2.0}), ("mixture", {"order": 2.0}), ("alpha", {"mix": 0.5})):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} means nothing to the family {family}"):
            Form(family, **fields)
    with pytest.raises(ValueError, match="family must be one of kl, "):
        Form("hellinger")
