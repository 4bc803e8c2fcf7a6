"""`fused_loss` and `padding_free`: the loss, metrics and gradients of TRL's path, from fewer products and tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from test_families import save_family
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import options, parameters, save_policy, worst_difference
from trl import GRPOTrainer

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.forward import own_forward
from gcpo.forward.unpadded import LayerCost
from gcpo.own_loss import against_padding_free

LONG = {"conversational": True, "max_completion_length": 24, "beta": 0.1, "kappa": 0.5}
LAYOUTS = {"tree": LayerCost(1.0, 0.0), "plain": LayerCost(1.0, 1e9)}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "luspo by token": {"loss_type": "luspo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.4},
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 1.5},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "two-sided": {"delta": 1.1, "epsilon_high": 0.05},
    "plain KL": {"use_bias_correction_kl": False},
    "KL by sequence": {"importance_sampling_level": "sequence", "loss_type": "bnpo"},
    "KL clipped": {"kl_clip": 0.01},
    "no reference": {"beta": 0.0},
    "temperature": {"temperature": 0.7, "cast_lm_head_to_fp32": True},
    "under contexts": {"causal_policy_context": "context"},
    "some rows": {"kl_fraction": 0.5},
    "to one context": {"kl_target": "context", "kl_fraction": 0.5},
    "to the ensemble": {"kl_target": "ensemble", "num_kl_contexts": 1, "causal_policy_context": "context"},
    "GRPO": {"kappa": 0.0, "estimator": "none"},
    "accumulated": {"gradient_accumulation_steps": 3, "steps_per_generation": 1, "loss_type": "grpo"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("families")


@pytest.fixture
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All completions in one row, or one in each."""
    cost = LAYOUTS[request.param]
    monkeypatch.setattr(own_forward, "LayerCost", type("Fixed", (), {"of": staticmethod(lambda *args: cost)}))
    return request.param


def off_policy(output: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """As after some updates: both sides of every clip are met."""
    torch.manual_seed(seed)
    old = torch.randn_like(output["completion_ids"], dtype=torch.float32) - 4.0
    # Under q they are what generated; a trainer hands them on where the loss needs them, or the logarithm of a target.
    query = {"query_logps": output.get("query_logps", old)} if "context_logps" in output else {}
    return output | {"old_per_token_logps": old} | query


def losses(policy: str, tmp_path: Any, output: dict[str, Any], ways: list[dict], **settings: Any) -> list[tuple]:
    """Loss, gradients, metrics and tokens read, by options."""
    found = []
    for way in ways:
        trainer = make_trainer(policy, tmp_path, **settings, **way)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.model.train()
        for name, value in settings.get("set", {}).items():
            setattr(trainer, name, value)
        loss = trainer._compute_loss(trainer.model, dict(output))
        loss.backward()
        grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        metrics = {k: v for k, v in trainer._metrics["train"].items() if "_sums" not in k}
        tokens = {kind: int(trainer._account.tokens[kind]) for kind in ("trained", "trained_padding")}
        found.append((loss.item(), grads, metrics, tokens))
    return found


def assert_alike(ours: tuple, want: tuple, tolerance: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(want[0], rel=1e-5, abs=1e-5)
    assert ours[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        worst = (ours[1][name] - grad).abs().max() / grad.abs().max()
        assert grad.abs().max() > 0 and worst < tolerance, f"{name}: {worst}"
    assert ours[2].keys() == want[2].keys()
    for name, values in want[2].items():
        np.testing.assert_allclose(ours[2][name], values, rtol=1e-4, atol=2e-5, err_msg=name)


TRL = {"fused_loss": False, "padding_free": False}
OWN = {"fused_loss": True, "padding_free": True}
PACKED = {"fused_loss": False, "padding_free": True}
FUSED = {"fused_loss": True, "padding_free": False}


@pytest.mark.parametrize("layout", ["tree"], indirect=True)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_loss_gradients_and_metrics(name: str, layout: str, folder: Any, tmp_path: Any) -> None:
    settings = {**LONG, **OBJECTIVES[name]}
    policy = save_family("llama", folder)
    trainer = make_trainer(policy, tmp_path, **TRL, **settings)
    output, _ = first_batch(trainer)
    want, *found = losses(policy, tmp_path, off_policy(output), [TRL, FUSED, PACKED, OWN], **settings)
    for ours in found:
        assert_alike(ours, want)
    assert found[0][3] == want[3]
    under_contexts = "context_ids" in output
    read = (
        sum(want[3].values()) if under_contexts else output["prompt_mask"].numel() + output["completion_mask"].numel()
    )
    assert sum(want[3].values()) == read
    assert sum(found[2][3].values()) < want[3]["trained"]  # prompts once, and no padding


FAMILY_CASES = {
    "llama": {},
    "qwen2": {},
    "qwen3_moe": {"router_aux_loss_coef": 0.0},
    "gemma2": {},
    "granite": {},
    "mistral": {},
    "gemma3": {},
    "cohere": {},
}


@pytest.mark.parametrize("layout", ["tree", "plain"], indirect=True)
@pytest.mark.parametrize("name", FAMILY_CASES)
@pytest.mark.filterwarnings("ignore:`share_prefix` needs")
def test_families(name: str, layout: str, folder: Any, tmp_path: Any) -> None:
    """Softcaps, scales, windows, experts; with sdpa or eager attention; half of the cases with checkpointing."""
    attention = "eager" if name == "gemma2" or (layout == "plain") else "sdpa"
    settings = {
        **LONG,
        "max_completion_length": 30,  # beyond the windows
        "model_init_kwargs": {"attn_implementation": attention},
        "gradient_checkpointing": (list(FAMILY_CASES).index(name) % 2 == 0) == (layout == "tree"),
        **FAMILY_CASES[name],
    }
    policy = save_family(name, folder)
    output, _ = first_batch(make_trainer(policy, tmp_path, **TRL, **settings))
    want, *found = losses(policy, tmp_path, off_policy(output), [TRL, FUSED, OWN], **settings)
    for ours in found:
        assert_alike(ours, want)


@pytest.mark.parametrize("layout", ["tree", "plain"], indirect=True)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo", "vespo"])
def test_every_length_a_masked_row_and_one_cut_off(loss_type: str, layout: str, folder: Any, tmp_path: Any) -> None:
    policy = save_family("llama", folder)
    settings = {**LONG, "loss_type": loss_type}
    output, _ = first_batch(make_trainer(policy, tmp_path, **TRL, **settings))
    lengths = torch.tensor([1, 2, 3, 0, 11, 17, 23, 24])
    mask = (torch.arange(24) < lengths[:, None]).long()
    widened = {
        name: torch.nn.functional.pad(x, (0, 24 - x.shape[1]) if x.dim() == 2 else (0, 0, 0, 24 - x.shape[1]))
        for name, x in output.items()
        if name in ("completion_ids", "context_logps", "ref_per_token_logps", "query_logps")
    }
    output = off_policy({**output, **widened, "completion_mask": mask, "num_items_in_batch": mask.sum()})
    want, *found = losses(policy, tmp_path, output, [TRL, FUSED, PACKED, OWN], **settings)
    for ours in found:
        assert_alike(ours, want)


@pytest.mark.parametrize("layout", ["tree"], indirect=True)
def test_a_batch_without_any_token_counts_for_nothing(layout: str, folder: Any, tmp_path: Any) -> None:
    policy = save_family("llama", folder)
    settings = {**LONG, "kappa": 0.0, "loss_type": "grpo"}
    output, _ = first_batch(make_trainer(policy, tmp_path, **TRL, **settings))
    output = off_policy({**output, "completion_mask": torch.zeros_like(output["completion_mask"])})
    for loss, grads, _, tokens in losses(policy, tmp_path, output, [FUSED, PACKED, OWN], **settings):
        assert loss == 0 and grads and all(not grad.any() for grad in grads.values())
        assert tokens["trained"] > 0  # a forward that takes part in what processes do together


@pytest.mark.parametrize("layout", ["tree"], indirect=True)
@pytest.mark.parametrize("name", ["dapo", "vespo", "sequence"])
def test_weights_of_a_sampler(name: str, layout: str, folder: Any, tmp_path: Any) -> None:
    """As vLLM's log-probabilities give them: the correction, and offsets that no number depends on."""
    policy = save_family("llama", folder)
    settings = {**LONG, **OBJECTIVES[name]}
    output = off_policy(first_batch(make_trainer(policy, tmp_path, **TRL, **settings))[0])
    ratio = torch.rand_like(output["old_per_token_logps"]) + 0.5
    sampled = output["old_per_token_logps"] + torch.randn_like(ratio)
    sampled[0, 0] = torch.nan
    output |= {"importance_sampling_ratio": ratio * output["completion_mask"], "sampling_per_token_logps": sampled}
    output["importance_sampling_ratio"][output["completion_mask"] == 0] = 1.0
    engine = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    found = []
    for way in (TRL, OWN):
        trainer = make_trainer(policy, tmp_path, **settings, **way)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        for key, value in engine.items():
            setattr(trainer, key, value)
        loss = trainer._compute_loss(trainer.model, dict(output))
        loss.backward()
        grads = {key: p.grad for key, p in trainer.model.named_parameters()}
        found.append((loss.item(), grads, {}))
    assert_alike(found[1], found[0])


@pytest.mark.parametrize("layout", ["tree"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps_per_generation": 4},
        {"num_iterations": 2},
        {"entropy_coef": 1.0},
        {"top_entropy_quantile": 0.3},
        {"loss_type": "bnpo"},
    ],
    ids=str,
)
def test_three_steps_agree(settings: dict, layout: str, folder: Any, tmp_path: Any) -> None:
    """Plain SGD: Adam's first steps have the gradient's sign, which rounding can turn."""
    policy = save_family("llama", folder)
    runs = []
    settings = {**LONG, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3, **settings}
    for way in (TRL, {"padding_free": True}):  # a loss from hidden states wherever that is possible
        trainer = make_trainer(policy, tmp_path, **settings, **way, optim="sgd", learning_rate=0.5)
        before = parameters(trainer.model)
        trainer.train()
        runs.append((parameters(trainer.model), trainer.state.log_history))
    assert worst_difference(runs[0][0], runs[1][0]) < 1e-5 < worst_difference(runs[0][0], before)
    # What TRL averages over micro-batches depends, off-policy, on which rows they hold.
    others = ("seconds", "step_time", "runtime", "per_second", "tokens/", "clip_ratio", "entropy")
    for ours, want in zip(runs[1][1], runs[0][1], strict=True):
        for name in want:
            if not (any(part in name for part in others) or name == "kl"):
                assert ours[name] == pytest.approx(want[name], rel=1e-3, abs=1e-4), name
    trained = [sum(entry.get("gcpo/tokens/trained", 0) for entry in history) for _, history in runs]
    padding = [sum(entry.get("gcpo/tokens/trained_padding", 0) for entry in history) for _, history in runs]
    assert trained[1] < trained[0] and padding[1] <= padding[0]


@pytest.mark.parametrize("layout", ["tree", "plain"], indirect=True)
def test_scoring_passes_of_trl(layout: str, folder: Any, tmp_path: Any) -> None:
    """Old and reference log-probabilities, and the representations that the policy's pass leaves."""
    policy = save_family("llama", folder)
    found = []
    for way in (TRL, PACKED):
        settings = {**LONG, "steps_per_generation": 2, "per_device_train_batch_size": 4, "reuse_rollout": False, **way}
        trainer = make_trainer(policy, tmp_path, **settings)
        output, captured = first_batch(trainer)
        found.append((output, captured["upsilon"], int(trainer._account.tokens["scored_query"])))
    (want, upsilon, read), (ours, our_upsilon, our_read) = found
    mask = want["completion_mask"] != 0
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(ours[name][mask], want[name][mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_upsilon, upsilon, atol=1e-5, rtol=1e-5)
    assert (our_read < read) == (layout == "tree")


def test_off_without_the_causal_parts_unless_asked_for(folder: Any, tmp_path: Any) -> None:
    policy = save_family("llama", folder)
    plain = make_trainer(policy, tmp_path, kappa=0.0, estimator="none")
    assert not plain.fuses_loss and not plain.leaves_padding_out and plain.own_forward is None
    assert "reader" not in plain.model.forward.__func__.__kwdefaults__
    asked = make_trainer(policy, tmp_path, kappa=0.0, estimator="none", **OWN)
    assert asked.fuses_loss and asked.leaves_padding_out
    causal = make_trainer(policy, tmp_path)
    assert causal.fuses_loss and causal.leaves_padding_out


@pytest.mark.parametrize("layout", ["tree"], indirect=True)
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_fewer_tokens_than_micro_batches(loss_type: str, layout: str, folder: Any, tmp_path: Any) -> None:
    """TRL's divisor is then below 1."""
    policy = save_family("llama", folder)
    settings = {**LONG, "loss_type": loss_type, "per_device_train_batch_size": 1, "steps_per_generation": 8}
    output, _ = first_batch(make_trainer(policy, tmp_path, **TRL, **settings))
    mask = torch.zeros_like(output["completion_mask"])
    mask[:3, 0] = 1
    output = off_policy({**output, "completion_mask": mask, "num_items_in_batch": mask.sum()})
    want, ours = losses(policy, tmp_path, output, [TRL, OWN], **settings)
    assert_alike(ours, want, 3e-5)  # of three tokens, whose roundings nothing averages out


@pytest.mark.parametrize("layout", ["tree"], indirect=True)
def test_a_reference_with_another_attention(layout: str, folder: Any, tmp_path: Any) -> None:
    policy = save_family("llama", folder)
    found = []
    for way in (TRL, PACKED):
        trainer = make_trainer(policy, tmp_path, **LONG, **way)
        trainer.ref_model.config._attn_implementation = "eager"
        found.append(first_batch(trainer)[0])
    mask = found[0]["completion_mask"] != 0
    torch.testing.assert_close(
        found[1]["ref_per_token_logps"][mask], found[0]["ref_per_token_logps"][mask], atol=1e-5, rtol=1e-5
    )
    trainer.ref_model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in (against_padding_free(trainer) or "")


class HalvesTheKL(GCPOTrainer):
    def causal_kl_loss(self, *args: Any) -> torch.Tensor:
        return 0.5 * super().causal_kl_loss(*args)


class HalvesTheScores(GCPOTrainer):
    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        logp, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return 0.5 * logp, *others


@pytest.mark.parametrize("changed", [HalvesTheKL, HalvesTheScores], ids=lambda kind: kind.__name__)
def test_what_a_subclass_changes_of_the_loss_counts(changed: type, folder: Any, tmp_path: Any) -> None:
    policy = save_family("llama", folder)
    output, _ = first_batch(make_trainer(policy, tmp_path, **TRL, **LONG))
    found = []
    for way in (TRL, {}):
        trainer = make_trainer(policy, tmp_path, changed, **LONG, **way)
        assert not trainer.fuses_loss and trainer.leaves_padding_out == (way == {})
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        found.append(trainer._compute_loss(trainer.model, dict(output)).item())
    plain = losses(policy, tmp_path, output, [OWN], **LONG)[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-5) and abs(found[0] - plain) > 1e-3
    with pytest.raises(ValueError, match=f"`{changed.__name__}.*` changes a part of the loss"):
        make_trainer(policy, tmp_path, changed, **LONG, fused_loss=True)


AGAINST = {
    "entropy_coef": ({"entropy_coef": 0.1}, "fused_loss", "`entropy_coef=0.1`"),
    "quantile": ({"top_entropy_quantile": 0.5}, "fused_loss", "`top_entropy_quantile=0.5`"),
    "off-policy": ({"off_policy_mask_threshold": 0.5}, "fused_loss", "`off_policy_mask_threshold`"),
    "no cap": ({"loss_type": "cispo", "epsilon_high": float("inf")}, "fused_loss", "`epsilon_high` must be finite"),
    "compiled": ({"torch_compile": True}, "padding_free", "`torch_compile`"),
    "experts": ({"family": "qwen3_moe"}, "fused_loss", "`router_aux_loss_coef`"),
    "recurrent": ({"family": "lfm2"}, "padding_free", "lfm2 has layers that read a row from left to right"),
}


@pytest.mark.parametrize("case", AGAINST)
@pytest.mark.filterwarnings("ignore:`share_prefix` needs")
def test_what_stands_against_them(case: str, folder: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    changed, name, message = AGAINST[case]
    changed = dict(changed)
    policy = save_family(changed.pop("family", "llama"), folder)
    with pytest.raises(ValueError, match=f"`{name}` must be False or None") as error:
        make_trainer(policy, tmp_path, **changed, **{name: True})
    assert message in str(error.value)
    trainer = make_trainer(policy, tmp_path, **changed)
    lines = [record.getMessage() for record in caplog.records if record.name == "gcpo.own_loss"]
    assert sum(f"`{name}` is off" in line and message in line for line in lines) == 1
    assert not getattr(trainer, {"fused_loss": "fuses_loss", "padding_free": "leaves_padding_out"}[name])


def test_attention_that_takes_no_mask_is_refused_with_the_two_that_do() -> None:
    class Config:
        _attn_implementation = "flash_attention_2"
        get_text_config = property(lambda self: lambda: self)

    model = type("Model", (), {"config": Config()})()
    reason = own_forward.against_unpadded(model)
    assert (
        reason
        == "`attn_implementation='flash_attention_2'` takes no mask over packed rows (sdpa and flex_attention do)"
    )


def test_entropy_bonus_over_packed_rows(folder: Any, tmp_path: Any) -> None:
    """TRL's own loss, whose entropies carry gradient, from packed rows."""
    policy = save_family("llama", folder)
    settings = {**LONG, "entropy_coef": 0.1}
    output, _ = first_batch(make_trainer(policy, tmp_path, **TRL, **settings))
    want, ours = losses(policy, tmp_path, off_policy(output), [TRL, PACKED], **settings)
    assert_alike(ours, want)


def test_the_old_name_maps_and_warns(tmp_path: Any) -> None:
    for given in (True, False):
        with pytest.warns(FutureWarning, match="`share_prompt` is now `padding_free`"):
            config = GCPOConfig(**options(tmp_path, share_prompt=given))
        assert config.padding_free is given and config.share_prompt is None
    old_name = pytest.raises(ValueError, match="`share_prompt` is the old name of `padding_free`")
    with old_name, pytest.warns(FutureWarning):
        GCPOConfig(**options(tmp_path, share_prompt=True, padding_free=False))
    for wrong in ("yes", 1, 0.0):
        with pytest.raises(TypeError, match="`padding_free` must be True, False or None"):
            GCPOConfig(**options(tmp_path, padding_free=wrong))


def test_evaluation_is_trls(folder: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = save_policy(tmp_path / "policy")
    found = []
    for way in (TRL, OWN):
        trainer = make_trainer(policy, tmp_path, **LONG, **way)
        trainer.eval_dataset = trainer.train_dataset.select(range(2))
        torch.manual_seed(0)
        found.append(trainer.evaluate())
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        if not any(part in name for part in ("runtime", "second", "num_tokens")):
            assert found[1][name] == pytest.approx(found[0][name], rel=1e-4, abs=1e-5, nan_ok=True), name
    assert GRPOTrainer.evaluate is type(trainer).evaluate
