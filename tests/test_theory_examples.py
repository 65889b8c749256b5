"""The scripts on the theory run, draw their figures, and find what the theory predicts."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def theory(tmp_path_factory):
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("figures")
    return out, load("theory").main(["--quick", "--out", str(out)])


def test_figures(theory, tmp_path):
    """One small svg per figure, the same bits every time."""
    out, found = theory
    load("theory").main(["--quick", "--out", str(tmp_path)])
    for name in found:
        svg = (out / f"{name}.svg").read_bytes()
        assert b"<svg" in svg and len(svg) < 60_000
        assert svg == (tmp_path / f"{name}.svg").read_bytes()
    assert len(list(out.iterdir())) == len(found) == 4


def test_temperature(theory):
    found = theory[1]["temperature"]
    e = [math.exp(x) for x in (5.4, 0.2, -1.3)]
    assert found["zebra at T = 1"] == pytest.approx(e[1] / sum(e), rel=1e-12)
    assert found["zebra at T = 4"] == pytest.approx(e[1] ** 0.25 / sum(x**0.25 for x in e), rel=1e-12)


def test_high_temperature(theory):
    """The kernels reach the limit to the digits of fp32, and their gradient like 1/T; the usual spelling does
    neither."""
    found = theory[1]["high_temperature"]
    ours, eager = (
        {k.split(": ")[1]: x for k, x in found.items() if k.startswith(name)}
        for name in ("kdkernels", "kl_div")
    )
    assert ours["value at 1e6, off by"] < 3e-7 and ours["gradient at 1e6, off by"] < 1e-5
    assert ours["exponent of T in the gradient's distance, from 1e3"] == pytest.approx(-1, abs=1e-3)
    assert eager["value at 1e6, off by"] > 1 and eager["gradient at 1e6, off by"] > 1e-2


def test_orders(theory):
    """D_a grows with a, by more under a peaked teacher; w goes from q over p to the class of the greatest
    p/q."""
    found = theory[1]["orders"]
    assert found["peaked: least step"] > 0 and found["flat: least step"] > 0
    assert found["peaked: order inf over KL"] > 2 * found["flat: order inf over KL"]
    w = theory[1]["weights"]
    assert (
        w["w - q at 0"] < 1e-15
        and w["w - p at 1"] < 1e-15
        and w["w of the greatest p/q at inf"] == pytest.approx(1, abs=1e-15)
    )


def test_mean_logits(tmp_path, monkeypatch):
    """Over seeds the mean logit is zero within its error and has the predicted deviation; a second run takes
    up the first's seeds."""
    script = load("mean_logits")
    found = script.main(["--quick", "--out", str(tmp_path)])
    assert set(found) == {8, 20}
    for s in found.values():
        assert abs(s["mean"]) < 4 * s["error"]
        assert abs(s["against_expected"] - 1) < 4 / math.sqrt(2 * s["seeds"])
    assert found[20]["sd"] > found[8]["sd"] > 0.01
    drawn, measure = [], script.measure
    monkeypatch.setattr(
        script, "measure", lambda net, seed, images: drawn.append(seed) or measure(net, seed, images)
    )
    assert script.main(["--quick", "--out", str(tmp_path)]) == found and not drawn
    script.main(["--quick", "--seeds", "14", "--out", str(tmp_path)])
    assert drawn == [12, 13] * 2


@pytest.mark.parametrize(("depth", "parameters"), [(8, 83_892), (20, 278_324), (32, 472_756), (44, 667_188)])
def test_networks_are_those_of_the_table(depth, parameters):
    """One convolution per layer of the name but the last; the counts by hand from the widths 16, 32, 64."""
    import torch

    net = load("mean_logits").resnet(depth)
    main_path = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(main_path) == depth - 1
    assert sum(p.numel() for p in net.parameters()) == parameters
