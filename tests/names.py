"""The divergences that tests go through, by their text forms. A new one in the registry is in each list that
is made of these."""

from kdkernels.divergence import usual

# with the numbers that papers use
USUAL = tuple(d.text for d in usual())
# each name once, with the first of them
ONE_EACH = tuple({d.name: d.text for d in reversed(usual())}.values())[::-1]
# and with numbers at which formulas change
ENDS = ("renyi(0)", "renyi(0.9999)", "renyi(inf)", "reverse_renyi(0)", "reverse_renyi(inf)")
