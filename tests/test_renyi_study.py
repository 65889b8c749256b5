"""The study of orders runs, takes up where it stopped, and its document says what its results say."""

import contextlib
import csv
import math
from pathlib import Path

import pytest
import torch

for needed in ("matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)

import renyi_study  # noqa: E402

DIGITS = ["--quick", "--data", "digits"]
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("renyi")
    with (out / "log").open("w") as log, contextlib.redirect_stdout(log):
        found = renyi_study.main([*DIGITS, "--out", str(out)])["digits"]
        arrived = (out / "log").read_text(encoding="utf-8")  # before the file is closed
    return out, found, arrived


def test_a_file_gets_lines(quick):
    text = quick[2]
    assert text.count(" runs, ") == 10 and "renyi_digits: 21 of 21 runs, " in text
    assert "| KL, T = 4" in text and text.endswith("renyi_digits.csv\n") and "\r" not in text


@pytest.fixture
def trained(monkeypatch):
    """What is trained from here on."""
    calls, train = [], renyi_study.train
    monkeypatch.setattr(renyi_study, "train", lambda *args: calls.append(args[2:]) or train(*args))
    return calls


def test_rows(quick):
    """Two seeds of the teacher and, per optimizer, of hard labels, logits and each order, the control where
    it is another loss."""
    out, results, _ = quick
    with (out / "renyi_digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 2 * (2 + 2 * 3 + 2))
    assert len({tuple(row[k] for k in renyi_study.KEY) for row in rows}) == len(rows)
    assert {row["alpha"] for row in rows if row["weight"] == renyi_study.CONTROL} == {"0.5"}
    assert {row["alpha"] for row in rows if row["loss"] == "renyi"} == {"0.5", "1", "inf"}
    assert (out / "renyi_digits.svg").stat().st_size < 80_000
    assert "KL, T = 4" in (out / "renyi_digits.md").read_text(encoding="utf-8")


def test_students_learn(quick):
    """Every student is far above chance, and KL at T = 4 above hard labels, on each of both seeds."""
    accuracy = {(r.optimizer, r.loss, r.alpha, r.T): x[:, 0] for r, x in quick[1].items()}
    assert all((x > 0.4).all() for x in accuracy.values())
    for optimizer in renyi_study.OPTIMIZERS:
        assert (accuracy[optimizer, "renyi", 1.0, 4.0] > accuracy[optimizer, "hard", None, None]).all()


def test_again_is_nothing_new(quick, trained):
    path = quick[0] / "renyi_digits.csv"
    before = path.read_bytes()
    again = renyi_study.main([*DIGITS, "--out", str(quick[0])])["digits"]
    assert path.read_bytes() == before and not trained
    assert all(torch.equal(again[run], x) for run, x in quick[1].items())


def test_resumes_to_the_same_numbers(quick, trained, tmp_path):
    """A file cut in the middle of a line, between the two seeds of a run, is completed to the same bytes."""
    whole = (quick[0] / "renyi_digits.csv").read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = len(lines) - 10
    (tmp_path / "renyi_digits.csv").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    renyi_study.main([*DIGITS, "--out", str(tmp_path)])
    assert (tmp_path / "renyi_digits.csv").read_bytes() == whole
    assert len(trained) == 3 + 5  # the teacher's members, and the runs that had a row missing


def test_control_has_the_gradient_of_kl_at_high_temperature():
    """0.9/alpha T^2 D_alpha -> 0.9 T^2 KL; without the control the soft gradient is alpha times that."""
    z, v = torch.randn(2, 3, 5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.zeros(3, 5, dtype=torch.int64)

    def gradient(alpha: float, weight: str) -> torch.Tensor:
        x = z.clone().requires_grad_()
        renyi_study.loss(renyi_study.Run("", "", 0, "renyi", alpha, 1e6, weight), x, v, labels).backward()
        return x.grad

    kl, control, as_is = (
        gradient(1.0, "0.9"),
        gradient(4.0, renyi_study.CONTROL),
        gradient(4.0, renyi_study.AS_IS),
    )
    soft = 0.9 * ((z - v) - (z - v).mean(-1, keepdim=True)) / 10 / 5
    torch.testing.assert_close(control, kl, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(as_is - kl, 3 * soft, rtol=1e-4, atol=1e-6)


def test_a_student_does_not_depend_on_its_stack():
    """The loss of a stack is the sum of its students' losses, and so are the gradients."""
    z, v = torch.randn(2, 3, 5, 10, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(15).view(3, 5) % 10
    for run in renyi_study.grid("", "", 0, (0.5, math.inf), (2.0,)):
        x = z.clone().requires_grad_()
        renyi_study.loss(run, x, v, labels).backward()
        for i in range(3):
            alone = z[i : i + 1].clone().requires_grad_()
            renyi_study.loss(run, alone, v[i : i + 1], labels[i : i + 1]).backward()
            assert torch.equal(alone.grad[0], x.grad[i])


@pytest.mark.slow
def test_text_students_learn(tmp_path):
    """The second data set: every student knows more than token frequencies, and KL's more than the hard
    labels'; again is the same."""
    results = renyi_study.main(["--quick", "--data", "text", "--out", str(tmp_path)])["text"]
    perplexity = {
        (r.loss, r.alpha, r.weight): x[:, renyi_study.MEASURES.index("perplexity")]
        for r, x in results.items()
    }
    assert set(perplexity) == {
        ("teacher", None, ""), ("hard", None, ""), ("logits", None, ""),
        ("renyi", 1.0, "0.9"), ("renyi", 0.5, "0.9"), ("renyi", 0.5, renyi_study.CONTROL),
    }  # fmt: skip
    kl, hard, teacher = (
        perplexity["renyi", 1.0, "0.9"],
        perplexity["hard", None, ""],
        perplexity["teacher", None, ""],
    )
    assert (kl < hard).all() and (teacher < kl).all() and kl[0] != kl[1]
    rows = (tmp_path / "renyi_text.csv").read_bytes()
    lines = rows.splitlines(keepends=True)
    (tmp_path / "renyi_text.csv").write_bytes(b"".join(lines[:-1]))
    renyi_study.main(["--quick", "--data", "text", "--out", str(tmp_path)])
    assert (tmp_path / "renyi_text.csv").read_bytes() == rows


def test_document_says_what_the_results_say(tmp_path, trained):
    """The committed rows are complete, and the tables of the document are theirs."""
    tables = []
    for data in renyi_study.DATA:
        source = DOCS / "results" / f"renyi_{data}.csv"
        (tmp_path / source.name).write_bytes(source.read_bytes())
        renyi_study.main(["--data", data, "--out", str(tmp_path)])
        assert not trained and (tmp_path / source.name).read_bytes() == source.read_bytes()
        table = (tmp_path / f"renyi_{data}.md").read_text(encoding="utf-8")
        assert table == source.with_suffix(".md").read_text(encoding="utf-8")
        tables += table.splitlines()
    document = (DOCS / "renyi_study.md").read_text(encoding="utf-8").splitlines()
    stated = [x for x in document if x.startswith("|")]
    assert len(stated) > 25 and set(stated) <= set(tables)
    assert (DOCS / "figures" / "renyi_digits.svg").stat().st_size < 80_000
