"""The divergences that tests go through, by their text forms. A new one in the registry is in each list that
is made of these."""

from dataclasses import replace

from kdkernels.divergence import usual


def apart(divergences) -> tuple[str, ...]:
    """Without those that are another one times a number, which the same kernels compute: for tests that take
    long."""
    return tuple({replace(d.form, factor=1.0, limit=None): d.text for d in reversed(divergences)}.values())[
        ::-1
    ]


# with the numbers that papers use
USUAL = tuple(d.text for d in usual())
APART = apart(usual())
# each name once, with the first of them
ONE_EACH = tuple({d.name: d.text for d in reversed(usual())}.values())[::-1]
# and with numbers at which formulas change
ENDS = ("renyi(0)", "renyi(0.9999)", "renyi(inf)", "reverse_renyi(0)", "reverse_renyi(inf)")
