"""Group Causal Policy Optimization (GCPO, arXiv 2508.05428): TRL's GRPOTrainer with it, and the method for any loop."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gcpo._version import __version__

if TYPE_CHECKING:
    from gcpo.causal import CausalOptions, CausalStep, Policy
    from gcpo.config import GCPOConfig
    from gcpo.forward.model_policy import ModelPolicy
    from gcpo.trainer import GCPOTrainer

__all__ = ["CausalOptions", "CausalStep", "GCPOConfig", "GCPOTrainer", "ModelPolicy", "Policy", "__version__"]

_HOMES = {
    "CausalOptions": "gcpo.causal",
    "CausalStep": "gcpo.causal",
    "GCPOConfig": "gcpo.config",
    "GCPOTrainer": "gcpo.trainer",
    "ModelPolicy": "gcpo.forward.model_policy",
    "Policy": "gcpo.causal",
}


def __getattr__(name: str) -> Any:
    # On first use: importing TRL takes seconds, which `gcpo --help` should not, and the causal step does without.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
