"""What the recipes distil, small enough for a CPU and without a network: Llamas from a config, and text whose
tokens are its bytes."""

import argparse
import inspect

import torch
from torch.nn import functional as F

PAD, VOCAB = 256, 258


def sequences(modules=(argparse, inspect), length: int = 64) -> list[dict[str, torch.Tensor]]:
    """Texts of 16 to `length` bytes, as input_ids and labels; the first eight, a prompt, do not count."""
    text = torch.tensor(list("".join(map(inspect.getsource, modules)).encode()))
    sizes = torch.randint(16, length + 1, (len(text) // length,), generator=torch.Generator().manual_seed(0))
    found, start = [], 0
    for size in sizes.tolist():
        ids = text[start : start + size]
        labels = ids.clone()
        labels[:8] = -100
        found.append(dict(input_ids=ids, labels=labels))
        start += size
    return found


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right; padding has label -100."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.stack([F.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows])

    ids = padded("input_ids", PAD)
    return dict(input_ids=ids, attention_mask=(ids != PAD).long(), labels=padded("labels", -100))


def llama(width: int, layers: int = 2, seed: int = 0):
    """A Llama of that width with fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    tokens = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=None, eos_token_id=None)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, **heads, **tokens
    )
    return LlamaForCausalLM(config)


def trained(model, data: list[dict[str, torch.Tensor]], steps: int):
    """The model when it has read some of the text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        model(**batch_of(data, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def batch_of(data: list[dict[str, torch.Tensor]], step: int, size: int = 16) -> dict[str, torch.Tensor]:
    """The batch of a step: the data in order, over and over."""
    return collate([data[(step * size + i) % len(data)] for i in range(size)])


def trained_teacher(data: list[dict[str, torch.Tensor]], steps: int = 100):
    """A wider Llama that has read some of the text."""
    return trained(llama(96, seed=1), data, steps)
