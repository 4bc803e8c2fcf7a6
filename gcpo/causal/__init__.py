"""The causal step: what GCPO adds to a rollout, as plain data in and tensors out. It knows no trainer and no model."""

from gcpo.causal.options import CausalOptions
from gcpo.causal.port import CausalTerms, Policy, Rollout
from gcpo.causal.step import CausalStep

__all__ = ["CausalOptions", "CausalStep", "CausalTerms", "Policy", "Rollout"]
