"""TRL's distillation trainers with kdkernels: `fused(trainer)`, and the drop-in classes and functions behind
it.

TRL has its divergence in three places, by trainer and version, and `fused` takes the one that it finds:

    generalized_jsd_loss       GKDTrainer, GOLDTrainer, IWOPDTrainer: a function of logits
    _chunked_divergence_loss   DistillationTrainer since it is stable: a function of hidden states and heads
    liger_loss                 up to 1.13, with use_liger_kernel=True: a module of hidden states and heads

Nothing of TRL's is changed for other trainers of the same process. TRL's meaning of beta holds everywhere:
the generalised Jensen-Shannon divergence beta KL(p, m) + (1 - beta) KL(q, m) of the teacher p and the student
q to m = beta p + (1 - beta) q, which is KL(p, q) for beta = 0 and KL(q, p) for beta = 1:
`kdkernels.JSD(beta)`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..divergence import JSD
from ..functional import fused_kd_loss
from ..linear import fused_linear_kd_loss
from ..options import options
from ..transforms import LogitTransform

KNOWN_VERSIONS = "0.29 to 1.16"
IGNORED = -100  # a label of TRL's that does not count
REDUCTIONS = ("batchmean", "sum", "mean", "none")
LIGER_LOSSES = ("liger_loss", "liger_jsd_loss")  # attributes of a trainer, by version
# trainers that do nothing with logits but hand them to the loss, so that they can be hidden states or written
# over
LOGITS_ONLY_FOR_THE_LOSS = ("GKDTrainer", "GOLDTrainer")
CHECKED_TOKENS = 4  # of the forward that shows whether the logits are the head's
CHECKED_TOLERANCE = 0.02  # relative: bf16 rounds a logit by 0.004

Loss = Callable[..., Any]


# ---------------------------------------------------------------- the losses, as TRL calls them


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
    *,
    inplace: bool = False,
) -> Tensor:
    """TRL's function of the same name, from `fused_kd_loss`: JSD(beta) of softmaxes at `temperature`, without
    T^2.

    Args:
        student_logits, teacher_logits: (batch, tokens, V) or (rows, V).
        labels: (batch, tokens), already shifted; rows of label -100 do not count. Nothing else is read of
            them.
        reduction: "batchmean", the sum over the counted rows divided by their number, or, without labels, by
            the size of the first dimension, whatever the second is; "sum"; "mean", the sum divided by counted
            rows times V, as TRL has it; "none", one number a counted row, where TRL has one a class.
        num_items_in_batch: replaces the reduction by the sum divided by it.
        inplace: the gradient takes the memory of the student's logits: see `fused_kd_loss`.

    Raises ValueError for a beta outside [0, 1], a reduction that is not one of these, and what
    `fused_kd_loss` refuses.
    """
    counts = None if labels is None else labels != IGNORED
    reduced = _reduction(student_logits.shape, counts, reduction, num_items_in_batch)
    loss = fused_kd_loss(
        student_logits,
        teacher_logits.detach(),
        divergence=JSD(float(beta)),
        temperature=temperature,
        token_weight=counts,
        inplace=inplace,
        **reduced,
    )
    return loss if loss.dim() == 0 or counts is None else loss[counts]


def _reduction(
    shape: tuple[int, ...], counts: Tensor | None, reduction: str, num_items: int | Tensor | None
) -> dict[str, Any]:
    """TRL's reduction of (..., V) logits in our words: the options `reduction` and `num_items`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if num_items is not None:
        return {"reduction": "mean", "num_items": num_items}
    if reduction == "batchmean":
        return {"reduction": "mean", "num_items": None if counts is not None else max(shape[0], 1)}
    if reduction == "mean":
        rows = shape[:-1].numel() if counts is None else counts.sum()
        return {"reduction": "mean", "num_items": rows * shape[-1]}
    return {"reduction": reduction}


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: int | Tensor | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """DistillationTrainer's `_chunked_divergence_loss`, from `fused_linear_kd_loss`.

    Args:
        student_hidden_states, teacher_hidden_states: (batch, tokens, H) and (batch, tokens, H').
        student_lm_head_weight, teacher_lm_head_weight: (V, H) and (V, H'), the biases (V).
        completion_mask: (batch, tokens), not 0 where a token counts.
        num_items_in_batch: what the sum is divided by; None for the number of tokens that count.
        chunk_size: taken for the sake of older versions; the chunks are `fused_linear_kd_loss`'s own.

    Returns:
        (loss, sum of the student's entropies in nats over the tokens that count, their number); the entropy
        is that of the softmax at `temperature`.
    """
    loss, stats = _of_heads(
        student_hidden_states,
        (student_lm_head_weight, student_lm_head_bias),
        teacher_hidden_states,
        (teacher_lm_head_weight, teacher_lm_head_bias),
        beta=beta,
        temperature=temperature,
        token_weight=completion_mask != 0,
        num_items=num_items_in_batch,
        student_transform=LogitTransform(student_logit_scale, student_final_logit_softcapping),
        teacher_transform=LogitTransform(teacher_logit_scale, teacher_final_logit_softcapping),
        return_stats=True,
    )
    return loss, torch.where(stats.mask, stats.student_entropy, 0.0).sum(), stats.counted


Head = tuple[Tensor, Tensor | None]  # weight and bias


def _of_heads(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor | None = None,
    *,
    beta: float,
    **more,
):
    """`fused_linear_kd_loss` of JSD(beta), with a teacher that gets no gradient.

    Tokens that do not count, a prompt's for one, are counted and left out, as TRL does: on a GPU that waits
    for it once.
    """
    if (mask := more.get("token_weight")) is not None:
        more["num_counted"] = int(mask.count_nonzero())
    weight, bias = _cast(student_head, student_hidden)
    frozen = [x if x is None else x.detach() for x in teacher_head]
    teacher_weight, teacher_bias = _cast(frozen, teacher_hidden)
    return fused_linear_kd_loss(
        student_hidden,
        weight,
        teacher_hidden.detach(),
        teacher_weight,
        labels,
        student_bias=bias,
        teacher_bias=teacher_bias,
        divergence=JSD(float(beta)),
        **more,
    )


def _cast(head: Head, hidden: Tensor) -> Iterator[Tensor | None]:
    """The head in the dtype of the hidden states, which one that is kept in fp32 may not have. Under autocast
    as it is: its gradient is fp32 then."""
    if torch.is_autocast_enabled(hidden.device.type):
        return iter(head)
    return (x if x is None else x.to(hidden.dtype) for x in head)


class FusedLinearJSDLoss(torch.nn.Module):
    """Liger-Kernel's `LigerFusedLinearJSDLoss` and TRL's `FusedLinearJSDLoss`, from `fused_linear_kd_loss`.

        loss = weight_hard_loss * CE(label, q at T = 1) + weight_soft_loss * JSD(beta)(p, q at T)

    divided by the number of labels that are not ignore_index, 0 where there are none. There is no T^2 in it.

    Args:
        weight_hard_loss, weight_soft_loss: of the cross entropy and of the divergence.
        beta: 0 is KL(teacher, student), 1 KL(student, teacher).
        ignore_index: the label of tokens that do not count.
        temperature: of the divergence's softmaxes.
        compiled, chunk_size: taken and not used: nothing is compiled, and a chunk has the size of
            `fused_linear_kd_loss`'s budget.
        return_soft_hard_loss: return (loss, divergence, cross entropy), the last two without their weights
            and without a gradient.

    The forward takes student_input (..., H), student_weight (V, H), teacher_input (..., H'), teacher_weight
    (V', H'), true_labels (...) and optionally student_bias (V), teacher_bias (V'). Where the vocabularies
    differ, as one that is padded does, the first min(V, V') classes are compared; Liger gives the student
    logits of 0 for the others.

    Raises ValueError for a temperature, beta or weight out of range, when the module is made.

    Example:
        >>> import torch
        >>> from kdkernels.integrations.trl import FusedLinearJSDLoss
        >>> criterion = FusedLinearJSDLoss(weight_hard_loss=0.1, weight_soft_loss=0.9, beta=0.5,
        temperature=2.0) >>> student, teacher = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
        >>> heads = torch.randn(32000, 64, requires_grad=True), torch.randn(32000, 128)
        >>> labels = torch.randint(32000, (8,))
        >>> criterion(student, heads[0], teacher, heads[1], labels).backward()
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        options(JSD(float(beta)), temperature, False, weight_soft_loss, weight_hard_loss, ignore_index)
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        loss_of = functools.partial(
            _of_heads,
            student_input,
            (student_weight, student_bias),
            teacher_input,
            (teacher_weight, teacher_bias),
            true_labels.reshape(student_input.shape[:-1]),
            beta=self.beta,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            vocab_size=min(len(student_weight), len(teacher_weight)),
        )
        weights = {"soft_weight": self.weight_soft_loss, "hard_weight": self.weight_hard_loss}
        if not self.return_soft_hard_loss:
            return loss_of(**weights)
        loss, stats = loss_of(**weights, return_stats=True)
        if not (self.weight_soft_loss and self.weight_hard_loss):
            # of a term of weight 0 there are no figures: once more, without a gradient
            with torch.no_grad():
                _, stats = loss_of(soft_weight=1.0, hard_weight=1.0, return_stats=True)
        counted = stats.counted.clamp_min(1)
        terms = (
            torch.where(stats.mask, x, 0.0).sum() / counted for x in (stats.divergence, stats.cross_entropy)
        )
        return loss, *terms


# ---------------------------------------------------------------- a trainer


def fused(trainer, linear: bool | None = None):
    """Make one TRL trainer compute its divergence with kdkernels; the trainer, for chaining.

    GKDTrainer and GOLDTrainer compute it from logits, or, with linear=True, from hidden states: their models'
    heads are then not called, and no logits are held. DistillationTrainer always has hidden states.
    IWOPDTrainer, and GOLDTrainer with another tokenizer (ULD), have logits. Beta, temperature, reductions,
    the number of items in a batch, logit scale and softcap of a model's config and the logged entropy are
    those that TRL has.

    Args:
        trainer: of TRL, before or during training. Others of the same class stay as they are; a second call
            replaces the first.
        linear: True for hidden states, False for logits, None for hidden states where that is possible: both
            heads are a `torch.nn.Linear` without adapters or hooks, one forward of each model shows that its
            logits are what head, scale and softcap make of its last hidden state, nothing is sharded (FSDP,
            DeepSpeed) or compiled, and no subclass has its own compute_loss.

    A call that asks for what kdkernels has not, as GOLD's `logits_are_probs` or IW-OPD's `top_k`, goes to
    TRL's own function, with a warning. So do heads that are sharded. In evaluation TRL is asked for its
    models' outputs, and the loss is computed from logits.

    Raises:
        TypeError: this is no trainer.
        ValueError: linear cannot be had; the message says why.
        RuntimeError: this TRL has none of the functions that are known (0.29 to 1.16 have), or a trainer's
            first step did not call it.

    Example:
        trainer = fused(GKDTrainer(model=student, teacher_model=teacher, args=args, ...))
        trainer.train()
    """
    if not all(hasattr(trainer, name) for name in ("compute_loss", "accelerator", "args")):
        raise TypeError(f"fused: must be a trainer of TRL's, got {type(trainer).__name__}")
    _undo(trainer)
    liger = next((name for name in LIGER_LOSSES if getattr(trainer, name, None) is not None), None)
    module = _module_with(trainer, "_chunked_divergence_loss")
    if liger is not None:
        _no_logits(trainer, linear)
        _replace_module(trainer, liger)
    elif module is not None:
        _no_logits(trainer, linear)
        _replace_function(trainer, module)
    elif hasattr(trainer, "generalized_jsd_loss"):
        _replace_method(trainer, _is_linear(trainer, linear))
    else:
        raise RuntimeError(
            f"fused: {type(trainer).__name__} of trl {_version()} has neither generalized_jsd_loss nor "
            f"liger_loss, and its module no _chunked_divergence_loss; TRL {KNOWN_VERSIONS} are known"
        )
    return trainer


def _version() -> str:
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _module_with(trainer, name: str):
    """The module of the trainer's classes that has this function; None where none has."""
    modules = (sys.modules.get(cls.__module__) for cls in type(trainer).__mro__)
    return next((x for x in modules if x is not None and callable(getattr(x, name, None))), None)


def _no_logits(trainer, linear: bool | None) -> None:
    if linear is False:
        raise ValueError(
            f"linear: {type(trainer).__name__} has hidden states alone here; leave it out, or True"
        )


def _set(trainer, name: str, value) -> None:
    """An attribute of the trainer, which `_undo` sets back."""
    kept = trainer.__dict__.setdefault("_before_kdkernels", {})
    kept.setdefault(name, trainer.__dict__.get(name, _undo))
    object.__setattr__(trainer, name, value)


def _undo(trainer) -> None:
    """Take back what an earlier call has set."""
    for name, before in trainer.__dict__.pop("_before_kdkernels", {}).items():
        if before is _undo:  # it was the class's
            trainer.__dict__.pop(name, None)
        else:
            trainer.__dict__[name] = before


class _Hook:
    """A loss in the place of TRL's: `ours` where it knows all that is asked, else `theirs`."""

    def __init__(self, ours: Loss, theirs: Loss, declined: Callable[[dict], str | None]):
        self.ours, self.theirs, self.declined, self.calls = ours, theirs, declined, 0
        self.signature, self.known = inspect.signature(theirs), inspect.signature(ours).parameters.keys()

    def __call__(self, *args, **kwargs):
        self.calls += 1
        given = self.signature.bind(*args, **kwargs).arguments
        others = given.keys() - self.known
        unknown = sorted(name for name in others if not self._is_default(name, given[name]))
        why = f"{', '.join(unknown)} is not known here" if unknown else self.declined(given)
        if why is None:
            return self.ours(**{name: x for name, x in given.items() if name in self.known})
        warnings.warn(f"kdkernels leaves this loss to TRL: {why}", stacklevel=2)
        return self.theirs(*args, **kwargs)

    def _is_default(self, name: str, value) -> bool:
        default = self.signature.parameters[name].default
        return type(value) is type(default) and value == default

    @contextlib.contextmanager
    def doing(self, ours: Loss, theirs: Loss) -> Iterator[None]:
        """With these in the place of its own."""
        before = self.ours, self.theirs
        self.ours, self.theirs = ours, theirs
        try:
            yield
        finally:
            self.ours, self.theirs = before


def _unknown_reduction(given: dict) -> str | None:
    reduction = given.get("reduction", "batchmean")
    return None if reduction in REDUCTIONS else f"reduction={reduction!r}"


def _sharded(given: dict) -> str | None:
    """Why the heads' weights cannot be read as they are."""
    for name, x in given.items():
        if "lm_head" in name and isinstance(x, Tensor) and (hasattr(x, "full_tensor") or hasattr(x, "ds_id")):
            return f"{name} is sharded"
    return None


def _with_hook(trainer, hook: _Hook, around: Callable[..., contextlib.AbstractContextManager]) -> None:
    """compute_loss with `around(model, return_outputs)` about it, and a check that TRL calls the hook."""
    original = trainer.compute_loss

    @functools.wraps(original)
    def compute_loss(model, inputs, return_outputs: bool = False, **more):
        with around(model, return_outputs):
            found = original(model, inputs, return_outputs=return_outputs, **more)
        if not hook.calls:
            raise RuntimeError(
                f"fused: {type(trainer).__name__} of trl {_version()} computes its loss elsewhere, in this "
                f"version or with these arguments; kdkernels has done nothing. TRL {KNOWN_VERSIONS} are known"
            )
        return found

    _set(trainer, "compute_loss", compute_loss)


def _replace_module(trainer, name: str) -> None:
    """Of the trainers that use Liger's loss: the module with its settings, and ours in it."""
    theirs = getattr(trainer, name)
    names = inspect.signature(FusedLinearJSDLoss.__init__).parameters
    _set(trainer, name, FusedLinearJSDLoss(**{x: getattr(theirs, x) for x in names if hasattr(theirs, x)}))


def _replace_function(trainer, module) -> None:
    """Of DistillationTrainer: the function of its module, while this trainer computes its loss."""
    name = "_chunked_divergence_loss"
    hook = _Hook(chunked_divergence_loss, getattr(module, name), _sharded)

    @contextlib.contextmanager
    def around(model, return_outputs: bool) -> Iterator[None]:
        before = getattr(module, name)
        setattr(module, name, hook)
        try:
            yield
        finally:
            setattr(module, name, before)

    _with_hook(trainer, hook, around)


def _replace_method(trainer, linear: bool) -> None:
    """Of the trainers whose loss is a function of logits, or of what stands for them."""
    original = type(trainer).generalized_jsd_loss
    hook = _Hook(generalized_jsd_loss, original, _unknown_reduction)
    spare = _uses_logits_for_the_loss_alone(trainer)

    @contextlib.contextmanager
    def around(model, return_outputs: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if spare and not return_outputs:
                if linear:
                    losses = _of_hidden_states(trainer, model, original, stack)
                else:
                    losses = _over_the_logits, original
                stack.enter_context(hook.doing(*losses))
            yield

    _set(trainer, "generalized_jsd_loss", hook)
    _with_hook(trainer, hook, around)


def _over_the_logits(student_logits: Tensor, teacher_logits: Tensor, **more) -> Tensor:
    """`generalized_jsd_loss`, its gradient written over logits that nobody reads any more."""
    inplace = student_logits.requires_grad and not student_logits.is_leaf
    return generalized_jsd_loss(student_logits, teacher_logits, **more, inplace=inplace)


def _uses_logits_for_the_loss_alone(trainer) -> bool:
    owner = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    is_theirs = owner.__module__.split(".")[0] == "trl" and owner.__name__ in LOGITS_ONLY_FOR_THE_LOSS
    return is_theirs and not getattr(trainer, "use_uld_loss", False)


# ---------------------------------------------------------------- hidden states in the place of logits


class _Model(NamedTuple):
    """A model of a trainer: what its loss needs to go on from hidden states."""

    module: torch.nn.Module  # with its wrapper of PEFT's, without those of DDP and of accelerate
    decoder: torch.nn.Module
    head: torch.nn.Linear
    transform: LogitTransform

    def logits(self, hidden: Tensor) -> Tensor:
        return self.transform(self.head(hidden))


def _model(trainer, module: torch.nn.Module) -> _Model:
    module = trainer.accelerator.unwrap_model(module)
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    config = base.config.get_text_config()
    return _Model(module, base.get_decoder(), base.get_output_embeddings(), _transform_of(config))


def _transform_of(config) -> LogitTransform:
    """From a head's output to the model's logits, by the names that models have in their configs for it."""
    scale = next(
        (
            x
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (x := getattr(config, name, None))
        ),
        1.0,
    )
    if divisor := getattr(config, "logits_scaling", None):  # Granite's; HyperCLOVA multiplies by it
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def _is_linear(trainer, linear: bool | None) -> bool:
    """Whether to compute from hidden states. ValueError where that is asked for and cannot be."""
    if linear is False:
        return False
    why = _why_not_linear(trainer)
    if why is not None and linear:
        raise ValueError(f"linear: {why}; leave it out, or False, for the loss of logits")
    return why is None


def _why_not_linear(trainer) -> str | None:
    name = type(trainer).__name__
    if not _uses_logits_for_the_loss_alone(trainer):
        return f"{name} may read its logits elsewhere than in the loss"
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
        return "under FSDP and DeepSpeed the heads may be sharded when the loss reads them"
    if trainer.args.torch_compile:
        return "torch_compile=True compiles the models together with their heads"
    if getattr(trainer, "_is_vlm", False):
        return "a vision-language model does not take its images in the part that gives the hidden states"
    for who, module in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        if (why := _why_no_head(trainer, module)) is not None:
            return f"the {who}'s {why}"
    return None


def _why_no_head(trainer, module: torch.nn.Module) -> str | None:
    """Why a model's logits are not a plain product of its last hidden state with a weight, as far as can be
    seen."""
    if any(hasattr(x, "num_virtual_tokens") for x in getattr(module, "peft_config", {}).values()):
        return "prompt tokens of PEFT's are added outside of the part that gives the hidden states"
    try:
        model = _model(trainer, module)
    except AttributeError as error:
        return f"model is not one of transformers' causal language models ({error})"
    if type(model.head) is not torch.nn.Linear:
        return f"head is a {type(model.head).__name__}, not a plain torch.nn.Linear"
    if model.head._forward_hooks or model.head._forward_pre_hooks:
        return "head has hooks"
    error = _head_error(trainer, model)
    if not error <= CHECKED_TOLERANCE:
        return (
            "logits are not what head, scale and softcap make of its last hidden state: they differ by "
            f"{error:.1g}"
        )
    return None


@torch.no_grad()
def _head_error(trainer, model: _Model) -> float:
    """By how much a model's logits differ from those of its head, relative to the largest, for a few
    tokens."""
    ids = torch.arange(CHECKED_TOKENS, device=model.head.weight.device)[None] % model.head.out_features
    training = model.module.training
    model.module.eval()
    try:
        with trainer.accelerator.autocast():
            logits = model.module(input_ids=ids, use_cache=False).logits.float()
            found = model.logits(model.decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
    finally:
        model.module.train(training)
    return float((logits - found).abs().max() / logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


class _Linked(torch.autograd.Function):
    """Hidden states whose graph has the head's parameters in it: DDP looks there for those that get a
    gradient."""

    @staticmethod
    def forward(ctx, hidden, *parameters):
        ctx.parameters = len(parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, upstream):
        return upstream, *[None] * ctx.parameters


@contextlib.contextmanager
def _giving_hidden_states(trainer, model: _Model) -> Iterator[None]:
    """A model whose forward returns its last hidden state in the place of logits. The wrappers' forward is
    called all the same, which DDP needs; accelerate's autocast is part of the forward that is replaced."""
    from transformers.modeling_outputs import CausalLMOutput

    before = model.module.__dict__.get("forward")

    def forward(*args, **kwargs):
        with trainer.accelerator.autocast():
            hidden = model.decoder(*args, **kwargs | {"use_cache": False}).last_hidden_state
        return CausalLMOutput(logits=_Linked.apply(hidden, *model.head.parameters()))

    model.module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.module.forward
        else:
            model.module.forward = before


def _of_hidden_states(
    trainer, model: torch.nn.Module, original: Loss, stack: contextlib.ExitStack
) -> tuple[Loss, Loss]:
    """(our loss, TRL's) of hidden states, which both models give in the place of logits until the stack
    ends."""
    student, teacher = _model(trainer, model), _model(trainer, trainer.teacher_model)
    for x in (student, teacher):
        stack.enter_context(_giving_hidden_states(trainer, x))
    stack.enter_context(trainer.accelerator.autocast())

    def theirs(student_logits, teacher_logits, *args, **kwargs):
        return original(student.logits(student_logits), teacher.logits(teacher_logits), *args, **kwargs)

    return functools.partial(_hidden_loss, student, teacher), theirs


def _hidden_loss(
    student: _Model,
    teacher: _Model,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """`generalized_jsd_loss` of hidden states, (..., H) and (..., H'), in the place of logits."""
    counts = None if labels is None else labels != IGNORED
    shape = torch.Size((*student_logits.shape[:-1], student.head.out_features))
    loss = _of_heads(
        student_logits,
        (student.head.weight, student.head.bias),
        teacher_logits,
        (teacher.head.weight, teacher.head.bias),
        beta=beta,
        temperature=temperature,
        token_weight=counts,
        student_transform=student.transform,
        teacher_transform=teacher.transform,
        **_reduction(shape, counts, reduction, num_items_in_batch),
    )
    return loss if loss.dim() == 0 or counts is None else loss[counts]
