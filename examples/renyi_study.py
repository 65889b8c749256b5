"""Does the order of the Renyi divergence matter in distillation? Orders and temperatures on real data, with a
control for the weight.

    OMP_NUM_THREADS=1 python examples/renyi_study.py      # four minutes; can be stopped: what is in the CSV
                                                          file is not trained again

The loss is eq. 1.13 of Grätzer's thesis with D_alpha in place of KL, beta = 0.9:

    0.9 T^2 D_alpha(p, q) + 0.1 CE                     weight "0.9", as the thesis has it
    0.9 / alpha  T^2 D_alpha(p, q) + 0.1 CE            weight "0.9/alpha", the control

At high temperature T^2 D_alpha is nearly alpha T^2 KL: a larger order is also a larger weight and, under
plain gradient descent, a larger step. The control takes that away. At order infinity T^2 D grows like T, and
there is no such control.

A data set is one function in DATA: it returns its runs and what trains one of them; table, figure and
resumption follow from these.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import distill_text
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from progress import Progress
from scipy import stats
from theory import STYLE
from torch import Tensor

from kdkernels import fused_kd_loss, logit_matching_loss

ALPHAS, TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, math.inf), (1.0, 2.0, 4.0, 8.0)
AS_IS, CONTROL = "0.9", "0.9/alpha"
OPTIMIZERS = {
    # its step does not depend on the loss's scale: a weight only shifts the balance with the hard labels
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
    # its step does: a weight is a learning rate
    "sgd": functools.partial(torch.optim.SGD, lr=0.03, momentum=0.9),
}


@dataclass(frozen=True)
class Run:
    """Students that differ in nothing but the seed. The fields are the CSV's first columns."""

    data: str
    optimizer: str
    steps: int
    loss: str  # renyi, hard, logits; or teacher, who is only evaluated
    alpha: float | None = None
    T: float | None = None
    weight: str = ""

    def key(self, seed: int) -> tuple[str, ...]:
        """The run and seed as the CSV spells them."""
        return (
            *("" if x is None else f"{x:g}" if isinstance(x, float) else str(x) for x in astuple(self)),
            str(seed),
        )


MEASURES = ("accuracy", "agreement", "perplexity")
KEY = (*(f.name for f in fields(Run)), "seed")
Results = dict[Run, Tensor]  # (seeds, measures)


def grid(
    data: str, optimizer: str, steps: int, alphas: Iterable[float], temperatures: Iterable[float]
) -> list[Run]:
    """Hard labels alone, logit matching, and every order at every temperature, with the control where it is
    another loss."""
    run = functools.partial(Run, data, optimizer, steps)
    renyi = [run("renyi", a, T, weight) for T in temperatures for a in alphas for weight in (AS_IS, CONTROL)]
    return [run("hard"), run("logits")] + [r for r in renyi if r.weight == AS_IS or has_control(r.alpha)]


def has_control(alpha: float | None) -> bool:
    return alpha is not None and alpha != 1 and math.isfinite(alpha)


def loss(run: Run, z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """Sum over students of each one's mean loss, from (students, rows, V): no student's gradient depends on
    the others."""
    rows = labels.shape[-1]
    if run.loss == "hard":
        return fused_kd_loss(z, v, labels, soft_weight=0.0, hard_weight=1.0, num_items=rows)
    if run.loss == "logits":
        return logit_matching_loss(z, v, labels=labels, soft_weight=0.9, hard_weight=0.1, num_items=rows)
    soft = 0.9 / run.alpha if run.weight == CONTROL else 0.9
    options = {"divergence": f"renyi({run.alpha})", "temperature": run.T, "t_squared": True}
    return fused_kd_loss(z, v, labels, soft_weight=soft, hard_weight=0.1, num_items=rows, **options)


@torch.no_grad()
def evaluate(z: Tensor, v: Tensor, labels: Tensor) -> list[tuple[float, ...]]:
    """Accuracy, agreement with the teacher, and perplexity at T = 1 of each student, from (students, rows,
    V)."""
    _, of_rows = fused_kd_loss(z.double(), v, labels, hard_weight=1.0, return_stats=True)
    measured = of_rows.correct.double(), of_rows.agree.double(), of_rows.cross_entropy
    accuracy, agreement, nll = (x.mean(-1) for x in measured)
    return list(zip(accuracy.tolist(), agreement.tolist(), nll.exp().tolist(), strict=True))


# ---------------------------------------------------------------- stacks of small networks


def initial(sizes: Sequence[int], generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Weights (students, in, out) and biases (students, 1, out) of one network per generator, He's
    initialisation."""
    shapes = list(zip(sizes, sizes[1:], strict=False))
    networks = [[torch.randn(i, o, generator=g) * math.sqrt(2 / i) for i, o in shapes] for g in generators]
    weights = [torch.stack(layer) for layer in zip(*networks, strict=True)]
    return [x for w in weights for x in (w, torch.zeros(len(generators), 1, w.shape[-1]))]


def logits(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """(students, rows, V) of a stack of perceptrons."""
    for layer in range(0, len(params), 2):
        x = torch.baddbmm(params[layer + 1], x if layer == 0 else x.relu(), params[layer])
    return x


def train(
    start: Sequence[Tensor], objective: Callable[[list[Tensor]], Tensor], optimizer: str, steps: int
) -> list[Tensor]:
    """Full-batch steps from `start`, whose tensors stay as they are; the learning rate falls to 0 along a
    cosine."""
    params = [x.clone().requires_grad_() for x in start]
    update = OPTIMIZERS[optimizer](params)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(update, steps)
    for _ in range(steps):
        update.zero_grad()
        objective(params).backward()
        update.step()
        schedule.step()
    return [x.detach() for x in params]


# ---------------------------------------------------------------- data: each function returns its runs, and
# what trains one


Trainer = Callable[[Run], list[tuple[float, ...]]]


def digits(quick: bool, seeds: int, steps: int | None, out: Path) -> tuple[list[Run], Trainer]:
    """scikit-learn's digits: a teacher of three perceptrons that saw 900 images, students of 16 hidden units
    that see 50 of them.

    A seed draws the split of the 1797 images, the teacher and the student; the 897 other images are held out.
    One stack holds the students of all seeds.
    """
    teacher_steps, steps = (40, steps or 100) if quick else (200, steps or 2000)
    members, hidden, seen, given = 3, 128, 900, 50
    teacher = Run("digits", "adam", teacher_steps, "teacher")
    alphas, temperatures = ((0.5, 1.0, math.inf), (1.0, 4.0)) if quick else (ALPHAS, TEMPERATURES)
    runs = [teacher] + [
        r for optimizer in OPTIMIZERS for r in grid("digits", optimizer, steps, alphas, temperatures)
    ]

    @functools.cache  # and not before something is missing
    def prepare() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        from sklearn.datasets import load_digits

        images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
        g = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        order = torch.stack([torch.randperm(len(images), generator=s) for s in g])
        x, y = images.float()[order] / 16, labels[order]
        unused = torch.zeros(seeds, seen, 10)  # hard labels alone have no teacher

        def member() -> Tensor:
            hard = Run("digits", "adam", teacher_steps, "hard")
            start = initial((64, hidden, 10), g)
            params = train(
                start,
                lambda p: loss(hard, logits(p, x[:, :seen]), unused, y[:, :seen]),
                hard.optimizer,
                hard.steps,
            )
            return logits(params, x)

        v = torch.stack([member() for _ in range(members)]).mean(0)
        parts = ([t[:, part] for t in (x, v, y)] for part in (slice(given), slice(seen, None)))
        return *parts, initial((64, 16, 10), g)

    def result(run: Run) -> list[tuple[float, ...]]:
        (x, v, y), (held_x, held_v, held_y), start = prepare()
        if run == teacher:
            return evaluate(held_v, held_v, held_y)
        student = train(start, lambda p: loss(run, logits(p, x), v, y), run.optimizer, run.steps)
        return evaluate(logits(student, held_x), held_v, held_y)

    return runs, result


def text(quick: bool, seeds: int, steps: int | None, out: Path) -> tuple[list[Run], Trainer]:
    """The language model of distill_text.py: its teacher, and a student for each run and seed, which draws
    the student and its batches."""
    config = distill_text.QUICK if quick else distill_text.Config()
    config = replace(config, student_steps=steps or config.student_steps)
    alphas = (0.5, 1.0) if quick else (0.5, 1.0, 2.0)
    teacher = Run("text", "adamw", config.teacher_steps, "teacher")
    folder = out / f"renyi_text_{'quick' if quick else 'full'}"

    @functools.cache  # and not before something is missing
    def prepare() -> tuple[Tensor, Tensor, torch.nn.Module]:
        folder.mkdir(exist_ok=True)
        tokens = distill_text.load_tokens(config, folder)
        return *tokens, distill_text.train_teacher(tokens[0], config, folder / "teacher.pt")

    def result(run: Run) -> list[tuple[float, ...]]:
        tokens, held_out, model = prepare()
        if run == teacher:
            found = [distill_text.evaluate({"": model}, model, held_out, config, config.held_out)] * seeds
        else:
            losses = {
                "": lambda z, v, y: loss(
                    run, *(x.flatten(0, 1).unsqueeze(0) for x in (z, v)), y.flatten().unsqueeze(0)
                )
            }
            of_seed = (replace(config, seed=seed) for seed in range(seeds))
            found = [distill_text.distil(model, tokens, held_out, c, losses, None) for c in of_seed]
        return [tuple(x[""][m] for m in MEASURES) for x in found]

    return [teacher, *grid("text", "adamw", config.student_steps, alphas, (2.0,))], result


@dataclass(frozen=True)
class Data:
    make: Callable[[bool, int, int | None, Path], tuple[list[Run], Trainer]]  # (quick, seeds, steps, out)
    seeds: int
    measures: tuple[str, str]  # the tables'; the figure has the first


DATA = {
    "digits": Data(digits, 10, ("accuracy", "agreement")),
    "text": Data(text, 3, ("perplexity", "accuracy")),
}
UNIT = {"accuracy": 100, "agreement": 100, "perplexity": 1}  # shares in per cent


# ---------------------------------------------------------------- results, kept in a CSV file


def known(path: Path) -> dict[tuple[str, ...], list[float]]:
    """The rows of the file; a last line that was cut off while it was written is taken out of it."""
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return {
        tuple(row[k] for k in KEY): [float(row[m]) for m in MEASURES]
        for row in csv.DictReader(whole.splitlines())
    }


def collect(runs: Sequence[Run], result: Trainer, seeds: int, path: Path) -> Results:
    """Results of every run and seed: those in the file, and the others, which are appended to it as each run
    ends."""
    rows = known(path)
    pending = [run for run in runs if any(run.key(seed) not in rows for seed in range(seeds))]
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(KEY + MEASURES)
        for run in Progress(pending, path.stem, "run", done=len(runs) - len(pending)):
            # all seeds even where one is missing: the same stack gives the same bits
            for seed, measured in enumerate(result(run)):
                if run.key(seed) not in rows:
                    text = [f"{x:.4f}" if x < 10 else f"{x:.4g}" for x in measured]
                    writer.writerow((*run.key(seed), *text))
                    rows[run.key(seed)] = [float(x) for x in text]
            file.flush()
    return {
        run: torch.tensor([rows[run.key(seed)] for seed in range(seeds)], dtype=torch.float64) for run in runs
    }


# ---------------------------------------------------------------- table and figure


def interval(x: Tensor, comparisons: int = 1) -> tuple[float, float]:
    """Mean over seeds and half its 95 % Student interval, the error shared among `comparisons`
    (Bonferroni)."""
    quantile = stats.t.ppf(1 - 0.025 / comparisons, len(x) - 1)
    return x.mean().item(), float(quantile) * x.std().item() / math.sqrt(len(x))


def values(x: Tensor, measure: str) -> Tensor:
    """A measure of the seeds, in its unit."""
    return UNIT[measure] * x[:, MEASURES.index(measure)]


def measures(results: Results) -> tuple[str, str]:
    return DATA[next(iter(results)).data].measures


@dataclass(frozen=True)
class Panel:
    """Orders by temperatures under one optimizer and one weight, each paired over seeds with order 1 at its
    temperature."""

    results: Results
    optimizer: str
    weight: str

    @functools.cached_property
    def runs(self) -> dict[tuple[float, float], Run]:
        found = (r for r in self.results if r.loss == "renyi" and r.optimizer == self.optimizer)
        return {(r.alpha, r.T): r for r in found if r.weight == self.weight or r.alpha == 1}

    def values(self, alpha: float, T: float, measure: str) -> Tensor:
        return values(self.results[self.runs[alpha, T]], measure)

    def difference(self, alpha: float, T: float, measure: str) -> tuple[float, float, str]:
        """Points above order 1, half the interval, and * where it excludes 0, ** where it does so for all of
        the panel at once."""
        x = self.values(alpha, T, measure) - self.values(1.0, T, measure)
        mean, half = interval(x)
        family = sum(a != 1 for a, _ in self.runs)
        return mean, half, "*" * ((abs(mean) > half) + (abs(mean) > interval(x, family)[1]))

    def cell(self, alpha: float, T: float, measure: str) -> str:
        if (alpha, T) not in self.runs:
            return ""
        if alpha == 1:
            return "{:.1f} ± {:.1f}".format(*interval(self.values(alpha, T, measure)))
        mean, half, stars = self.difference(alpha, T, measure)
        return f"{mean:+.1f} ± {half:.1f}{stars.replace('*', chr(92) + '*')}"


def axes_of(results: Results) -> tuple[list[float], list[float], list[str]]:
    """The orders, temperatures and optimizers that occur."""
    renyi = [r for r in results if r.loss == "renyi"]
    return (
        sorted({r.alpha for r in renyi}),
        sorted({r.T for r in renyi}),
        list(dict.fromkeys(r.optimizer for r in renyi)),
    )


def name(alpha: float) -> str:
    return "∞" if math.isinf(alpha) else f"{alpha:g}"


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def references(results: Results) -> list[str]:
    """Teacher, hard labels, logit matching and KL: the first measure, how far above hard labels paired over
    seeds, the second."""
    names = {"teacher": "the teacher", "hard": "hard labels alone", "logits": "logit matching"}
    first, second = measures(results)
    hard = {run.optimizer: x for run, x in results.items() if run.loss == "hard"}
    out = [
        line(["optimizer", "loss", first, "above hard labels", second]),
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for run, x in results.items():
        if run.alpha in (None, 1):
            x = (values(x, first), values(x, first) - values(hard[run.optimizer], first), values(x, second))
            numbers = ["{:.1f} ± {:.1f}".format(*interval(y)) for y in x]
            out.append(line([run.optimizer, names.get(run.loss) or f"KL, T = {run.T:g}", *numbers]))
    return out


def orders(results: Results, optimizer: str, measure: str) -> list[str]:
    """One row per order, one column per weight and temperature; row 1 is the measure itself, the others are
    differences from it."""
    alphas, temperatures, _ = axes_of(results)
    panels = [Panel(results, optimizer, weight) for weight in (AS_IS, CONTROL)]
    heads = [f"{p.weight.replace('alpha', 'α')}: T = {T:g}" for p in panels for T in temperatures]
    out = [line(["α", *heads]), "| ---: |" + " ---: |" * len(heads)]
    return out + [
        line([name(a), *(p.cell(a, T, measure) for p in panels for T in temperatures)]) for a in alphas
    ]


def table(results: Results) -> str:
    """Markdown: the references, then per measure and optimizer the orders against order 1."""
    seeds = len(next(iter(results.values())))
    legend = (
        "Row 1: the measure itself. Other rows: points above it at the same T, paired over seeds. "
        "\\*: the interval excludes 0; "
        "\\*\\*: also when 5 % is the chance of any error in all columns of a weight."
    )
    blocks = [
        [f"Mean over {seeds} seeds ± half its 95 % Student interval; accuracy and agreement in per cent."],
        references(results),
        [legend],
    ]
    for measure in measures(results):
        for optimizer in axes_of(results)[2]:
            blocks += [[f"**{measure}, {optimizer}**"], orders(results, optimizer, measure)]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def heat_map(axis: Axes, panel: Panel, least: float, most: float) -> AxesImage:
    """Accuracy by order and temperature, in per cent, with the marks of the table; white where there is no
    such loss."""
    alphas, temperatures, _ = axes_of(panel.results)
    mean = torch.full((len(alphas), len(temperatures)), math.nan)
    for (i, a), (j, T) in ((x, y) for x in enumerate(alphas) for y in enumerate(temperatures)):
        if (a, T) in panel.runs:
            mean[i, j] = panel.values(a, T, "accuracy").mean()
            stars = "" if a == 1 else panel.difference(a, T, "accuracy")[2]
            dark = mean[i, j] < (least + most) / 2
            axis.text(
                j,
                i,
                f"{mean[i, j]:.1f}{stars}",
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontsize="small",
            )
        else:
            axis.text(j, i, "none", ha="center", va="center", color="0.5", fontsize="small")
    axis.set_xticks(range(len(temperatures)), [f"{T:g}" for T in temperatures])
    axis.set_yticks(range(len(alphas)), [name(a) for a in alphas])
    axis.set_title(f"{panel.optimizer}, weight {panel.weight.replace('alpha', 'α')}")
    return axis.imshow(
        mean.numpy(), vmin=least, vmax=most, origin="lower", aspect="auto", interpolation="none"
    )


def figure(results: Results) -> Figure:
    """A heat map per optimizer (rows) and weight (columns), on one scale from hard labels alone to the
    teacher."""
    optimizers = axes_of(results)[2]
    ends = [100 * x[:, 0].mean().item() for r, x in results.items() if r.loss in ("hard", "teacher")]
    fig, axes = plt.subplots(
        len(optimizers), 2, figsize=(8.4, 3.4 * len(optimizers)), sharex=True, sharey=True, squeeze=False
    )
    for row, optimizer in zip(axes, optimizers, strict=True):
        row[0].set_ylabel("order α")
        for axis, weight in zip(row, (AS_IS, CONTROL), strict=True):
            mesh = heat_map(axis, Panel(results, optimizer, weight), min(ends), max(ends))
    for axis in axes[-1]:
        axis.set_xlabel("temperature T")
    fig.colorbar(mesh, ax=axes, label="held-out accuracy, per cent: hard labels alone to teacher")
    return fig


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> dict[str, Results]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, help="default 10 for digits, 3 for text; 2 with --quick")
    parser.add_argument(
        "--steps", type=int, help="of the students; default 2000 for digits, 120 for text, fewer with --quick"
    )
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--quick", action="store_true", help="fewer orders, temperatures and steps")
    parser.add_argument(
        "--out", type=Path, default=Path("build"), help="the folder of renyi_<data>.csv, .md and .svg"
    )
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 2:
        parser.error("--seeds: an interval needs two")
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for data in args.data:
        path = args.out / f"renyi_{data}.csv"
        seeds = args.seeds or (2 if args.quick else DATA[data].seeds)
        runs, result = DATA[data].make(args.quick, seeds, args.steps, args.out)
        results = found[data] = collect(runs, result, seeds, path)
        path.with_suffix(".md").write_text(table(results), encoding="utf-8")
        if len(axes_of(results)[1]) > 1:  # one temperature makes no map
            # every text of the svg names its fonts
            with plt.style.context([STYLE, {"font.sans-serif": ["DejaVu Sans"]}]):
                fig = figure(results)
                fig.savefig(
                    path.with_suffix(".svg"), metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
                )
                plt.close(fig)
        print(path.with_suffix(".md").read_text(encoding="utf-8"), path, sep="\n", flush=True)
    return found


if __name__ == "__main__":
    main()
