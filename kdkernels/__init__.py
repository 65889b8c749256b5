"""Fused knowledge-distillation losses: divergence, hard labels and gradient in one pass over large-vocabulary logits."""

from .divergence import KL, CrossEntropy, Divergence, Renyi, parse
from .functional import fused_kd_loss, logit_matching_loss, tempered_log_softmax
from .modules import KDLoss

__version__ = "0.1.0"
__all__ = [
    "KL",
    "CrossEntropy",
    "Divergence",
    "KDLoss",
    "Renyi",
    "fused_kd_loss",
    "logit_matching_loss",
    "parse",
    "tempered_log_softmax",
]
