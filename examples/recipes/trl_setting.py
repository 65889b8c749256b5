"""What both TRL recipes start from, made without a download: sentences, a byte-level tokenizer, a teacher
that has learned the sentences, and a student half as wide that has not; and the arguments that any training
has."""

from __future__ import annotations

import codecs
import contextlib
import io

import pyarrow
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def sentences() -> list[str]:
    """The Zen of Python."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return [line for line in codecs.decode(this.s, "rot13").splitlines()[2:] if line]


def halves() -> list[tuple[str, str]]:
    """Each sentence as a question, its first words, and an answer, the others."""
    split = [line.split() for line in sentences()]
    return [(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for w in split]


def dataset(rows: list[dict]) -> Dataset:
    return Dataset(pyarrow.Table.from_pylist(rows), fingerprint=f"recipe{len(rows)}")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    classes = SPECIAL + sorted(ByteLevel.alphabet())
    model = Tokenizer(BPE({x: i for i, x in enumerate(classes)}, merges=[]))
    model.add_special_tokens(SPECIAL)
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def language_model(width: int, vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def taught(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """The model after some steps of plain next-token training on all sentences at once."""
    texts = [TEMPLATE_LINE.format(*x) for x in halves()]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


TEMPLATE_LINE = "<|user|>{}<|assistant|>{}</s>"


def setting(teacher_steps: int = 80):
    """(student, teacher, tokenizer)."""
    tokenizer = byte_tokenizer()
    teacher = taught(language_model(64, len(tokenizer)), tokenizer, teacher_steps)
    return language_model(32, len(tokenizer)), teacher, tokenizer


def training(folder: str, steps: int) -> dict:
    """Arguments of a short training on a CPU that say nothing of distillation."""
    return dict(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )


def first_and_last(trainer, *names: str) -> dict[str, float]:
    """What the trainer has logged at the first and at the last step, as first_loss, last_loss and so on."""
    logged = [x for x in trainer.state.log_history if "loss" in x]
    rows = dict(first=logged[0], last=logged[-1])
    return {f"{which}_{name}": row[name] for which, row in rows.items() for name in names}
