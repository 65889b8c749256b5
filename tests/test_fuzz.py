"""Some hundred calls of the fuzzer, its table of known faults, and that it finds what is planted: `make fuzz`
draws many more."""

import re

import fuzz
import numpy as np
import pytest
import torch
from calls import Case, snippet
from expected import judge

import kdkernels

# D beyond a long double
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in conversion:RuntimeWarning")


@pytest.mark.parametrize("seed", range(8))
def test_drawn_calls_are_right(seed):
    wrong = [
        snippet(*fuzz.shrunk(case, failure, fuzz.is_known, tries=100))
        for _, case, failure in fuzz.search(seed, 100)
    ]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("name", fuzz.KNOWN)
def test_known_faults_are_still_there(name):
    """Who mends one deletes its entry."""
    known = fuzz.KNOWN[name]
    failure = judge(known.example)
    assert failure, f"{name}: mended; delete it from fuzz.KNOWN"
    assert known.excuses(known.example, failure), failure


def test_a_seed_draws_the_same_calls():
    assert [snippet(fuzz.draw(3, i)) for i in range(20)] == [snippet(fuzz.draw(3, i)) for i in range(20)]


def test_what_is_planted_is_found_and_shrunk(monkeypatch, capsys):
    """A gradient that is 1e-4 too large in a class is found, and comes out as a program of two classes at
    most that runs."""
    right = kdkernels.tempered_log_softmax
    monkeypatch.setattr(
        kdkernels, "tempered_log_softmax", lambda z, *rest, **more: right(z, *rest, **more) * (1 + 1e-4)
    )
    monkeypatch.setattr(fuzz, "CALLS", {"tempered_log_softmax": 1.0})
    threads = torch.get_num_threads()
    try:
        assert fuzz.main(0, 5, lambda case, failure: False) == 1
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    program = out[: out.index("\n\n")] if "\n\n" in out else out
    assert (
        "tempered_log_softmax(z" in program
        and len(re.search(r"z = torch.tensor\((\[.*?\]+)", program)[1].split(",")) <= 2
    )
    exec(program, {})


def test_rows_of_an_expanded_teacher_are_one():
    case = Case(
        tensors=dict(z=np.ones((3, 2)), v=np.array([[1.0, 2], [0, 0], [5, 5]])), layouts=("plain", "expanded")
    )
    assert judge(case) is None
