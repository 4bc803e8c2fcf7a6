"""
Everything private of TRL that this package touches, in one place, with the version it was written against.

Besides the names imported here: `AccountedGRPOTrainer` and `GCPOTrainer` override `_generate`, `_calculate_rewards`,
`_get_per_token_logps_and_entropies`, `_generate_and_score_completions`, `_compute_loss` and `training_step`, always
calling the original; they call `_generate_single_turn` and read `_metrics`, `_logs`, `_step`, `_tokenizer`, `_is_vlm`.
`gcpo train` builds on `trl.scripts.grpo.GRPOScriptArguments` and `trl.cli.accelerate_config`.
"""

import warnings

import trl
from packaging.version import Version
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, pad

TESTED_VERSION = "1.16"

__all__ = ["TESTED_VERSION", "check_version", "disable_gradient_checkpointing", "get_config_model_id", "pad"]


def check_version(version: str = trl.__version__) -> None:
    """Warn where TRL is not of the minor release that the overrides were written against."""
    found = Version(version)
    if f"{found.major}.{found.minor}" != TESTED_VERSION:
        warnings.warn(
            f"gcpo was tested with trl {TESTED_VERSION}.x and found {version}. It overrides methods that TRL may "
            f"change in any minor release; install `trl=={TESTED_VERSION}.*` if anything below fails.",
            stacklevel=3,
        )
