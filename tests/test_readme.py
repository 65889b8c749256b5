"""Every Python snippet of the README and of the pages for users, and the docstring's example, runs; their
figures are those of the committed results; their links lead somewhere."""

import copy
import csv
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kdkernels
from kdkernels.bench import paper, report
from kdkernels.divergence import usual

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text()
    for name in ("usage", "trainers", "divergences", "faq", "limits", "performance", "accuracy")
}
RESULTS = ROOT / "benchmarks" / "results"
CPU = "cpu_amd_epyc_zen5.json"


def said(text: str) -> str:
    """A text as one line: where it breaks does not matter."""
    return " ".join(text.split())


# ---------------------------------------------------------------- snippets


class Body(nn.Module):
    """Hidden states by the name that transformers has for them."""

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.Linear(width, width)

    def forward(self, input_ids, attention_mask=None):
        x = torch.tanh(self.mix(self.embed(input_ids)))
        return SimpleNamespace(last_hidden_state=x.cumsum(1) / x.shape[1])


class Causal(nn.Module):
    """What the snippets take for a causal language model of transformers."""

    def __init__(self, width: int, seed: int, vocab: int = 60):
        super().__init__()
        torch.manual_seed(seed)
        self.model, self.lm_head = Body(vocab, width), nn.Linear(width, vocab, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids).last_hidden_state))


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    """Of sequences whose prompts have different lengths."""
    ids = torch.randint(60, (rows, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for i in range(rows):
        labels[i, : 1 + i] = -100
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)


def run_snippets(text: str, **scope) -> dict:
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "snippet", "exec"), scope)
    return scope


def test_the_training_step():
    """Accumulated over batches with other numbers of tokens it is the step of one batch."""
    found, teacher, ends = run_snippets(README), Causal(32, 1), []
    whole = batch_of(8)
    parts = [{name: x[at] for name, x in whole.items()} for at in (slice(0, 2), slice(2, 8))]
    for batches in ([whole], parts):
        student = Causal(16, 0)
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        losses = [float(found["training_step"](student, teacher, optimizer, batches)) for _ in range(10)]
        ends.append((losses, list(student.parameters())))
    (losses, weights), (others, those) = ends
    assert losses[-1] < losses[0] and losses == pytest.approx(others, rel=1e-5)
    for x, y in zip(weights, those, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert all(x.grad is None for x in teacher.parameters())


def test_the_step_from_hidden_states():
    found, student, teacher, batch = run_snippets(README), Causal(16, 0), Causal(32, 1), batch_of(8)
    twin, items = copy.deepcopy(student), 17
    labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    loss = found["loss_of"](student, teacher, batch, labels, items)
    with torch.no_grad():
        v = teacher(**batch).logits
    right = kdkernels.fused_kd_loss(twin(**batch).logits, v, labels, temperature=2.0, num_items=items)
    torch.testing.assert_close(loss, right)
    loss.backward()
    right.backward()
    for x, y in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)


def test_the_steps_with_transformers(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "recipes"))
    import small

    found, student, teacher = run_snippets(README), small.llama(16), small.llama(32, seed=1)
    data = small.sequences()
    batches = [small.collate(data[i : i + 4]) for i in (0, 4)]
    inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    labels = torch.nn.functional.pad(batches[0]["labels"][:, 1:], (0, 1), value=-100)
    loss = found["loss_of"](student, teacher, inputs, labels, 10)
    right = kdkernels.fused_kd_loss(
        student(**inputs).logits, teacher(**inputs).logits.detach(), labels, temperature=2.0, num_items=10
    )
    torch.testing.assert_close(loss, right, rtol=1e-4, atol=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = [float(found["training_step"](student, teacher, optimizer, batches)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("page", ["usage", "divergences", "faq"])
def test_snippets(page):
    scope = run_snippets(PAGES[page])
    if page != "faq":
        assert scope["student_logits"].grad.isfinite().all()


def test_snippets_of_trainers(capsys):
    student = Causal(16, 0)
    scope = run_snippets(PAGES["trainers"], student=student, teacher=Causal(32, 1), batch=batch_of(4))
    assert scope["loss_of"].linear
    assert all(x.grad.isfinite().all() for x in student.parameters())
    assert "'counted': 38.0" in capsys.readouterr().out


def test_docstring_example():
    text = kdkernels.fused_kd_loss.__doc__
    lines = [line.strip()[4:] for line in text.splitlines() if line.strip().startswith(">>> ")]
    scope: dict = {}
    exec("\n".join(lines), scope)
    assert scope["student"].grad.isfinite().all()


# ---------------------------------------------------------------- figures


def cases() -> list[tuple[str, dict, dict, dict]]:
    """(line of a table up to its times, kdkernels, the best eager spelling, torch.compile)."""
    found = []
    for case in json.loads((RESULTS / CPU).read_text())["cases"]:
        x = dict(case["contenders"])
        fused, compiled = x.pop("kdkernels"), x.pop("torch.compile")
        eager = min(x.values(), key=lambda contender: contender["ms"])
        name = {"kl": "KL", "renyi(0.5)": "Renyi(0.5)"}[case["divergence"]]
        found.append(
            (f"| {name}, {case['rows']} x {case['vocab']} {case['dtype']} |", fused, eager, compiled)
        )
    return found


def test_times_are_the_measured_ones():
    assert f"results/{CPU})" in PAGES["performance"]
    quoted = 0
    for start, fused, eager, compiled in cases():
        times = " | ".join(f"{x['ms']:.0f} ({x['speed_up']:.1f} x)" for x in (eager, compiled))
        line = f"{start} **{fused['ms']:.1f}** | {times} |"
        assert line in PAGES["performance"]
        assert start not in README or line in README
        quoted += start in README
    assert quoted >= 3


def test_the_first_screen_names_its_machine():
    """The claim's figures are the table's, and say in the same sentence whose they are."""
    top = said(README.split("## Install")[0])
    bf16 = re.search(r"\| KL, 256 x 128256 bf16 \|[^|]*\| \d+ \(([\d.]+) x\) \| \d+ \(([\d.]+) x\)", README)
    eager, compiled = (round(float(x)) for x in bf16.groups())
    assert (
        f"On two cores of an AMD EPYC (Zen 5) it is {eager} times as fast as the best eager spelling of the "
        f"KL loss and {compiled} times as fast as `torch.compile`** (256 x 128256, bf16)"
    ) in top
    assert "no GPU has run the present ones yet" in top


def test_the_bench_ends_with_the_readmes_claim():
    """What `make bench` prints beside its own: the bf16 figure of the first screen, as measured."""
    claim = report.README
    found = {start: eager["speed_up"] for start, _, eager, _ in cases()}
    assert (claim.divergence, claim.temperature, claim.machine) == ("kl", 2.0, "EPYC Zen 5")
    start = f"| KL, {claim.rows} x {claim.vocab} {claim.dtype} |"
    assert f"{claim.speed_up:.1f}" == f"{found[start]:.1f}"
    assert re.search(re.escape(start) + rf"[^|]*\| \d+ \({claim.speed_up} x\)", README)
    machine = json.loads((RESULTS / CPU).read_text())["machine"]
    assert machine["device"] == "cpu: AMD EPYC" and "an AMD EPYC (Zen 5)" in README


def test_memory_is_the_measured_one():
    shown = [x for start, *x in cases() if start.strip("| ") in README]
    row = re.search(
        r"\| memory beyond the logits, in gradients \| \*\*(\S+)\*\* \| (\S+) \| (\S+) \|", README
    )
    for contenders in shown:
        assert row.groups() == tuple(f"{x['memory_in_gradients']:.1f}" for x in contenders)
    for _, fused, eager, _ in cases():
        assert (
            f"{fused['memory_in_gradients']:.2f}" == "1.00" and f"{eager['memory_in_gradients']:.1f}" == "5.0"
        )


def test_speed_of_copy_is_the_measured_one():
    found = [fused["fraction_of_copy"] for start, fused, *_ in cases() if re.match(r"\| KL,.* fp32", start)]
    assert f"fp32 KL runs at {min(found):.0%} to {max(found):.0%}".replace("% to", " to").replace(
        "%", " %"
    ) in said(PAGES["performance"])


def test_memory_from_hidden_states_is_the_models():
    """On paper."""
    names = ("full, in place", "full logits", "eager")
    for vocab, width in itertools.product(paper.VOCABS, paper.WIDTHS):
        found = paper.memory(paper.TOKENS, vocab, width)
        sizes = " | ".join(f"{found[x] / 2**30:.2f}" for x in names)
        assert (
            f"| {vocab} x {width} | {found['chunk']} | **{found['kdkernels'] / 2**30:.2f}** | {sizes} |"
            in PAGES["performance"]
        )


def test_times_from_hidden_states_are_the_measured_ones():
    text = (ROOT / "docs" / "results" / "linear_cpu.md").read_text().split("```")[1]
    title = re.compile(r"(\S+), T = 2, (\d+) tokens x (\d+) x (\d+) (\w+); floor .* chunks of (\d+) tokens")
    blocks = text.strip().split("\n\n")
    assert len(blocks) == 6
    for block in blocks:
        head, _, *lines = block.splitlines()
        divergence, tokens, vocab, width, dtype, chunk = title.match(head).groups()
        rows = (re.split(r"\s{2,}", line) for line in lines)
        found = {name: f"{float(of):.2f}, {size}" for name, _, of, size, *_ in rows}
        eager = next(x for name, x in found.items() if name.startswith("eager"))
        cells = [f"**{found['kdkernels']}**", found.get("kdkernels, logits_dtype=None", "")]
        cells += [found["full logits, in place"], eager]
        cells += [found["Liger chunked JSD"], found["TRL chunked divergence"]]
        name = {"kl": "KL", "jsd(0.5)": "JSD(0.5)"}[divergence]
        start = f"{name}, {tokens} x {vocab} x {width} {dtype}, chunks of {chunk}"
        row = f"| {' | '.join((start, *cells))} |".replace("|  |", "| |")
        assert row in PAGES["performance"].replace("|  |", "| |")


def test_the_page_of_peers_is_the_measured_one(tmp_path):
    """As the script writes it; performance.md has its summary; no package is left out by chance."""
    script = ROOT / "benchmarks" / "peers_page.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "page.md")]
    rows = subprocess.run(command, check=True, capture_output=True, cwd=ROOT, text=True).stdout.splitlines()
    written = (tmp_path / "page.md").read_text()
    assert written == (ROOT / "docs" / "results" / "peers_cpu.md").read_text()
    results = json.loads((RESULTS / "peers_amd_epyc_zen4.json").read_text())
    cases = (*results["cases"], *results["linear"])
    assert len(rows) == len(cases) == 8 and set(rows) <= set(PAGES["performance"].splitlines())
    for case in cases:
        own = case["contenders"]["kdkernels"]
        packages = {
            "TRL",
            *({"Liger"} if "tokens" in case else ()),
            *({"torchtune"} if case["divergence"] == "kl" else ()),
        }
        assert (
            packages <= {name.split()[0] for name in case["contenders"]}
            and "torch.compile" in case["contenders"]
        )
        for name, x in case["contenders"].items():
            assert f"| {name} | {x['ms']:.0f} | {x['ms'] / own['ms']:.2f} |" in written
            assert f" | {x['loss_error']:.0e} |" in written
        rounded = case["contenders"].get("kdkernels, logits_dtype=None", {"ms": own["ms"] / 2})
        assert 0.45 < rounded["ms"] / own["ms"] < 0.58  # "in half its time"


def bf16_errors() -> dict[tuple[str, str], dict[str, tuple[str, str]]]:
    """By divergence and T: the errors of loss and gradient by contender."""
    found: dict = {}
    with (RESULTS / "accuracy_bf16.csv").open(newline="") as file:
        for x in csv.DictReader(file):
            here = found.setdefault((x["divergence"], x["temperature"]), {})
            here[x["contender"]] = x["loss_error"], x["grad_error"]
    return found


def test_errors_are_the_measured_ones():
    names = {"kl": "KL", "reverse_kl": "reverse KL", "jsd(0.5)": "JSD(0.5)", "renyi(0.5)": "Renyi(0.5)"}
    for (divergence, T), x in bf16_errors().items():
        own, *others = (", ".join(pair) for pair in x.values())
        row = f"| {T} | **{own}** | {' | '.join(others)} |"
        assert f"| {names[divergence]} {row}" in PAGES["accuracy"]
        assert divergence != "kl" or row in README


def test_what_is_said_of_the_errors():
    for (divergence, T), x in bf16_errors().items():
        own, eager, copies = (tuple(map(float, pair)) for pair in x.values())
        assert own[0] < 1e-7 and 1e-3 <= own[1] < 2e-3 and own[1] == copies[1]
        if float(T) >= (2 if divergence in ("jsd(0.5)", "renyi(0.5)") else 4):
            assert eager[0] >= 1  # no right digit
        if T == "2":
            assert 0.09 < eager[1] < 0.21


def test_what_is_said_of_fp32():
    found = [(fused, eager) for start, fused, eager, _ in cases() if start.endswith("fp32 |")]
    errors = [[x[name] for name in ("loss_error", "grad_error")] for pair in found for x in pair]
    own, others = (list(itertools.chain(*errors[i::2])) for i in (0, 1))
    assert max(own) < 1.15e-7 and 1e-6 < min(others) < max(others) < 2e-5
    assert "right to 1.1e-7, and eager's to between 1e-6 and 2e-5" in said(PAGES["accuracy"])


def test_errors_again(tmp_path):
    """The script that wrote them, on few classes."""
    script = ROOT / "benchmarks" / "accuracy_bf16.py"
    command = [sys.executable, str(script), "--shape", "2x4096", "--out", str(tmp_path / "errors.csv")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    with (tmp_path / "errors.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 3 * len(bf16_errors())
    for x in records:
        loss, grad = float(x["loss_error"]), float(x["grad_error"])
        if x["contender"] == "kdkernels":
            assert loss < 1e-6 and grad < 3e-3
        elif x["contender"] == "eager":
            assert grad > 3e-3


def test_the_figure_is_of_the_measured_times(tmp_path):
    script = ROOT / "benchmarks" / "speed_figure.py"
    subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path)], check=True, capture_output=True, cwd=ROOT
    )
    labels = []
    for start, fused, eager, compiled in cases():
        if re.match(r"\| KL,.* bf16", start):
            labels += [f"{eager['ms'] / x['ms']:.1f} x" for x in (fused, compiled)]
    assert len(labels) == 6
    for theme in ("light", "dark"):
        name = f"speed_{theme}.svg"
        assert f"docs/figures/{name}" in README
        for file in (tmp_path / name, ROOT / "docs" / "figures" / name):
            assert all(f"{x}</text>" in file.read_text() for x in labels)


def test_times_of_divergences_are_the_measured_ones():
    """From the least to the most of each family."""
    times: dict[str, list[float]] = {}
    for line in (ROOT / "docs" / "results" / "divergences_cpu.md").read_text().splitlines():
        if match := re.match(r"\| `(\w+)\(?[^`]*` \|([\d. |]+)\| [\d.]+ to", line):
            times.setdefault(match[1], []).extend(float(x) for x in match[2].split("|"))
    assert set(times) > {"kl", "tvd", "renyi", "alpha", "jsd"}
    for family, found in times.items():
        (row,) = (line for line in PAGES["divergences"].splitlines() if re.match(rf'\| `"{family}[("]', line))
        least, most = f"{min(found):.1f}", f"{max(found):.1f}"
        assert row.endswith(f"| {least} to {most} |" if family != "kl" else "| 1 |"), row


def test_every_divergence_is_on_its_page():
    for d in usual():
        assert re.search(rf'^\| `"{d.name}[("].* \|$', PAGES["divergences"], re.MULTILINE), d
        assert f"`{type(d).__name__}(" in PAGES["divergences"], d


# ---------------------------------------------------------------- the README as a page


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = document.read_text()
        links = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'(?:src|srcset)="([^":]+)"', text)
        for link in links:
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_readme_leads_to_every_page():
    assert {x.name for x in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"\]\(docs/(\w+\.md)\)", README))


def test_every_recipe_is_in_the_list():
    helpers = {"small.py", "processes.py", "trl_setting.py"}
    recipes = {x.name for x in (ROOT / "examples" / "recipes").glob("*.py")} - helpers
    rows = re.findall(r"^\| \[(\w+\.py)\]\(../examples/recipes/\1\) \| .+ \|$", PAGES["trainers"], re.M)
    assert sorted(rows) == sorted(recipes)
