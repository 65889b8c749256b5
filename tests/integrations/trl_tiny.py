"""Tiny models, a tokenizer and data for TRL's trainers, all made here: nothing is downloaded."""

import functools

import pyarrow
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<unused>"]
VOCAB = len(SPECIAL) + 256
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A class for each byte; byte-level, which GOLDTrainer asks for."""
    classes = SPECIAL + sorted(ByteLevel.alphabet())
    model = Tokenizer(BPE({x: i for i, x in enumerate(classes)}, merges=[]))
    model.add_special_tokens(SPECIAL)
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def llama(seed: int, width: int = 16, vocab: int = VOCAB, cls=LlamaForCausalLM, config=LlamaConfig, **more):
    """A causal language model of two layers, whose logits spread by about 2."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "vocab_size": vocab,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    made = config(**sizes | heads | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | more)
    model = cls(made)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(25)
    return model


def letters(seed: int, n: int) -> str:
    drawn = torch.randint(26, (n,), generator=torch.Generator().manual_seed(seed))
    return "".join(chr(ord("a") + int(i)) for i in drawn)


def conversations(n: int = 16) -> list[dict]:
    """Prompts and answers of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": letters(2 * i, 3 + i % 3)},
                {"role": "assistant", "content": letters(2 * i + 1, 4 + i % 5)},
            ]
        }
        for i in range(n)
    ]


def dataset(rows: list[dict]) -> Dataset:
    """With a fingerprint given: of some versions of pyarrow datasets cannot compute one."""
    return Dataset(pyarrow.Table.from_pylist(rows), fingerprint=f"kdkernels{len(rows)}")


def prompts(n: int = 16) -> list[dict]:
    return [{"prompt": letters(i, 3 + i % 3)} for i in range(n)]


def arguments(folder, **more) -> dict:
    """Of a training run of a few steps, the same every time."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam would make steps of rounding errors where the gradient is 0
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    } | more


def run(trainer) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a trainer has logged, and its weights in the end."""
    trainer.train()
    logged = [x for x in trainer.state.log_history if "loss" in x]
    return logged, {k: x.detach().double().clone() for k, x in trainer.model.state_dict().items()}
