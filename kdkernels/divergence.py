"""The registry of the divergences and their text forms: "kl", "renyi(0.5)".

form.py says what a divergence is, to people and to a backend. Its classes are in members.py and, where they
have an order, in orders.py; terms.py has the terms of their sums.
"""

from __future__ import annotations

import dataclasses
import functools

from . import members, orders
from .form import FAMILIES, Divergence, Form, Sides  # noqa: F401  whoever has a divergence asks for these
from .members import *  # noqa: F403
from .members import LogitMatching
from .orders import *  # noqa: F403

# for people; kdkernels/__init__.py takes them from here
__all__ = ["Divergence", "parse"]
__all__ += members.__all__
__all__ += orders.__all__

REGISTRY: dict[str, type[Divergence]] = {
    cls.name: cls
    for cls in (
        *(getattr(module, name) for module in (members, orders) for name in module.__all__),
        LogitMatching,  # a function of its own asks for it
    )
}
# other names that papers and libraries have for some of them
ALIASES = {"forward_kl": "kl", "js": "jsd(0.5)"}


@functools.lru_cache(maxsize=256)
def of(name: str, parameter: float) -> Divergence:
    """The divergence of a name and a parameter, which those without one pass over."""
    cls = REGISTRY[name]
    return cls(parameter) if dataclasses.fields(cls) else cls()


def usual() -> tuple[Divergence, ...]:
    """Every divergence that people can name, those of a number with the numbers that papers use."""
    named = (cls for cls in REGISTRY.values() if cls is not LogitMatching)
    return tuple(x for cls in named for x in (map(cls, cls.usual) if cls.usual else (cls(),)))


def parse(text: str) -> Divergence:
    """The divergence of a text form: "kl", "renyi(0.5)", "renyi(inf)", "jsd(0.1)". parse(d.text) == d.

    "forward_kl" is "kl", and "js" is "jsd(0.5)".
    """
    name, bracket, rest = ALIASES.get(text.strip(), text).strip().partition("(")
    cls = REGISTRY.get(name.strip())
    if cls is None or (bracket and not rest.endswith(")")):
        written = {
            c: ", ".join(f.name for f in dataclasses.fields(c))
            for c in REGISTRY.values()
            if c is not LogitMatching
        }
        known = ", ".join(
            f"{c.name}({arguments})" if arguments else c.name for c, arguments in written.items()
        )
        raise ValueError(f"divergence: unknown {text!r}; known are {known}")
    try:
        arguments = [float(x) for x in rest[:-1].split(",")] if bracket else []
        return cls(*arguments)
    except TypeError:
        raise ValueError(
            f"divergence: {text!r} has the wrong number of arguments; see kdkernels.{cls.__name__}"
        ) from None
    except ValueError as error:
        raise ValueError(f"divergence: {text!r}: {error}") from None
