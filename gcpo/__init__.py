"""Group Causal Policy Optimization (GCPO, arXiv 2508.05428): a drop-in for TRL's GRPOTrainer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcpo.config import GCPOConfig
    from gcpo.trainer import GCPOTrainer

__version__ = "0.1.0"
__all__ = ["GCPOConfig", "GCPOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    # On first use: importing TRL takes seconds, which `gcpo --help` should not.
    if name == "GCPOConfig":
        from gcpo.config import GCPOConfig

        return GCPOConfig
    if name == "GCPOTrainer":
        from gcpo.trainer import GCPOTrainer

        return GCPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
