"""CONTRIBUTING.md names what is there: paths, make targets, names in files, tests, and commands that run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
QUOTED = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


def test_paths():
    """Those of the page and of its commands; a bare name is of the folder that its line names before."""
    named = [
        x for text in (*QUOTED, *COMMANDS) for x in re.findall(r"[\w./]+\.(?:py|h|cu|md|sh|json)\b", text)
    ]
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(named) > 40 and len(links) > 4
    for path in {*named, *links}:
        assert list(ROOT.glob(path if "/" in path else f"**/{path}")), path


def test_make_targets():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = {x for text in (*QUOTED, *COMMANDS) for x in re.findall(r"\bmake ([\w-]+)", text)}
    assert len(found) > 10 and found <= targets


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("class Tsallis", "kdkernels/orders.py"),
        ("class ReverseTsallis", "kdkernels/orders.py"),
        ('Form("alpha", limit=a, order=a, factor=a)', "kdkernels/orders.py"),
        ("__all__", "kdkernels/members.py"),
        ("def usual", "kdkernels/divergence.py"),
        ('"tsallis"', "tests/oracle.py"),
        ("POWERS", "tests/oracle.py"),
        ("def _digits", "tests/oracle.py"),
        ("def _long_double", "tests/oracle.py"),
        ("FAMILIES =", "kdkernels/form.py"),
        ("kNames", "csrc/divergence.h"),
        ("make_plan", "csrc/plan.h"),
        ("with_family", "csrc/row/row.h"),
        ("FAMILIES", "kdkernels/backends/eager/families.py"),
        ("class Options", "kdkernels/options.py"),
        ("def options", "kdkernels/options.py"),
        ("class Modifiers", "kdkernels/transforms.py"),
        ("z_loss", "csrc/api.h"),
        ("kd_call", "csrc/api.h"),
        *(("z_loss", f"kdkernels/backends/triton/{x}.py") for x in ("launch", "records", "hard")),
        ("z_loss", "kdkernels/backends/eager/hard.py"),
        ("z_loss", "csrc/row/hard.h"),
        ("OPTIONS =", "tests/test_contract.py"),
        ("def draw_options", "tests/fuzz.py"),
        ("class Call", "kdkernels/call.py"),
        *((name, "kdkernels/backends/__init__.py") for name in ("ORDER", "NAMES")),
        ("BACKENDS =", "tests/rows.py"),
    ],
)
def test_names(name, file):
    assert file in PAGE and name.split()[-1].strip('"=').split("(")[0] in PAGE
    assert name in (ROOT / file).read_text()


@pytest.mark.slow
def test_tests_are_there():
    """pytest finds each by its id."""
    ids = [x for command in COMMANDS for x in re.findall(r'pytest -q "?([^"]+)"?$', command)]
    assert len(ids) == 5
    found = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *ids)
    assert found.returncode == 0, found.stdout + found.stderr
    assert all(re.search(rf"^{re.escape(x)}", found.stdout, re.MULTILINE) for x in ids)


RUN = [x for x in COMMANDS if not any(y in x for y in ("pytest", "golden.py", "--write"))]
# of tools that have tests of their own
SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in RUN if "raw.check('cpu'" not in x]


@pytest.mark.parametrize("command", [*(x for x in RUN if "raw.check('cpu'" in x), *SLOW])
def test_commands(command):
    """Those that are neither a test nor write a file that is committed."""
    if "triton" in command or "TRITON" in command:
        pytest.importorskip("triton")
    python = f'"{sys.executable}"'
    done = run("bash", "-c", re.sub(r"(^| )python ", lambda x: f"{x[1]}{python} ", command))
    assert done.returncode == 0, done.stdout + done.stderr


def test_architecture():
    """At most 200 lines; every file and every name in code that it points to is there."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert len(page.splitlines()) <= 200
    folders = ("kdkernels", "csrc", "tests", "benchmarks", "examples", "docs")
    files = [x for folder in folders for x in ROOT.glob(f"{folder}/**/*.*")]
    there = [str(x.relative_to(ROOT)) for x in files]
    for path in set(re.findall(r"\b[\w./]+\.(?:py|h|cu|cpp)\b", page)) - {"setup.py"}:
        assert any(f"/{x}".endswith(f"/{path}") for x in there), path
    text = "".join(x.read_text() for x in files if x.suffix in (".py", ".h"))
    names = {x for x in re.findall(r"`(?:\w+\.)?(\w+)`", page) if not x.islower() or "_" in x}
    assert len(names) > 25 and not [x for x in names if x not in text]


def test_its_length():
    assert len(PAGE.splitlines()) <= 150
