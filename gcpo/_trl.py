"""
Everything private of TRL that this package touches, in one place, with the version it was written against.

Besides the names imported here: `AccountedGRPOTrainer` and `GCPOTrainer` override `_generate`, `_calculate_rewards`,
`_get_per_token_logps_and_entropies`, `_generate_and_score_completions`, `_compute_loss` and `training_step`, always
calling the original; they call `_generate_single_turn` and `_log_completion_extra`, and read `_metrics`, `_logs`,
`_step`, `_tokenizer`, `_is_vlm`. `ResumableGRPOTrainer` saves and restores `_step`, `_buffered_inputs` and
`_last_world_entropy`, and reads `_dist`.
`gcpo train` builds on `trl.scripts.grpo.GRPOScriptArguments` and `trl.cli.accelerate_config`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import trl
from accelerate.utils import is_peft_model
from packaging.version import Version
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_callable_name, get_config_model_id, is_async_callable, pad

from gcpo.run.redaction import redacted

TESTED_VERSION = "1.16"

__all__ = [
    "TESTED_VERSION",
    "check_version",
    "disable_gradient_checkpointing",
    "explained_server",
    "get_callable_name",
    "get_config_model_id",
    "is_async_callable",
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


@contextmanager
def explained_server(args: Any, model: Any) -> Iterator[None]:
    """A vLLM server that does not answer inside, as an error that says how to start one."""
    try:
        yield
    except OSError as error:  # requests' own ConnectionError is no ConnectionError
        if not args.use_vllm or "can't be reached" not in str(error):
            raise
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        raise ConnectionError(
            f"No vLLM server answers at {redacted(url)} (`vllm_server_timeout`: {args.vllm_server_timeout} s). "
            f"Start one on GPUs that the trainer does not use:\n"
            f"    VLLM_SERVER_DEV_MODE=1 vllm serve {name} --port {urlsplit(url).port or 80} "
            '--weight-transfer-config \'{"backend": "nccl"}\' --logprobs-mode processed_logprobs --max-logprobs -1\n'
            "or share the trainer's with `vllm_mode='colocate'`."
        ) from error


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
