"""GCPOConfig: bad values raise one clear error that names the option, before anything runs."""

import math

import pytest
from tiny_policy import options

from gcpo import GCPOConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("alpha", NAN, ValueError),
        ("alpha", INF, ValueError),
        ("alpha", "2", TypeError),
        ("kappa", -0.1, ValueError),
        ("kappa", NAN, ValueError),
        ("kappa", True, TypeError),
        ("proj_floor", 0.0, ValueError),
        ("proj_floor", 1.0, ValueError),
        ("proj_floor", NAN, ValueError),
        ("loss_type", "ppo", ValueError),
        ("estimator", "exact", ValueError),
        ("representation", "first", ValueError),
        ("baseline", "median", ValueError),
        ("similarity", "dot", ValueError),
        ("num_colliders", 0, ValueError),
        ("num_colliders", 1.5, TypeError),
        ("collider_max_completion_length", 0, ValueError),
        ("candidate_context_tokens", 0, ValueError),
        ("context_batch_size", 0, ValueError),
        ("fusion_prompt_template", "{question}", ValueError),
        ("fusion_prompt_template", "{question} {candidates} {other}", ValueError),
        ("fusion_prompt_template", "{question} {candidates", ValueError),
        ("fusion_prompt_template", None, TypeError),
        ("context_prompt_template", "{question} {candidates}", ValueError),
        ("candidate_template", "{index}", ValueError),
        ("candidate_template", "{candidate}{candidate}", ValueError),
        ("context_attention", "causal", ValueError),
        ("num_kl_contexts", 0, ValueError),
        ("kl_fraction", 0.0, ValueError),
        ("kl_fraction", 1.5, ValueError),
        ("kl_fraction", NAN, ValueError),
        ("causal_policy_context", "prompt", ValueError),
        ("kl_target", "query", ValueError),
        ("weight_scale", 1.0, TypeError),
        ("collider_temperature", 0.0, ValueError),
        ("pack_tokens", 0, ValueError),
        ("num_estimator_samples", 0, ValueError),
        # TRL's own, on which it fails once a step has begun.
        ("num_generations", 4.0, TypeError),
        ("num_iterations", 2.0, TypeError),
        ("steps_per_generation", 2.0, TypeError),
        ("per_device_train_batch_size", 4.0, TypeError),
        ("gradient_accumulation_steps", 2.0, TypeError),
        ("max_steps", 2.0, TypeError),
        ("max_completion_length", 0, ValueError),
        ("temperature", 0.0, ValueError),
        ("temperature", -1, ValueError),
        ("top_p", -0.1, ValueError),
        ("min_p", 1.1, ValueError),
        ("repetition_penalty", 0.0, ValueError),
    ],
)
def test_bad_value_names_the_option(name, value, error, tmp_path):
    with pytest.raises(error, match=f"`{name}`"):
        GCPOConfig(**options(tmp_path, **{name: value}))


def test_scored_estimator_scores_everything(tmp_path):
    """It needs every candidate under every context: what the second KL term would draw is there already."""
    config = GCPOConfig(**options(tmp_path), estimator="scored", num_kl_contexts=1, kl_fraction=0.5)
    assert config.drawn_contexts is None and config.drawn_fraction == 1.0
    config = GCPOConfig(**options(tmp_path), num_kl_contexts=2, kl_fraction=0.5)
    assert config.drawn_contexts == 2 and config.drawn_fraction == 0.5


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("kl_target", "query", "projection, context, ensemble"),
        ("weight_scale", "beta", "alpha, unit"),
    ],
)
def test_an_unknown_choice_is_told_what_there_is(name, value, known, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*got '{value}'") as caught:
        GCPOConfig(**options(tmp_path, **{name: value}))
    assert known in str(caught.value).replace("'", "")


def test_the_target_says_how_many_contexts_are_drawn(tmp_path):
    """One alone needs no others, but an estimator may."""
    drawn = {"num_kl_contexts": 2, "kl_target": "context"}
    assert GCPOConfig(**options(tmp_path), **drawn).drawn_contexts == 0
    assert GCPOConfig(**options(tmp_path), **drawn, estimator="scored").drawn_contexts is None
    assert GCPOConfig(**options(tmp_path), **{**drawn, "kl_target": "ensemble"}).drawn_contexts == 2
    assert GCPOConfig.paper(**options(tmp_path)).kl_target == "projection"
    assert GCPOConfig.paper(**options(tmp_path)).weight_scale == "alpha"


@pytest.mark.parametrize(
    ("changed", "parallel"),
    [
        ({"kl_target": "context"}, False),
        ({"kl_target": "ensemble"}, False),
        ({"kl_target": "context", "context_attention": "parallel"}, True),
        ({}, True),
        ({"kappa": 0.0}, False),
        ({"estimator": "sampled"}, False),
        ({"causal_policy_context": "context"}, False),
        ({"context_attention": "full"}, False),
        ({"estimator": "scored", "kappa": 0.0}, True),
    ],
    ids=str,
)
def test_contexts_are_parallel_where_nothing_needs_their_text(changed, parallel, tmp_path):
    assert GCPOConfig(**options(tmp_path), **changed).prefers_parallel is parallel
    assert not GCPOConfig.paper(**options(tmp_path)).prefers_parallel


@pytest.mark.parametrize("other", [{"estimator": "sampled"}, {"causal_policy_context": "context"}])
def test_parallel_contexts_are_no_text(other, tmp_path):
    with pytest.raises(ValueError, match="`context_attention='parallel'`"):
        GCPOConfig(**options(tmp_path), context_attention="parallel", **other)


def test_one_candidate_is_not_a_group(tmp_path):
    with pytest.raises(ValueError, match="at least 2 generations"):
        GCPOConfig(**options(tmp_path, num_generations=1))


def test_a_limit_is_needed_to_show_candidates(tmp_path):
    with pytest.raises(ValueError, match="`max_completion_length` must be an integer"):
        GCPOConfig(**options(tmp_path, max_completion_length=None))
    GCPOConfig(**options(tmp_path, max_completion_length=None), kappa=0.0, estimator="none")  # TRL's business


def test_group_size_must_divide_the_batch(tmp_path):
    with pytest.raises(ValueError, match="`num_generations` must divide"):
        GCPOConfig(**options(tmp_path, num_generations=3))


def test_baseline_follows_the_estimator(tmp_path):
    assert GCPOConfig(**options(tmp_path)).baseline == "loo"
    assert GCPOConfig(**options(tmp_path), estimator="scored").baseline == "mean"
    assert GCPOConfig(**options(tmp_path), baseline="mean").baseline == "mean"


def test_paper_settings(tmp_path):
    config = GCPOConfig.paper(**{k: v for k, v in options(tmp_path).items() if k != "learning_rate"})
    assert (config.alpha, config.kappa, config.num_colliders) == (2.0, 0.06, config.num_generations)
    assert (config.learning_rate, config.weight_decay, config.baseline) == (1e-6, 0.01, "mean")
    assert (config.estimator, config.causal_policy_context) == ("sampled", "context")
    assert (config.loss_type, config.use_bias_correction_kl, config.kl_clip) == ("grpo", False, None)
    assert config.collider_max_completion_length == config.max_completion_length == 10
    longest = GCPOConfig.paper(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert longest.collider_max_completion_length == longest.max_completion_length == 16384
    assert GCPOConfig.paper(**options(tmp_path), collider_max_completion_length=7).collider_max_completion_length == 7
    assert GCPOConfig.paper(**options(tmp_path), num_colliders=2, alpha=1.0).alpha == 1.0
    assert GCPOConfig.paper(**options(tmp_path), num_colliders=2).num_colliders == 2


def test_what_a_step_does(tmp_path):
    def parts(**overrides):
        config = GCPOConfig(**options(tmp_path), **overrides)
        return config.uses_weights, config.uses_contexts, config.is_causal

    assert parts() == (True, True, True)
    assert parts(kappa=0.0) == (True, False, True)
    assert parts(kappa=0.0, estimator="scored") == (True, True, True)
    assert parts(estimator="none") == (False, True, True)
    assert parts(kappa=0.0, estimator="none") == (False, False, False)
