"""Training with a vLLM engine in the same process: real rollouts of candidates and colliders, and the loss on them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_policy import SHORT_TEMPLATES, count_low, options, parameters, prompts

pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` builds an environment that has it")

CANDIDATE_TOKENS, COLLIDER_TOKENS = 10, 6


def engine_weight(trainer: Any, layer: int = 0) -> torch.Tensor:
    """The engine's own copy of a layer's query, key and value projections, one below the other."""
    runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
    return runner.model.model.layers[layer].self_attn.qkv_proj.weight.detach().clone()


def policy_weight(trainer: Any, layer: int = 0) -> torch.Tensor:
    attention = trainer.model.model.layers[layer].self_attn
    return torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach().clone()


@pytest.fixture(scope="module")
def run(policy: str, plain_linear: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two steps, and what passed between trainer and engine in them. An engine lives as long as its process does."""
    from gcpo import GCPOConfig, GCPOTrainer

    seen = SimpleNamespace(calls=[], batches=[])

    class Watched(GCPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            seen.batches.append(inputs)
            return super()._compute_loss(model, inputs)

    # vLLM caches whole blocks of 128 tokens: a prompt must be longer for its copies to share one.
    dataset = prompts().map(lambda row: {"prompt": "x" * 150 + row["prompt"]})
    trainer = Watched(
        model=policy,
        reward_funcs=count_low,
        args=GCPOConfig(
            **options(
                tmp_path_factory.mktemp("run"),
                use_vllm=True,
                vllm_mode="colocate",
                vllm_gpu_memory_utilization=0.05,
                vllm_max_model_length=512,
                max_completion_length=CANDIDATE_TOKENS,
                num_colliders=3,
                collider_max_completion_length=COLLIDER_TOKENS,
                kappa=0.5,
                kl_fraction=1.0,  # every row has its second KL term
                **SHORT_TEMPLATES,
            )
        ),
        train_dataset=dataset,
    )
    generate = trainer.vllm_generation.llm.generate

    def watched(asked: list[Any], sampling_params: Any, **kwargs: Any) -> Any:
        before = engine_weight(trainer), policy_weight(trainer)
        outputs = generate(asked, sampling_params=sampling_params, **kwargs)
        seen.calls.append(
            SimpleNamespace(
                step=trainer.state.global_step, weights=before, limit=sampling_params.max_tokens, outputs=outputs
            )
        )
        return outputs

    trainer.vllm_generation.llm.generate = watched
    seen.before = parameters(trainer.model)
    trainer.train()
    seen.trainer = trainer
    return seen


def test_two_steps_train(run: SimpleNamespace) -> None:
    logged = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["gcpo/upsilon/fallback"] == 0 and entry["gcpo/upsilon/std"] > 0
        assert entry["gcpo/kl_causal"] > 0
        assert entry["gcpo/tokens/generated"] > 0 and entry["gcpo/tokens/generated_colliders"] > 0
    after = parameters(run.trainer.model)
    assert all(value.isfinite().all() and not torch.equal(value, run.before[name]) for name, value in after.items())


def test_candidates_and_colliders_are_the_engines(run: SimpleNamespace) -> None:
    """Two calls a step: 2 prompts x 4 candidates, then 2 x 3 colliders under a limit of their own."""
    assert [(call.step, len(call.outputs), call.limit) for call in run.calls] == [
        (step, *kind) for step in (0, 1) for kind in ((8, CANDIDATE_TOKENS), (6, COLLIDER_TOKENS))
    ]
    for candidates in run.calls[::2]:
        rows = {tuple(output.outputs[0].token_ids) for output in candidates.outputs}
        assert len(rows) > 4  # sampled, not repeated
        batches = run.batches[2 * candidates.step : 2 * candidates.step + 2]
        trained = [
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
        ]
        assert sorted(trained) == sorted(tuple(output.outputs[0].token_ids) for output in candidates.outputs)


def test_weights_are_the_policys_at_every_rollout(run: SimpleNamespace) -> None:
    for call in run.calls:
        engine, policy = call.weights
        assert torch.equal(engine, policy.to(engine.dtype))  # vLLM computes in bfloat16 by itself
    first, second = run.calls[0].weights[0], run.calls[2].weights[0]
    assert not torch.equal(first, second)


def test_copies_of_a_prompt_are_read_once(run: SimpleNamespace) -> None:
    """Prefix caching is on, and starts anew with new weights."""
    config = run.trainer.vllm_generation.llm.llm_engine.vllm_config.cache_config
    assert config.enable_prefix_caching
    for candidates in run.calls[::2]:
        cached = [output.num_cached_tokens for output in candidates.outputs]
        assert cached[0] == 0  # nothing from under the weights of the step before
        assert all(count >= config.block_size for count in cached[1:4])


def test_engine_and_trainer_agree_on_what_was_sampled(run: SimpleNamespace) -> None:
    for entry in run.trainer.state.log_history[:2]:
        assert entry["sampling/sampling_logp_difference/max"] < 0.05
        assert 0.8 < entry["sampling/importance_sampling_ratio/min"] <= 1.2


def test_the_ratio_of_engine_and_trainer_is_in_the_loss(run: SimpleNamespace) -> None:
    """It multiplies the policy's term and leaves both KL terms alone: the loss is linear in it, and not through 0."""
    trainer, batch = run.trainer, run.batches[-1]
    ratio = batch["importance_sampling_ratio"]
    assert ratio is not None and (ratio != 1).any()

    def loss(scale: float) -> torch.Tensor:
        return trainer._compute_loss(trainer.model, {**batch, "importance_sampling_ratio": scale * ratio}).detach()

    trainer.current_gradient_accumulation_steps = 2
    # The advantages of one row, so that the policy's term does not average out within the group.
    batch = {**batch, "advantages": torch.eye(len(batch["advantages"]))[0]}
    none, once, twice = loss(0.0), loss(1.0), loss(2.0)
    assert none > 0  # kappa times the second KL
    assert (once - none).abs() > 1e-3
    torch.testing.assert_close(twice - none, 2 * (once - none), rtol=1e-4, atol=1e-6)
