"""Distillation in a LightningModule, from hidden states: `python examples/recipes/lightning_module.py`."""

import tempfile

import torch
from lightning import LightningModule, Trainer
from small import collate, llama, sequences, trained_teacher
from torch.utils.data import DataLoader

from kdkernels.integrations.lightning import KDMixin


class Distilled(KDMixin, LightningModule):
    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        # the teacher is no submodule: it is not trained, not saved and not wrapped
        self.distil_language_model(
            student, teacher, temperature=2.0, t_squared=True, soft_weight=0.9, hard_weight=0.1
        )

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=5e-3)


def main(steps: int = 60, batch: int = 16) -> dict[str, float]:
    """What a validation says before and after."""
    data = sequences()
    train, held_out = data[:-64], data[-64:]
    module = Distilled(llama(48), trained_teacher(train))
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(),
    )
    validation = DataLoader(held_out, batch, collate_fn=collate)
    (before,) = trainer.validate(module, validation, verbose=False)
    trainer.fit(module, DataLoader(train, batch, shuffle=True, collate_fn=collate))
    (after,) = trainer.validate(module, validation, verbose=False)
    return dict(
        loss_before=before["val_loss"],
        loss_after=after["val_loss"],
        divergence_before=before["val_divergence"],
        divergence_after=after["val_divergence"],
        agree_after=after["val_agree"],
    )


if __name__ == "__main__":
    print(main())
