"""Fused knowledge-distillation losses: divergence, hard labels and gradient in one pass over large-vocabulary
logits."""

from . import divergence
from .decoupled import decoupled_kd_loss
from .divergence import *  # noqa: F403
from .functional import fused_kd_loss, logit_matching_loss
from .linear import fused_linear_kd_loss
from .log_softmax import tempered_log_softmax
from .modules import KDLoss, LinearKDLoss
from .stats import KDStats
from .transforms import LogitTransform, standardize_logits

__version__ = "0.1.0"
__all__ = [
    "KDLoss",
    "KDStats",
    "LinearKDLoss",
    "LogitTransform",
    "decoupled_kd_loss",
    "fused_kd_loss",
    "fused_linear_kd_loss",
    "logit_matching_loss",
    "standardize_logits",
    "tempered_log_softmax",
]
__all__ += divergence.__all__
