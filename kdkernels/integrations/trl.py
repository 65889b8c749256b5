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

from ..transforms import LogitTransform
from .trl_losses import (
    IGNORED,
    REDUCTIONS,
    FusedLinearJSDLoss,
    chunked_divergence_loss,
    generalized_jsd_loss,
    loss_of_heads,
    reduction_of,
)

KNOWN_VERSIONS = "0.29 to 1.16"
LIGER_LOSSES = ("liger_loss", "liger_jsd_loss")  # attributes of a trainer, by version
# trainers that do nothing with logits but hand them to the loss, so that they can be hidden states or written
# over
LOGITS_ONLY_FOR_THE_LOSS = ("GKDTrainer", "GOLDTrainer")
CHECKED_TOKENS = 4  # of the forward that shows whether the logits are the head's
CHECKED_TOLERANCE = 0.02  # relative: bf16 rounds a logit by 0.004

Loss = Callable[..., Any]


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
    transform = LogitTransform.from_config(base.config)
    return _Model(module, base.get_decoder(), base.get_output_embeddings(), transform)


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
    except ValueError as error:  # LogitTransform.from_config
        return f"model's logits are not known by its config ({error})"
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

    return functools.partial(_hidden_loss, (student, teacher)), theirs


def _hidden_loss(
    models: tuple[_Model, _Model],
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """`generalized_jsd_loss` of hidden states, (..., H) and (..., H'), in the place of logits."""
    student, teacher = models
    counts = None if labels is None else labels != IGNORED
    shape = torch.Size((*student_logits.shape[:-1], student.head.out_features))
    loss = loss_of_heads(
        student_logits,
        (student.head.weight, student.head.bias),
        teacher_logits,
        (teacher.head.weight, teacher.head.bias),
        beta=beta,
        temperature=temperature,
        token_weight=counts,
        student_transform=student.transform,
        teacher_transform=teacher.transform,
        **reduction_of(shape, counts, reduction, num_items_in_batch),
    )
    return loss if loss.dim() == 0 or counts is None else loss[counts]
