"""
Losses and causal weights of Group Causal Policy Optimization (GCPO, arXiv 2508.05428), on tensors.

Needs torch alone: no transformers, no TRL, no GPU.
"""

from gcpo_kernels.api import (
    causal_reference_logprob,
    causal_weights,
    causal_weights_from_hidden,
    group_advantages,
    leave_one_out_mean,
    linear_logprob,
    selective_logprob,
)
from gcpo_kernels.backends import available_backends
from gcpo_kernels.losses import gcpo_loss, linear_gcpo_loss

__all__ = [
    "available_backends",
    "causal_reference_logprob",
    "causal_weights",
    "causal_weights_from_hidden",
    "gcpo_loss",
    "group_advantages",
    "leave_one_out_mean",
    "linear_gcpo_loss",
    "linear_logprob",
    "selective_logprob",
]
