"""`fused_linear_kd_loss`: the loss from hidden states and the heads' weights; logits are never all held.

Here are its checks; chunks.py goes over the tokens, linear_ops.py is what autograd sees of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import inputs
from .call import Rows
from .checks import DTYPES, check_rows, checked_items, common_vocab
from .divergence import Divergence
from .folding import counted_rows
from .linear_call import Setup, TeacherLogits
from .linear_ops import TENSORS, loss_of
from .options import AS_THEY_ARE, Options, options, own_temperature
from .stats import KDStats, from_columns
from .transforms import LogitTransform

# bytes of a chunk's logits, student's and teacher's, and gradient: see `fused_linear_kd_loss`
CPU_BUDGET, GPU_BUDGET = 256 << 20, 5 << 28


def _product_dtype(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Of a model's projection: autocast's, or that of its tensors, which is then one."""
    device_type = hidden.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    for part, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name}_{part}: must be {hidden.dtype}, as {name}_hidden is, or under autocast; got "
                f"{x.dtype}"
            )
    return hidden.dtype


def _check_model(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for part, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is None and part == "bias":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}_{part}: must be a tensor, got {type(x).__name__}")
        inputs.check_dense(f"{name}_{part}", x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}_{part}: must be bfloat16, float16, float32 or float64, got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(
                f"{name}_{part}: must be on the device of {name}_hidden, {hidden.device}, got {x.device}"
            )
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}_hidden and {name}_weight: must be (..., H) and (V, H), got {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}_bias: must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check(tensors: tuple, rows: Rows, num_counted: int | None, o: Options) -> int:
    """Raise for tensors that do not fit together or with the options; the number of classes that count."""
    hidden, weight, bias, *teacher, logits = tensors
    _check_model("student", hidden, weight, bias)
    leading = hidden.shape[:-1]
    if logits is not None:
        if any(x is not None for x in teacher):
            raise ValueError(
                "teacher_logits: takes the place of teacher_hidden, teacher_weight and teacher_bias; "
                "give one or the other"
            )
        if o.teacher_grad:
            raise ValueError(
                "teacher_grad: goes to teacher_hidden, teacher_weight and teacher_bias, and "
                "teacher_logits are given"
            )
    elif teacher[0] is None or teacher[1] is None:
        raise ValueError("teacher_hidden and teacher_weight: both, or teacher_logits in their place")
    else:
        _check_model("teacher", *teacher)
    given = teacher[0] if logits is None else logits
    if isinstance(given, Tensor):
        name = "teacher_hidden" if logits is None else "teacher_logits"
        inputs.check_dense(name, given)
        if given.dtype not in DTYPES:
            raise TypeError(f"{name}: must be bfloat16, float16, float32 or float64, got {given.dtype}")
        if given.dim() == 0 or given.shape[:-1] != leading:
            raise ValueError(
                f"{name}: must have the leading shape of student_hidden, {tuple(leading)}, got "
                f"{tuple(given.shape)}"
            )
        if given.device != hidden.device:
            raise ValueError(f"{name}: must be on the student's device {hidden.device}, got {given.device}")
    elif not callable(given):
        raise TypeError(
            "teacher_logits: must be a tensor or a callable (start, stop) -> logits, got "
            f"{type(given).__name__}"
        )
    elif torch.compiler.is_compiling():
        raise RuntimeError(
            "teacher_logits: a callable cannot be compiled; call the loss under torch.compiler.disable"
        )
    for name, x in zip(TENSORS[3:], (*teacher, logits), strict=True):
        if isinstance(x, Tensor) and inputs.differentiated(x) and not o.teacher_grad:
            raise ValueError(
                f"{name}: receives a gradient only with teacher_grad=True; pass that, or {name}.detach()"
            )
    # a callable's is seen when it is called
    teacher_vocab = (
        len(teacher[1]) if logits is None else len(weight) if callable(logits) else logits.shape[-1]
    )
    vocab = common_vocab(len(weight), teacher_vocab, o)
    check_rows(rows, hidden, o, "hidden states")
    if num_counted is not None:
        tokens = math.prod(leading)
        if not 0 <= num_counted <= tokens:
            raise ValueError(
                f"num_counted: must be between 0 and the number of tokens, {tokens}, got {num_counted}"
            )
        if rows.labels is None and rows.weight is None and num_counted != tokens:
            raise ValueError(
                f"num_counted: all {tokens} tokens count where there are neither labels nor "
                f"token_weight; got {num_counted}"
            )
    return vocab


def check_chunking(logits_dtype: torch.dtype | None, memory_budget: int | None = None) -> int | None:
    """Raise for what `options` does not know; the budget."""
    if logits_dtype not in (None, torch.float32):
        raise ValueError(
            f"logits_dtype: must be torch.float32, or None for that of the products, got {logits_dtype!r}"
        )
    memory_budget = _integer("memory_budget", memory_budget, "a number of bytes or None")
    if memory_budget is not None and not 1 <= memory_budget < 2**63:
        raise ValueError(f"memory_budget: must be positive and an int64, got {inputs.shown(memory_budget)}")
    return memory_budget


def _integer(name: str, x, kind: str) -> int | None:
    """x as a Python integer, or None."""
    if x is not None and (found := inputs.integer(x)) is None:
        raise TypeError(f"{name}: must be {kind}, got {inputs.shown(x)}")
    return None if x is None else found


@inputs.names_checked
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: TeacherLogits | None = None,
    divergence: Divergence | str = "kl",
    temperature: float | Tensor = 1.0,
    t_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    num_counted: int | None = None,
    vocab_size: int | None = None,
    teacher_grad: bool = False,
    student_transform: LogitTransform = AS_THEY_ARE,
    teacher_transform: LogitTransform = AS_THEY_ARE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_stats: bool = False,
    backend: str = "auto",
    logits_dtype: torch.dtype | None = torch.float32,
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, KDStats]:
    r"""`fused_kd_loss` of logits that are never held: those of a chunk of tokens are computed, used and
    written over by the next.

        z = student_hidden @ student_weight.T + student_bias
        v = teacher_hidden @ teacher_weight.T + teacher_bias
        loss = fused_kd_loss(z, v, labels, ...)

    with its gradient in student_hidden, student_weight and student_bias, which is dz @ W, dz.T @ h and the
    sum of dz: for "mean" and "sum" computed in the forward, for "none" by a second pass over the chunks in
    the backward. No tensor has tokens x V elements. Projecting by chunks is Liger-Kernel's idea, Hsu et al.
    (2024), among others'.

    A chunk has `memory_budget` bytes for the logits of both, or of the student where the teacher's are given,
    and for the gradient in the student's: in the dtype of the products that take it, beside the logits where
    these are wider, else in their place. That makes budget / (V (bytes of a student's + of a teacher's logit
    + of a gradient beside them)) tokens, rounded down to 64s, then evened out between the chunks, and one at
    least; the last chunk has what is left. Each chunk reads the weights, and reads and writes the weight's
    gradient, which takes a chunk of a thousand tokens to be little on a GPU and some hundreds on a CPU: the
    budget is 1.25 GiB by default (in bf16 512 tokens of a vocabulary of 262144, 4096 of 32768), and 256 MiB
    on a CPU (192 of 131072). Beside it there are the gradients, and for 16-bit weights and several chunks the
    sum of their gradients in fp32.

    Args:
        student_hidden: (..., H) bfloat16, float16, float32 or float64, what the student's head takes.
        student_weight: (V, H) of the head, which may be the embedding's as well. No gradient is computed
            where it requires none.
        teacher_hidden, teacher_weight: (..., H') and (V', H'); H' and the dtype may differ from the
            student's. A teacher's weight and bias may be parameters that require a gradient: without
            teacher_grad they get none.
        student_bias, teacher_bias: (V), (V').
        teacher_logits: in place of the teacher's three: (..., V'), or a callable (start, stop) -> (stop -
            start, V') logits of these of the flattened tokens, on any device; in the forward, and with
            reduction="none" again in the backward.
        labels, divergence, temperature, t_squared, soft_weight, hard_weight, ignore_index, token_weight,
            reduction, num_items, student_transform, teacher_transform, label_smoothing, z_loss, return_stats,
            backend: as in `fused_kd_loss`.
        num_counted: how many tokens count (label not ignore_index, weight not 0). The others are then left
            out of the projections on a GPU too, where counting them would mean waiting for it; on a CPU they
            always are. A wrong number gives nan on a GPU and an error on a CPU. A callable is asked for all
            tokens.
        vocab_size: the first vocab_size classes of both; required where V and V' differ. Only these are
            projected.
        teacher_grad: the gradient in the teacher's hidden states, weight and bias too, by a second call on
            each chunk; not of the cross entropy. That in its logits has a share of the budget.
        logits_dtype: torch.float32 leaves the logits of 16-bit products unrounded: gradients are right to
            their own rounding, 0.2 % in bf16. None rounds logits to the products' dtype: chunks of 2.5 times
            the tokens in the same budget, twice as fast on a CPU, and gradients off by some per cent where
            the student is near its teacher.
        memory_budget: bytes of a chunk's logits and of the gradient in them, see above.

    The head is its weight and bias, and nothing else of its module is called. Adapters on it (PEFT's LoRA of
    `lm_head`, whose `.weight` is that of the frozen layer) are left out and get no gradient: merge them,
    leave the head out, or take `fused_kd_loss` of the logits. The same goes for forward hooks. A DTensor is
    refused; `weight.full_tensor()` is not one any more, and cannot be seen: where ranks have different tokens
    each shard of the head gets the gradient of its own rank's tokens alone. Do not pass it (docs/linear.md).

    Under autocast the products are in its dtype, and gradients in the parameters' own. The weight gradient is
    summed over chunks in fp32.

    Returns:
        As `fused_kd_loss`: a scalar, or (...) for reduction="none", and with return_stats a `KDStats` after
        it. Differentiable once.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is computed; what a callable
            returns, when it does.
        RuntimeError: the backend cannot run here, or a callable meets torch.compile.

    Example:
        >>> import torch
        >>> from kdkernels import fused_linear_kd_loss
        >>> hidden = torch.randn(8, 64, requires_grad=True)
        >>> weight = torch.randn(32000, 64, requires_grad=True)
        >>> teacher_hidden, teacher_weight = torch.randn(8, 128), torch.randn(32000, 128)
        >>> loss = fused_linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, temperature=2.0)
        >>> loss.backward()
    """
    mixing = soft_weight, hard_weight, ignore_index, reduction
    more = student_transform, teacher_transform, label_smoothing, z_loss, return_stats
    number, temperature = own_temperature(temperature, student_hidden)
    o = options(divergence, number, t_squared, *mixing, vocab_size, False, teacher_grad, *more, backend)
    o.check_exchangeable()
    memory_budget = check_chunking(logits_dtype, memory_budget)
    num_counted = _integer("num_counted", num_counted, "an integer")
    if not teacher_grad:  # parameters of a model that nobody has frozen
        teacher_weight, teacher_bias = map(inputs.leaf_detached, (teacher_weight, teacher_bias))
    tensors = (
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
    )
    compiling = torch.compiler.is_compiling()
    if not compiling:
        differentiable = tensors[: 6 if teacher_grad else 3]
        inputs.check_mode(
            "fused_linear_kd_loss", differentiable, False, 'logits, and fused_kd_loss(backend="eager")'
        )
    rows = Rows(labels, token_weight, temperature)
    vocab = _check(tensors, rows, num_counted, o)
    num_items = checked_items(num_items, o)
    if not compiling and reduction == "none":  # which saves what it is given
        tensors, rows = tuple(map(inputs.saveable, tensors)), Rows(*map(inputs.saveable, rows))
    if memory_budget is None:
        memory_budget = CPU_BUDGET if student_hidden.device.type == "cpu" else GPU_BUDGET
    student_dtype = _product_dtype("student", *tensors[:3])
    teacher_dtype = student_dtype if teacher_hidden is None else _product_dtype("teacher", *tensors[3:6])
    rows, denominator = counted_rows(rows, student_hidden, vocab, o, num_items)

    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[:6])
    setup = Setup(needs, student_dtype, teacher_dtype, logits_dtype, memory_budget, num_counted, return_stats)
    loss, columns = loss_of(tensors, rows, denominator, o, vocab, setup)
    if not return_stats:
        return loss
    return loss, from_columns(
        columns.detach(), student_hidden.shape[:-1], labels, bool(o.hard_weight), rows.weight, loss.dtype
    )
