"""
Everything private of TRL that this package touches, in one place, with the version it was written against.

Besides the names imported here: `AccountedGRPOTrainer`, `KLTermsTrainer`, `OwnLossTrainer` and `GCPOTrainer` override
`_generate`, `_generate_single_turn`, `_calculate_rewards`, `_get_per_token_logps_and_entropies`, `_prepare_inputs`,
`_generate_and_score_completions`, `_compute_loss` and `training_step`, always calling the original, but for
`_get_per_token_logps_and_entropies` where rows are packed; they call `_log_completion_extra`, and read `_metrics`,
`_logs`, `_tokenizer`, `_is_vlm`, `_dist`. `OwnLossTrainer` deals the rows of `_buffered_inputs` out anew. `TrlPolicy`
calls `_generate_single_turn`, and of GRPOTrainer itself `_get_per_token_logps_and_entropies` and `_calculate_rewards`;
it reads `_step`. `ResumableGRPOTrainer` saves and restores `_step`, `_buffered_inputs` and `_last_world_entropy`, and
reads `_dist`.
`gcpo train` builds on `trl.scripts.grpo.GRPOScriptArguments` and `trl.cli.accelerate_config`.
"""

import warnings
from typing import Any

import trl
from accelerate.utils import is_peft_model
from packaging.version import Version
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    pad,
)

TESTED_VERSION = "1.16"

__all__ = [
    "TESTED_VERSION",
    "check_version",
    "disable_gradient_checkpointing",
    "get_callable_name",
    "get_config_model_id",
    "is_async_callable",
    "maybe_gather_lm_head_ctx",
    "pad",
    "refuse_wrapped_head",
]


def check_version(version: str = trl.__version__) -> None:
    """Warn where TRL is not of the minor release that the overrides were written against."""
    found = Version(version)
    if f"{found.major}.{found.minor}" != TESTED_VERSION:
        warnings.warn(
            f"gcpo was tested with trl {TESTED_VERSION}.x and found {version}. It overrides methods that TRL may "
            f"change in any minor release; install `trl=={TESTED_VERSION}.*` if anything below fails.",
            stacklevel=3,
        )


def refuse_wrapped_head(model: Any) -> None:
    """
    Refuse the one adapter on the output layer that TRL does not: log-probabilities are computed from the layer's
    `weight` and `bias`, past its forward.
    """
    if is_peft_model(model):
        from peft.utils.other import TrainableTokensWrapper

        if isinstance(model.get_output_embeddings(), TrainableTokensWrapper):
            raise ValueError(
                "`trainable_token_indices` is not supported for `lm_head`, which has them where it is tied to the "
                "embeddings. Leave it out, or train the whole layer with `modules_to_save=['lm_head']`."
            )
