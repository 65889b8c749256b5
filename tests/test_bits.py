"""The CPU library's bits are those of bits.json."""

import json

import bits
import pytest

from kdkernels.backends import cpu


@pytest.fixture(scope="module")
def known():
    library = cpu.library()
    if isinstance(library, str):
        pytest.skip(library)
    found = json.loads(bits.FILE.read_text())
    if bits.key() not in found:
        pytest.skip(
            f"no bits of {bits.key()} are known: python tests/bits.py --write, of a commit before the change"
        )
    return found


def test_bits(known):
    """Of the two best instruction sets. Where the arithmetic was changed on purpose: python tests/bits.py
    --write."""
    best = cpu.library().isa.rpartition("-")[2]
    changed, compared = bits.changed(known, ("v4", "v3") if best == "v4" else (best,))
    assert compared > 100 and changed == []


@pytest.mark.slow
def test_bits_of_the_other_levels(known):
    assert bits.changed(known)[0] == []


def test_a_change_shows(known, monkeypatch):
    """A bit of one digest, and a line that is missing."""
    line = "kl; T=1"
    monkeypatch.setattr(bits, "of_level", lambda level: ("here", {line: "0", "jsd(0.5); T=1": "1"}))
    assert bits.changed({"here": {line: "0", "jsd(0.5); T=1": "2", "gone": "3"}}, ("v3",)) == (
        ["here: jsd(0.5); T=1", "here: gone"],
        2,
    )
    x, y = bits.digest("kl", "T=1"), bits.digest("kl", "T=0.1, sum")
    assert x != y and x == bits.digest("kl", "T=1")
