"""Peak memory of the loss from hidden states, on paper: `--linear` prints it before it measures."""

from __future__ import annotations

from itertools import product

from .. import linear
from ..chunks import chunk_tokens
from . import screen

TOKENS, VOCABS, WIDTHS = 8192, (32768, 128256, 262144), (1024, 4096)
LOGIT_BYTES = 4  # of a chunk's, whatever the dtype of the products


def class_bytes(itemsize: int) -> int:
    """Of a chunk, a token and class: both logits, and a 16-bit gradient beside them."""
    return 2 * LOGIT_BYTES + (itemsize if itemsize < LOGIT_BYTES else 0)


def memory(
    tokens: int, vocab: int, width: int, itemsize: int = 2, budget: int = linear.GPU_BUDGET
) -> dict[str, int]:
    """Peak bytes beyond hidden states and weights, by what they are for, both models of one width and
    dtype."""
    logits, gradients = tokens * vocab * itemsize, (tokens + vocab) * width * itemsize
    chunk = chunk_tokens(tokens, vocab, class_bytes(itemsize), budget)
    # 16-bit: the weight's gradient is summed in fp32, and cast when the chunks are gone
    several, total = chunk < tokens and itemsize == 2, vocab * width * 4
    chunks = chunk * vocab * class_bytes(itemsize)
    held = tokens * width * itemsize
    return {
        "chunk": chunk,
        "kdkernels": held + max(chunks + total, total + vocab * width * itemsize)
        if several
        else chunks + gradients,
        "full, in place": 2 * logits + gradients,
        "full logits": 3 * logits + gradients,
        # kl_div(log_target=True), as measured
        "eager": 9 * logits + gradients,
    }


def show() -> None:
    screen.say(f"peak memory beyond hidden states and weights in GiB, on paper: {TOKENS} tokens, bf16")
    rows = []
    for vocab, width in product(VOCABS, WIDTHS):
        chunk, *sizes = memory(TOKENS, vocab, width).values()
        rows.append((f"{vocab} x {width}", str(chunk), *(f"{x / 2**30:.2f}" for x in sizes)))
    screen.table(("V x H", *memory(1, 1, 1)), rows)
