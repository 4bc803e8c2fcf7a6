"""
What other libraries offer for a step of GRPO, called as their users call it.

Where one stops at log-probabilities, the rest of the loss is plain PyTorch. Each is imported where it is called: none
is needed for the others.
"""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from bench.registry import Case, Tensors
from gcpo_kernels import maths
from gcpo_kernels.options import LossOptions
from gcpo_kernels.tokens import TokenInputs


def loss_arguments(x: Tensors) -> dict[str, Any]:
    names = ("advantages", "mask", "old_logp", "ref_logp", "query_logp", "context_logp")
    return {name: x[name] for name in names if name in x}


def plain_loss(case: Case, x: Tensors, logp: torch.Tensor) -> torch.Tensor:
    dtype = maths.compute_dtype(logp)
    inputs = TokenInputs(**loss_arguments(x)).clean(dtype)
    return maths.objective(logp.to(dtype), inputs, LossOptions(**case.options))[0]


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's own fused output layer
# ---------------------------------------------------------------------------------------------------------------------


def torch_nll(x: Tensors, reduction: str) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    hidden, ids = x["hidden"].flatten(0, -2), x["token_ids"].flatten()
    return F.linear_cross_entropy(hidden, x["weight"], ids, reduction=reduction, options=options)


def torch_scoring(case: Case, x: Tensors) -> torch.Tensor:
    return -torch_nll(x, "none").view_as(x["token_ids"])


def torch_linear(case: Case, x: Tensors) -> torch.Tensor:
    return plain_loss(case, x, torch_scoring(case, x).float())


# ---------------------------------------------------------------------------------------------------------------------
# TRL 1.16
# ---------------------------------------------------------------------------------------------------------------------


def trl_loss(case: Case, x: Tensors, logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """GRPOTrainer's own method, with the metrics that it logs, on an object that has what it reads."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=case.options["beta"],
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    prompt = x["mask_int"][:, :1]
    given = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": x["mask_int"],
        "completion_mask": x["mask_int"],
        "advantages": x["advantages"],
        "old_per_token_logps": x["old_logp"],
        "ref_per_token_logps": x["ref_logp"],
    }
    return GRPOTrainer._compute_loss(trainer, None, given)


def trl_token(case: Case, x: Tensors) -> torch.Tensor:
    return trl_loss(case, x, x["logp"], x["logp"].detach())


def _trl_head(x: Tensors, mask: torch.Tensor | None, outputs: tuple[str, ...]) -> list[torch.Tensor | None]:
    """The fused head as `add_fused_lm_head` calls it: on GPUs only the tokens that count are scored."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    keep = torch.ones_like(x["token_ids"], dtype=torch.bool) if mask is None else mask
    compact = x["hidden"].device.type in ("cuda", "xpu")
    hidden = x["hidden"][keep] if compact else x["hidden"].flatten(0, -2)
    ids = x["token_ids"][keep] if compact else x["token_ids"].flatten()
    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    found = ChunkedLogProbFunction.apply(hidden, x["weight"], None, ids, 1.0, size, None, 1.0, outputs)
    if compact:
        return [None if y is None else y.new_zeros(keep.shape).masked_scatter(keep, y) for y in found]
    return [None if y is None else y.view(keep.shape).masked_fill(~keep, 0) for y in found]


def trl_scoring(case: Case, x: Tensors) -> torch.Tensor:
    return _trl_head(x, None, ())[0]  # type: ignore[return-value]


def trl_linear(case: Case, x: Tensors) -> torch.Tensor:
    logp, entropy = _trl_head(x, x["mask"], ("entropy",))[:2]
    assert logp is not None and entropy is not None
    return trl_loss(case, x, logp, entropy)


def trl_logits(case: Case, x: Tensors) -> torch.Tensor:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logits = x["logits"][:, :-1]
    logp, entropy = selective_log_softmax_and_entropy(logits, x["token_ids"], entropy_requires_grad=False)
    return trl_loss(case, x, logp.float(), entropy)


# ---------------------------------------------------------------------------------------------------------------------
# Liger
# ---------------------------------------------------------------------------------------------------------------------


def liger_linear(case: Case, x: Tensors) -> torch.Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=case.options["beta"], loss_type="grpo", temperature=1.0)
    return loss(
        x["hidden"],
        x["weight"],
        x["token_ids"],
        x["mask_int"],
        x["advantages"],
        ref_per_token_logps=x["ref_logp"],
        old_per_token_logps=x["old_logp"],
    )[0]


def _liger_nll(x: Tensors) -> torch.Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    hidden, ids = x["hidden"].flatten(0, -2), x["token_ids"].flatten()
    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, x["weight"], ids)


def liger_scoring(case: Case, x: Tensors) -> torch.Tensor:
    return -_liger_nll(x).view_as(x["token_ids"])


def liger_nll_linear(case: Case, x: Tensors) -> torch.Tensor:
    return plain_loss(case, x, liger_scoring(case, x).float())


def liger_logits(case: Case, x: Tensors) -> torch.Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss(
        x["logits"],
        x["old_logp"],
        x["ref_logp"],
        x["token_ids"],
        x["advantages"],
        x["mask_int"],
        temperature=1.0,
        beta=case.options["beta"],
        eps_low=0.2,
        eps_high=0.2,
        loss_type="grpo",
        reduce=True,
    )[0]


# ---------------------------------------------------------------------------------------------------------------------
# Cut cross-entropy, QuACK
# ---------------------------------------------------------------------------------------------------------------------


def _cce_nll(x: Tensors, exact: bool) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy
    from cut_cross_entropy.linear_cross_entropy import LinearCrossEntropyImpl

    # Releases differ in how the exact gradient is asked for: an implementation of its own, or no filter.
    named = "CCE_EXACT" in LinearCrossEntropyImpl.__members__
    options: dict[str, Any] = {"impl": "cce"}
    if exact:
        options = {"impl": "cce_exact"} if named else {"impl": "cce", "filter_eps": None}
    hidden, ids = x["hidden"].flatten(0, -2), x["token_ids"].flatten()
    return linear_cross_entropy(hidden, x["weight"], ids, reduction="none", **options)


def cce(exact: bool) -> dict[str, Callable[[Case, Tensors], torch.Tensor]]:
    def scoring(case: Case, x: Tensors) -> torch.Tensor:
        return -_cce_nll(x, exact).view_as(x["token_ids"])

    def linear(case: Case, x: Tensors) -> torch.Tensor:
        return plain_loss(case, x, scoring(case, x).float())

    return {"linear_loss": linear, "scoring": scoring}


def quack_linear(case: Case, x: Tensors) -> torch.Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x["hidden"].flatten(0, -2), x["weight"], x["token_ids"].flatten())
