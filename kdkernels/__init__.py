"""Fused knowledge-distillation losses: divergence, hard labels and gradient in one pass over large-vocabulary
logits."""

from .decoupled import decoupled_kd_loss
from .divergence import (
    JSD,
    KL,
    TVD,
    Alpha,
    CrossEntropy,
    Divergence,
    Renyi,
    ReverseKL,
    ReverseRenyi,
    SkewKL,
    SkewReverseKL,
    parse,
)
from .functional import fused_kd_loss, logit_matching_loss, tempered_log_softmax
from .linear import fused_linear_kd_loss
from .modules import KDLoss, LinearKDLoss
from .stats import KDStats
from .transforms import LogitTransform, standardize_logits

__version__ = "0.1.0"
__all__ = [
    "JSD",
    "KL",
    "TVD",
    "Alpha",
    "CrossEntropy",
    "Divergence",
    "KDLoss",
    "KDStats",
    "LinearKDLoss",
    "LogitTransform",
    "Renyi",
    "ReverseKL",
    "ReverseRenyi",
    "SkewKL",
    "SkewReverseKL",
    "decoupled_kd_loss",
    "fused_kd_loss",
    "fused_linear_kd_loss",
    "logit_matching_loss",
    "parse",
    "standardize_logits",
    "tempered_log_softmax",
]
