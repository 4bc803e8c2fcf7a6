"""With kappa = 0 every loss is TRL's own, value and gradient; so are the advantages."""

import dataclasses
import inspect
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gcpo_kernels
from gcpo_kernels.testing import make_linear_inputs, make_token_inputs, with_gradients

trl = pytest.importorskip("trl")
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import nanstd  # noqa: E402

MAX_LENGTH = 9
# The same entropies everywhere: they are logged, and with no bonus reach no loss.
OPTIONS = [
    {},
    {"beta": 0.05},
    {"delta": 1.3},
    {"delta": 1.1},
    {"beta": 0.05, "delta": 1.5, "epsilon_low": 0.1, "epsilon_high": 0.3},
    {"beta": 0.4, "bias_correction_kl": True},
    {"beta": 0.4, "bias_correction_kl": True, "delta": 1.1, "epsilon_high": 1.05},
]
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
# Of the losses that have some, beside their defaults.
OWN_OPTIONS = {
    "sapo": {"sapo_temperature_pos": 1.4, "sapo_temperature_neg": 0.3},
    "vespo": {"vespo_k_pos": 0.7, "vespo_lambda_pos": 0.0, "vespo_k_neg": 1.2, "vespo_lambda_neg": 0.9},
}
DEFAULTS = {
    **{"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    **{"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
}


def trl_loss(
    inputs: dict[str, Any], options: dict[str, Any], off_policy_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """TRL's method on an object that has what it reads: one process, one step of accumulation, no model."""
    batch, _ = inputs["mask"].shape
    ratio = inputs["importance_sampling_ratio"]
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (inputs["logp"], torch.ones_like(inputs["logp"]), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None if off_policy_mask is None else 0.1,
        get_off_policy_mask=lambda **k: off_policy_mask,
        importance_sampling_level=options.get("importance_sampling_level", "token"),
        beta=options.get("beta", 0.0),
        loss_type=options["loss_type"],
        epsilon_low=options.get("epsilon_low", 0.2),
        epsilon_high=options.get("epsilon_high", 0.2),
        args=SimpleNamespace(
            use_bias_correction_kl=options.get("bias_correction_kl", False),
            delta=options.get("delta"),
            steps_per_generation=1,
            **{name: options.get(name, value) for name, value in DEFAULTS.items()},
        ),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        use_vllm=ratio is not None,
        vllm_importance_sampling_correction=ratio is not None,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )
    prompt = torch.zeros(batch, 2, dtype=torch.int64)
    mask = inputs["mask"].to(torch.int64)
    given = {
        "prompt_ids": prompt,
        "prompt_mask": prompt + 1,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": inputs["advantages"],
        "old_per_token_logps": inputs["old_logp"],
        "ref_per_token_logps": inputs["ref_logp"],
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": torch.as_tensor(options.get("num_items_in_batch") or mask.sum()),
    }
    default = torch.get_default_dtype()
    torch.set_default_dtype(inputs["logp"].dtype)  # of the numbers that TRL chooses by the sign of an advantage
    try:
        return GRPOTrainer._compute_loss(trainer, None, given), metrics["train"]
    finally:
        torch.set_default_dtype(default)


@pytest.mark.hazard(1)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("ratio", [None, "(B, T)", "(B, 1)"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss(loss_type: str, level: str, options: dict[str, Any], ratio: str | None, on_policy: bool) -> None:
    """Seen in Liger#1082, trl#7063."""
    options = options | {"loss_type": loss_type, "importance_sampling_level": level}
    if loss_type in ("dapo", "cispo", "vespo"):
        options["num_items_in_batch"] = 31
    if "beta" in options:
        options |= OWN_OPTIONS.get(loss_type, {})
    inputs = make_token_inputs(6, 8, dtype=torch.float64, seed=5)
    assert not inputs["mask"][-1].any()
    # As TRL makes it: vespo sums its logs over masked tokens too.
    inputs["importance_sampling_ratio"] = torch.where(inputs["mask"], inputs["importance_sampling_ratio"], 1.0)
    weights = {None: None, "(B, T)": inputs["importance_sampling_ratio"]}
    inputs["importance_sampling_ratio"] = weights.get(ratio, inputs["importance_sampling_ratio"][:, :1])
    inputs |= {"causal_logp": None, "old_logp": None if on_policy else inputs["old_logp"]}
    ours, theirs = with_gradients(inputs, "logp"), with_gradients(inputs, "logp")
    loss, metrics = gcpo_kernels.gcpo_loss(**ours, **options, max_completion_length=MAX_LENGTH)
    want, logged = trl_loss(theirs, options)
    loss.backward()
    want.backward()
    assert theirs["logp"].grad.any()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours["logp"].grad, theirs["logp"].grad, rtol=1e-10, atol=1e-14)
    if level == "token":  # per sequence, TRL logs means over sequences
        names = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}
        names = {"cispo": {"clip_high": "cispo_clip_ratio"}, "sapo": {}, "vespo": {}}.get(loss_type, names)
        names |= {"kl": "kl"} if "beta" in options else {}
        for key, name in names.items():
            assert metrics[key].item() == pytest.approx(logged[name][0], rel=1e-6), key


@pytest.mark.parametrize("loss_type", LOSSES)
def test_policy_weights(loss_type: str) -> None:
    """They are what TRL's mask of off-policy rows is: a factor of the policy term, and of neither phi nor the KL."""
    options = {"loss_type": loss_type, "beta": 0.3, "bias_correction_kl": True}
    inputs = make_token_inputs(6, 8, dtype=torch.float64, masked="none") | {"causal_logp": None}
    off = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64).unsqueeze(1)
    ours, theirs = with_gradients(inputs, "logp"), with_gradients(inputs, "logp")
    loss, _ = gcpo_kernels.gcpo_loss(**ours, **options, policy_weights=off, max_completion_length=MAX_LENGTH)
    want, _ = trl_loss(theirs, options, off)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours["logp"].grad, theirs["logp"].grad, rtol=1e-10, atol=1e-14)


def test_defaults_are_trls() -> None:
    config = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    for function in (gcpo_kernels.gcpo_loss, gcpo_kernels.linear_gcpo_loss):
        signature = inspect.signature(function).parameters
        assert {name: signature[name].default for name in DEFAULTS} == {name: config[name] for name in DEFAULTS}
    assert {name: config[name] for name in DEFAULTS} == DEFAULTS


@pytest.mark.hazard(1)
@pytest.mark.parametrize("loss_type", ["dapo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_linear_loss(level: str, loss_type: str, small_tiles: None) -> None:
    """From hidden states: TRL's loss of the log-probabilities that a plain output layer gives.
    Seen in Liger#1082, trl#7063."""
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.05, "bias_correction_kl": True}
    inputs = make_linear_inputs(dtype=torch.float64) | {"causal_logp": None}
    inputs["importance_sampling_ratio"] = torch.where(inputs["mask"], inputs["importance_sampling_ratio"], 1.0)
    ours, theirs = (with_gradients(inputs, "hidden", "weight", "bias") for _ in range(2))
    loss, _ = gcpo_kernels.linear_gcpo_loss(**ours, **options)
    logits = torch.nn.functional.linear(theirs["hidden"], theirs["weight"], theirs["bias"])
    logp = logits.log_softmax(-1).gather(-1, theirs["token_ids"].unsqueeze(-1)).squeeze(-1)
    want, _ = trl_loss(theirs | {"logp": logp}, options)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
    for key in ("hidden", "weight", "bias"):
        torch.testing.assert_close(ours[key].grad, theirs[key].grad, rtol=1e-9, atol=1e-13)


def test_advantages_per_token() -> None:
    inputs = make_token_inputs(6, 8, dtype=torch.float64) | {"causal_logp": None}
    inputs["advantages"] = inputs["advantages"].unsqueeze(1) * torch.linspace(0.5, 1.5, 8)
    loss, _ = gcpo_kernels.gcpo_loss(**inputs, loss_type="bnpo")
    torch.testing.assert_close(loss, trl_loss(inputs, {"loss_type": "bnpo"})[0], rtol=1e-12, atol=0)


@pytest.mark.hazard(27)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("missing", [(), (1,), (0, 1, 2, 3), (4, 5, 7), (0, 6)])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale: str, missing: tuple[int, ...], dtype: torch.dtype) -> None:
    """As TRL computes them: unbiased std, eps = 1e-4, NaN rewards left out and given 0 (NeMo-RL#4158)."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25, 2.0, -1.0, 2.5, 0.0], dtype=dtype)
    rewards[list(missing)] = torch.nan
    grouped = rewards.view(-1, 4)
    want = rewards - torch.nanmean(grouped, dim=1).repeat_interleave(4)
    if scale != "none":
        std = nanstd(grouped, dim=1).repeat_interleave(4) if scale == "group" else nanstd(rewards).expand(8)
        want = want / (std + 1e-4)
    want = torch.nan_to_num(want, nan=0.0)
    torch.testing.assert_close(gcpo_kernels.group_advantages(rewards, 4, scale=scale), want)
