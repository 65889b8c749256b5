"""The public functions: options checked, shapes and masks resolved, factors folded, one operator called.

Every factor that is known before the pass goes into it (T^2, the weights, the reduction's denominator, which
stays on the device), so that the gradient comes out final and the backward has nothing to do for an upstream
gradient of 1.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import inputs, ops
from .autograd import PerRow, Request, Total, rows_alone
from .call import Call, Numbers, Rows, addressable
from .checks import check_tensors, checked_items
from .divergence import KL, Divergence, LogitMatching
from .folding import MOST_STEEP, counted_rows, fold, reduced, steepness, value_dtype
from .options import AS_THEY_ARE, Options, options, own_temperature
from .stats import KDStats, from_columns
from .transforms import LogitTransform


def _loss(
    student: Tensor, teacher: Tensor, rows: Rows, o: Options, num_items: int | Tensor | None
) -> Tensor | tuple[Tensor, KDStats]:
    compiling = torch.compiler.is_compiling()
    autograd = o.is_autograd and not compiling
    if not compiling:
        inputs.check_mode("fused_kd_loss", (student, teacher if o.teacher_grad else None), autograd)
    if not autograd:
        o.check_exchangeable()
    vocab = check_tensors(student, teacher, rows, o, autograd)
    num_items = checked_items(num_items, o)
    if (autograd or o.reduction == "none") and not compiling:  # they save the tensors that they are given
        student, teacher, *rows = map(inputs.saveable, (student, teacher, *rows))
        rows = Rows(*rows)
    labels = rows.labels
    rows, denominator = counted_rows(rows, student, vocab, o, num_items)
    others = teacher if o.teacher_grad or not teacher.requires_grad else teacher.detach()
    run = _fused
    if autograd:
        learned = rows.temperature is not None and inputs.differentiated(rows.temperature)
        if learned or inputs.is_transformed(student, others) or not o.is_exchangeable:
            run = _differentiable
    loss, columns = run(student, others, rows, o, vocab, denominator)
    if not o.return_stats:
        return loss
    return loss, from_columns(
        columns.detach(), student.shape[:-1], labels, bool(o.hard_weight), rows.weight, value_dtype(student)
    )


def _fused(student, teacher, rows: Rows, o: Options, vocab: int, denominator) -> tuple[Tensor, Tensor | None]:
    """The loss by the operator, into which every factor goes that is known, and its statistics."""
    if torch.compiler.is_exporting():
        return _exported(student, teacher, rows, o, vocab, denominator)
    enabled = torch.is_grad_enabled()
    wanted = enabled and student.requires_grad, enabled and teacher.requires_grad
    inplace, steepest = o.inplace, None
    halves = wanted[0] and student.dtype == torch.float16, wanted[1] and teacher.dtype == torch.float16
    if halves != (False, False):
        steepest = steepness(o, vocab, halves[1])
        if o.reduction != "none" and steepest > MOST_STEEP:
            # no factor keeps such a gradient within fp16: it is fp32's until autograd casts it, with the loss
            # scale in it
            # the copy is ours alone: the gradient may overwrite it, unless a second derivative starts from it
            inplace = inplace or halves[0] and not (torch.compiler.is_compiling() or o.is_autograd)
            student, teacher = (
                x.float() if half else x for x, half in zip((student, teacher), halves, strict=True)
            )
            steepest = None
    alike = o, denominator, steepest, vocab, wanted, inplace
    if not torch.compiler.is_compiling() and rows.weight is None and type(denominator) is type(vocab) is int:
        asked, post, _ = _known(*alike)
    else:
        asked, post, weight = _asked(*alike, student.shape[:-1], rows.weight)
        rows = rows._replace(weight=weight)
    logits = addressable(student), addressable(teacher)
    if o.reduction == "none":
        losses, columns = PerRow.apply(*logits, *rows, asked)
        return losses.to(value_dtype(student)), columns
    if any(wanted):
        total, columns = Total.apply(*logits, *rows, asked)
    else:
        total, columns = rows_alone(*logits, rows, asked)
        total = total.sum().to(value_dtype(student))
    return total if post is None else (total * post).to(total.dtype), columns


def _asked(
    o: Options, denominator, steepest, vocab: int, wanted, inplace: bool, leading=(), weight=None
) -> tuple[Request, float | Tensor | None, Tensor | None]:
    """What the operator is asked for, what the total is still to be multiplied with, and the weights."""
    folded = fold(o, leading, weight, denominator, steepest)
    return Request.of(o, folded.numbers, vocab, wanted, inplace, folded.boost), folded.post, folded.weight


_known = functools.lru_cache(maxsize=256)(_asked)  # where nothing of it is a tensor


def _exported(
    student, teacher, rows: Rows, o: Options, vocab: int, denominator
) -> tuple[Tensor, Tensor | None]:
    """`_fused` for torch.export: an operator that has a derivative, whatever requires one at the time."""
    asked = Request.of(o, o.numbers, vocab)
    x, y = addressable(student), addressable(teacher)
    losses = torch.ops.kdkernels.trainable_loss.default(x, y, *rows, *asked.own)
    columns = rows_alone(x, y, rows, asked)[1] if o.return_stats else None
    return reduced(losses, student, o, denominator), columns


def _differentiable(
    student, teacher, rows: Rows, o: Options, vocab: int, denominator
) -> tuple[Tensor, Tensor | None]:
    """The eager backend past the operator, in plain autograd, all rows at once: for forward-mode derivatives,
    torch.func, the gradient in the rows' temperatures, and the teacher's gradient of a divergence that is no
    other one reversed."""
    from .backends import eager

    columns = None
    if o.return_stats:
        numbers = Numbers(o.numbers.temperature, modifiers=o.numbers.modifiers)
        with torch.no_grad():
            _, columns = rows_alone(student, teacher, rows, Request.of(o, numbers, vocab))
    labels, weight, temperature = rows
    if labels is not None and inputs.readable(labels):
        ops.check_labels(labels, weight, vocab)
    if temperature is not None:
        temperature = ops.checked_temperatures(temperature, weight)
    of_rows = labels, weight, o.divergence, o.numbers
    losses = eager.rows(Call(student, teacher, vocab, *of_rows, temperature=temperature))
    return reduced(losses, student, o, denominator), columns


@inputs.names_checked
def fused_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | str = "kl",
    temperature: float | Tensor = 1.0,
    t_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    teacher_grad: bool = False,
    student_transform: LogitTransform = AS_THEY_ARE,
    teacher_transform: LogitTransform = AS_THEY_ARE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KDStats]:
    r"""Distillation loss between a teacher's and a student's logits, value and gradient in one pass over
    them.

    Per row, with p = softmax(teacher / T), q = softmax(student / T):

        loss = soft_weight * (T^2 if t_squared else 1) * D(p, q)  +  hard_weight * CE(label, softmax(student))

    T^2 multiplies value and gradient of the soft term, never the cross entropy, which is at T = 1. Hinton,
    Vinyals and Dean (2015), section 2; soft_weight = 0.9, hard_weight = 0.1, t_squared = True is eq. 1.13 of
    Grätzer's thesis with beta = 0.9.

    Args:
        student_logits: (..., V) bfloat16, float16, float32 or float64. Any strides; copied where the last
            dimension is not contiguous.
        teacher_logits: (..., V), same leading shape; its dtype may differ. It receives a gradient with
            teacher_grad alone.
        labels: (...) int64, already shifted. Rows whose label is ignore_index count for nothing, whatever
            hard_weight is. Another label that is no class is an error whatever hard_weight is, on a GPU a row
            of nan.
        divergence: a `Divergence` or its text form: "kl", "reverse_kl", "mixed_kl(0.5)", "cross_entropy",
            "renyi(0.5)", "reverse_renyi(0.5)", "alpha(2)", "jsd(0.5)", "skew_kl(0.1)",
            "skew_reverse_kl(0.1)", "tvd" or another of docs/divergences.md. "forward_kl"
            is "kl", "js" is "jsd(0.5)".
        temperature: T in [1e-4, 1e12], or inf, the limit of T^2 D, (k/2) Var(student - teacher), which needs
            t_squared=True. Or (...) floating point, a temperature for each row, finite: one out of
            range is an error, on a GPU a row of nan. It receives a gradient from backend="eager" alone, so
            that temperatures can be learned (Li et al., 2023, CTKD).
        t_squared: multiply the soft term by T^2, so that its gradient does not vanish at high temperature.
        soft_weight, hard_weight: weights of the two terms. A term of weight 0 is not there, whatever its
            logits are. These and other numbers may be numpy's, or 0-d tensors, which the host waits for and
            which get no gradient.
        ignore_index: the label of rows that do not count.
        token_weight: (...) weight of each row, >= 0, or a bool or integer mask; rows of weight 0 are ignored
            rows, and are not read.
        reduction: "mean" over the counted rows (divided by the sum of their weights; 0 when there are none),
            "sum", or "none".
        num_items: number or tensor of one element, in place of mean's denominator: gradient accumulation,
            data parallel. 0 divides by 1, so that the loss is 0 where no row counts.
        vocab_size: compare the first vocab_size classes of both; required when the two V differ. The others
            get zero gradient.
        inplace: the gradient takes the student logits' storage, which no other argument may share; they are
            gone afterwards, and one backward is possible. Not where an fp16 gradient is computed in fp32
            because nothing bounds it (reverse KL, alpha, T = inf, a scale beyond 32): that takes 6 bytes a
            logit.
        teacher_grad: the gradient in the teacher's logits too, where they require one: mutual and online
            distillation. It takes a second call, of the reversed divergence; the hard term has none, and of
            the cross entropy backend="eager" alone has one.
        student_transform, teacher_transform: a `LogitTransform`, scale and softcap, from what is given to the
            logits of the model, for both terms; the gradient is in what is given.
        label_smoothing: eps in [0, 1): the hard term is (1 - eps) CE + eps times the mean of -log q over the
            classes (at T = 1), as in `torch.nn.functional.cross_entropy`. Szegedy et al. (2016), section 7.
        z_loss: adds hard_weight * z_loss * logsumexp(student)^2, which keeps logits from drifting: Chowdhery
            et al. (2022), section 5.
        return_stats: also a `KDStats` of per-row figures, from the same sweeps.
        backend: "auto", "cpu", "cuda", "triton" or "eager". "eager" is differentiable to any order, the
            others once.

    Returns:
        A scalar, or (...) for reduction="none", and with return_stats a `KDStats` after it; float64 for a
        float64 student, else float32. A row with nan or +inf gives nan, and classes at -inf are masked: a
        divergence that does not allow for them is +inf (KL where a class is masked in the student alone,
        reverse KL in the teacher alone), and only for those rows.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is computed; of DTensors pass
            full_tensor(), or each rank its own rows. RuntimeError: the backend cannot run here; torch.func or
            forward-mode derivatives, which only "eager" has; torch.jit.trace.

    Example:
        >>> import torch
        >>> from kdkernels import fused_kd_loss
        >>> student = torch.randn(8, 32000, requires_grad=True)
        >>> teacher, labels = torch.randn(8, 32000), torch.randint(32000, (8,))
        >>> mixing = dict(soft_weight=0.9, hard_weight=0.1)
        >>> loss = fused_kd_loss(student, teacher, labels, temperature=2.0, t_squared=True, **mixing)
        >>> loss.backward()
    """
    mixing = soft_weight, hard_weight, ignore_index, reduction
    more = student_transform, teacher_transform, label_smoothing, z_loss, return_stats
    number, own = own_temperature(temperature, student_logits)
    o = options(divergence, number, t_squared, *mixing, vocab_size, inplace, teacher_grad, *more, backend)
    return _loss(student_logits, teacher_logits, Rows(labels, token_weight, own), o, num_items)


@inputs.names_checked
def logit_matching_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: bool = False,
    *,
    labels: Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    teacher_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Logit matching, |z - v|^2 / (2 V) per row, with gradient (z - v) / V: Chen et al., eq. 2.

    With center=True the rows' means are taken off first, Var(z - v) / 2 with gradient ((z - v) - mean(z - v))
    / V, which is what T^2 KL(p, q) becomes at T = inf: the two agree when the means of student and teacher
    do. Classes at -inf in both are left out; V counts the others. The remaining arguments, the result and the
    errors are those of `fused_kd_loss`.
    """
    divergence = KL() if center else LogitMatching()
    mixing = soft_weight, hard_weight, ignore_index, reduction
    o = options(divergence, math.inf, True, *mixing, vocab_size, inplace, teacher_grad, backend=backend)
    return _loss(student_logits, teacher_logits, Rows(labels, token_weight), o, num_items)
