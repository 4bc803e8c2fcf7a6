"""What the generation leaves: the states, keys and values that reading its output again would give."""

from types import SimpleNamespace

import pytest
import torch
from test_trainer_causal import make_trainer, plain_scores, represent
from tiny_policy import save_policy
from transformers import GenerationConfig

from gcpo import GCPOTrainer
from gcpo.forward.generation import GenerationRecorder, read_repeated_prompts_once
from gcpo.forward.models import padded_width
from gcpo.forward.trl_policy import TrlPolicy

PROMPTS = [[20, 21, 22], [20, 21, 22], [30], [31, 32]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def generate(trainer, prompts, likely_end, **kwargs):
    """Outputs of TRL's generation path. `likely_end` makes rows end at different columns."""
    bias = trainer._tokenizer.eos_token_id, likely_end
    trainer.generation_config = GenerationConfig(
        **trainer.generation_kwargs, sequence_bias=[[[bias[0]], bias[1]]], disable_compile=True
    )
    torch.manual_seed(5)
    return super(GCPOTrainer, trainer)._generate_single_turn(prompts, None, {}, 1, **kwargs)[0]


def watched(trainer, prompts, likely_end):
    recorder = GenerationRecorder(
        trainer.args.representation,
        trainer.eos_token_ids,
        trainer.max_completion_length,
        padded_width(prompts, trainer.pad_to_multiple_of),
    )
    with recorder.attached(trainer._policy.backbone):
        outputs = generate(trainer, prompts, likely_end)
        return outputs, recorder.finish(trainer._policy, prompts, outputs)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("likely_end", [0.0, 3.0, 60.0], ids=["none end", "some end", "all end at once"])
@pytest.mark.parametrize("representation", ["last", "mean"])
def test_states_are_those_of_a_forward(representation, likely_end, once, policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, representation=representation, pad_to_multiple_of=4 if once else None)
    if once:
        with read_repeated_prompts_once(trainer._policy.backbone):
            outputs, states = watched(trainer, PROMPTS, likely_end)
    else:
        outputs, states = watched(trainer, PROMPTS, likely_end)
    assert states is not None
    lengths = {len(ids) for ids in outputs}
    assert (lengths == {1}) == (likely_end == 60.0) and (len(lengths) > 1) == (likely_end == 3.0)
    for row, (x, y) in enumerate(zip(PROMPTS, outputs, strict=True)):
        _, hidden = plain_scores(trainer, x, y)
        torch.testing.assert_close(states.z[row], represent(hidden, representation), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            cache = trainer.model(input_ids=torch.tensor([[*x, *y]]), use_cache=True).past_key_values
        if len(x) > 1:
            for (keys, values), layer in zip(states.queries[row], cache.layers, strict=True):
                torch.testing.assert_close(keys, layer.keys[0, :, : len(x) - 1], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(values, layer.values[0, :, : len(x) - 1], atol=1e-5, rtol=1e-5)
        for (keys, values), layer in zip(states.completions[row], cache.layers, strict=True):
            torch.testing.assert_close(keys, layer.keys[0, :, len(x) :], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values, layer.values[0, :, len(x) :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompts", [PROMPTS, [[20, 21, 22]] * 4, [[7]] * 3], ids=["some", "all", "of one token"])
def test_repeated_prompts_give_the_same_outputs_from_fewer_tokens(prompts, policy, tmp_path):
    trainer = make_trainer(policy, tmp_path)
    sizes = []
    handle = trainer._policy.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    plain = generate(trainer, prompts, 3.0)
    before = sum(sizes)
    sizes.clear()
    with read_repeated_prompts_once(trainer._policy.backbone):
        assert generate(trainer, prompts, 3.0) == plain
    handle.remove()
    width, distinct = max(map(len, prompts)), len(set(map(tuple, prompts)))
    # The outer call is seen with all its tokens before the hook takes them away: less those, what was read.
    read = sum(sizes) - (len(prompts) * (width - 1) if width > 1 else 0)
    assert before - read == (len(prompts) - distinct) * (width - 1)


def test_a_generation_that_is_not_token_by_token_leaves_nothing(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path)
    recorder = GenerationRecorder("last", trainer.eos_token_ids, 10, 3)
    outputs = generate(trainer, PROMPTS, 0.0)
    assert recorder.finish(trainer._policy, PROMPTS, outputs) is None  # it was not watched
    with recorder.attached(trainer._policy.backbone):
        outputs = generate(trainer, PROMPTS, 0.0)
        changed = [[*ids[:-2], 9, ids[-1]] for ids in outputs]
        assert recorder.finish(trainer._policy, PROMPTS, changed) is None  # not what was fed


OTHER_GENERATIONS = [
    {"cache_implementation": "static"},
    *(
        {"generation_kwargs": kwargs}
        for kwargs in (
            {"max_new_tokens": 20},
            {"max_new_tokens": 4},
            {"max_new_tokens": None, "max_length": 12},
            {"min_new_tokens": 8},
            {"num_beams": 2},
            {"no_repeat_ngram_size": 1},
            {"use_cache": False},
            {"prefill_chunk_size": 2},
            {"eos_token_id": 40},
            {"pad_token_id": 41},
            {"forced_eos_token_id": 1},
            {"max_time": 1e-9},
        )
    ),
]


@pytest.mark.parametrize("changed", OTHER_GENERATIONS, ids=str)
def test_representations_are_those_of_another_reading(changed, policy, tmp_path):
    """However outputs are generated and wherever they end: the same loss and weights with and without reuse."""
    logs = []
    for reuse in (True, False):
        trainer = make_trainer(
            policy, tmp_path / str(reuse), reuse_rollout=reuse, max_steps=1, context_attention=None, **changed
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm", "gcpo/upsilon/mean", "gcpo/upsilon/std", "gcpo/kl_causal"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4, abs=1e-6), name


def test_settings_of_the_candidates_generation_do_not_bind_colliders(policy, tmp_path):
    """Their own limit and temperature win over what `generation_kwargs` says of candidates."""
    asked = {"max_length": 100, "min_length": 90, "min_new_tokens": 9, "max_new_tokens": 12, "temperature": 0.5}
    trainer = make_trainer(policy, tmp_path, generation_kwargs=asked, collider_temperature=2.0)
    assert trainer.generation_limit == 12
    before = trainer.generation_config
    with trainer._policy._sampling(6, trainer.args.collider_temperature):
        config = trainer.generation_config
        assert (config.max_new_tokens, config.min_new_tokens, config.temperature) == (6, 6, 2.0)
        assert config.max_length is None and config.min_length is None
    assert trainer.generation_config is before
    # vLLM's names for the same, where they also win over the engine's settings.
    asked = {"max_tokens": 12, "min_tokens": 9, "temperature": 0.5, "seed": 1}
    engine = SimpleNamespace(max_completion_length=10, temperature=1.0, generation_kwargs=asked)
    with_engine = TrlPolicy.__new__(TrlPolicy)
    with_engine.trainer = SimpleNamespace(use_vllm=True, vllm_generation=engine)
    assert with_engine.max_completion_length == 12
    with with_engine._sampling(6, 2.0):
        assert (engine.max_completion_length, engine.temperature) == (6, 2.0)
        assert engine.generation_kwargs == {"min_tokens": 6, "seed": 1}
    assert engine.generation_kwargs is asked and (engine.max_completion_length, engine.temperature) == (10, 1.0)
