"""The head of a language model, taken out of its forward: what it is given goes to a loss that projects it by
chunks, and the logits of a whole batch never exist.

The model runs as always, with its wrappers, hooks and autocast, and where it calls its head the hidden states
are taken and a probe is returned: a row of numbers, in place of a batch of logits. What the forward makes of
the probe shows whether the model does to its logits what the loss is told it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..transforms import LogitTransform

# what shards a model adds hooks, which are right about the head
WRAPPERS = ("torch.distributed.", "deepspeed.")
REACH = 60.0  # of a probe: beyond the softcaps there are, so that they show


def why_not(model: nn.Module, head: nn.Module | None) -> str | None:
    """Why a loss cannot take the place of the model's head, None where it can: the loss multiplies with the
    head's weight and adds its bias, and what else a head does would be left out without a word."""
    if head is None:
        return f"{type(model).__name__} has no head: its get_output_embeddings() is missing or gives None"
    name = f"the head of {type(model).__name__}, a {type(head).__name__},"
    if type(head).__module__.split(".")[0] == "peft":
        return (
            f"{name} has adapters, which would be left out and get no gradient: merge them, or leave the "
            "head out of their targets"
        )
    if not _is_plain(head):
        return f"{name} is not a plain nn.Linear"
    if "forward" in vars(head):
        return f"{name} has its forward replaced, as by accelerate's dispatch of a device_map"
    hooks = (*head._forward_hooks.values(), *head._forward_pre_hooks.values(), *head._backward_hooks.values())
    for hook in (*hooks, *head._backward_pre_hooks.values()):
        owner = getattr(hook, "func", hook)  # of a partial
        if not (getattr(owner, "__module__", None) or "").startswith(WRAPPERS):
            return f"{name} has hooks, which would not see its logits: {owner!r}"
    return None


def _is_plain(head: nn.Module) -> bool:
    """nn.Linear, or what fully_shard makes of one."""
    kind = type(head)
    sharded = nn.Linear in kind.__bases__ and any(x.__name__ == "FSDPModule" for x in kind.__bases__)
    return (kind is nn.Linear or sharded) and isinstance(head.weight, nn.Parameter)


def head_of(model: nn.Module) -> nn.Module | None:
    """The model's output embeddings, by the name that transformers has for them."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """The module with another forward; its hooks, and those of its wrappers, stay."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own


def inside(wrapper: nn.Module, module: nn.Module, run: Callable, inputs: dict[str, Any]) -> Any:
    """run(forward, **inputs) in the place of the forward of `module`, called by way of its wrapper: DDP sees
    what `run` returns as the model's output, and FSDP has the parameters together while it runs."""
    forward = module.forward  # with the autocast that accelerate puts around it

    def redirected(*args, **kwargs):
        with replaced(module, forward):
            return run(forward, *args, **kwargs)

    with replaced(module, redirected):
        return wrapper(**inputs)


def take(
    forward: Callable, head: nn.Module, inputs: dict[str, Any], use: Callable[[Tensor], Any]
) -> tuple[Any, Tensor, Tensor]:
    """(use(hidden states), the probe, what the forward made of it) of a forward whose head gets the hidden
    states, in place of their projection."""
    found = []
    probe = torch.linspace(-REACH, REACH, head.out_features, device=head.weight.device)[None, None]

    def projection(hidden: Tensor) -> Tensor:
        if found:
            raise ValueError(
                "linear: the model calls its head more than once in a forward; pass linear=False"
            )
        found.append(use(hidden))
        return probe.clone()

    with replaced(head, projection):
        outputs = forward(**inputs)
    if not found:
        raise ValueError("linear: the model's forward does not call its head; pass linear=False")
    return found[0], probe, logits_of(outputs)


def logits_of(outputs: Any) -> Tensor:
    """The logits among what a model returns: by name, or the first."""
    logits = getattr(outputs, "logits", None)
    if logits is None and isinstance(outputs, tuple):
        logits = outputs[0]
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returns no logits: {type(outputs).__name__}")
    return logits


def check_transform(
    name: str, probe: Tensor, made: Tensor, transform: LogitTransform, vocab_size: int | None
) -> None:
    """Raise where a model makes other logits of what its head gives than the loss does: a scale or a softcap
    that is not known, a bias or a mask behind the head, classes that are cut off."""
    made, expected = made.detach().float().reshape(-1), transform(probe).reshape(-1)
    if vocab_size is None and len(made) != len(expected):
        raise ValueError(
            f"vocab_size: the {name}'s head has {len(expected)} classes, and its logits {len(made)}; pass "
            f"vocab_size={len(made)}, or linear=False"
        )
    n = min(vocab_size or len(expected), len(expected))
    if len(made) >= n:
        made, expected = made[:n], expected[:n]
        near = 0.01 * expected.abs() + 0.001 * expected.abs().max()  # bf16's roundings
        if bool(((made - expected).abs() <= near).all()):
            return
    raise ValueError(
        f"{name}_transform: the {name} makes other logits of what its head gives than {transform!r}; pass "
        f"{name}_transform=LogitTransform(scale, softcap) as its forward has it, or linear=False"
    )
