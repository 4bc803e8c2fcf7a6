"""ModelPolicy: the numbers of GCPOTrainer for the same candidates, and of a model's own logits for every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_families import FAMILIES, SIZES
from test_peft import lora, shake
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import SHORT_TEMPLATES, count_low, make_tokenizer, prompts, save_policy
from transformers import AutoModelForCausalLM

from gcpo import CausalOptions, CausalStep, GCPOTrainer, ModelPolicy
from gcpo.causal.loss import causal_kl_loss
from gcpo.causal.port import Continuation, Rollout
from gcpo_kernels import gcpo_loss, group_advantages

EOS = 1
ENDS_EARLY = {"sequence_bias": [[[EOS], 2.5]]}  # so that completions are of many lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def options(**changed: Any) -> CausalOptions:
    small = {"num_colliders": 3, "collider_max_completion_length": 6, "context_attention": "full", **SHORT_TEMPLATES}
    return CausalOptions(**{"num_kl_contexts": None, "kl_fraction": 1.0, **small, **changed})


def make_policy(model: Any, given: CausalOptions | None = None, **changed: Any) -> ModelPolicy:
    settings = {"num_generations": 4, "max_completion_length": 10, "reward_func": count_low, **changed}
    return ModelPolicy(model, settings.pop("tokenizer", make_tokenizer()), given or options(), **settings)


def make_step(policy: ModelPolicy) -> CausalStep:
    return CausalStep(policy, policy.options, policy.builder)


# ---------------------------------------------------------------------------------------------------------------------
# Beside GCPOTrainer
# ---------------------------------------------------------------------------------------------------------------------


class Given(GCPOTrainer):
    """Generates what `answers` holds, a call each, and after those by itself."""

    answers: list[list[list[int]]]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        if not self.answers:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        assert len(self.answers[0]) == len(prompt_ids)
        return self.answers.pop(0), None


PARITY: dict[str, dict[str, Any]] = {
    "full": {},
    "parallel": {"context_attention": "parallel"},
    "by default": {"context_attention": None, "num_kl_contexts": 1, "kl_fraction": 0.5},
    "scored": {"estimator": "scored"},
    "scored, parallel": {"estimator": "scored", "context_attention": "parallel"},
    "sampled": {"estimator": "sampled"},
    "none": {"estimator": "none"},
    "none, parallel": {"estimator": "none", "context_attention": "parallel"},
    "no second term": {"kappa": 0.0},
    "one by one": {"share_prefix": False, "num_kl_contexts": 1},
    "by level": {"pack_tokens": 1},
    "no reuse": {"reuse_rollout": False},
    "no reuse, parallel": {"reuse_rollout": False, "context_attention": "parallel", "estimator": "scored"},
    "mean": {"representation": "mean", "baseline": "mean", "kl_clip": 0.2},
    "under a context": {"causal_policy_context": "context", "kl_fraction": 0.5},
    "shown in part": {"candidate_context_tokens": 2},
    "to one context": {"kl_target": "context", "kl_fraction": 0.5, "reuse_rollout": False},
    "to the ensemble, unit weights": {"kl_target": "ensemble", "weight_scale": "unit"},
}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("name", PARITY)
def test_numbers_are_the_trainers(name: str, loss_type: str, folder: str, model: Any, tmp_path: Path) -> None:
    changed = {"kappa": 0.5, **PARITY[name]}
    conversational = loss_type == "dapo"
    policy = make_policy(model, options(**changed), temperature=0.7, generation_kwargs=ENDS_EARLY)
    torch.manual_seed(5)
    rollout = policy.rollout(list(prompts(2, conversational=conversational)))
    assert len(set(map(len, rollout.completion_ids))) > 2
    assert (rollout.states is not None) == (
        policy.options.reuse_rollout and (policy.options.uses_weights or "parallel" in name)
    )
    step = make_step(policy)
    groups = step.make_groups(rollout, seed=11)

    settings = {"temperature": 0.7, "loss_type": loss_type, "conversational": conversational, **changed}
    trainer = make_trainer(folder, tmp_path, Given, **settings)
    trainer.answers = [rollout.completion_ids, [ids for group in groups for ids in group.colliders]]
    seed = trainer._policy.step_seed
    output, captured = first_batch(trainer)
    length = output["completion_ids"].shape[1]
    terms = step.terms(rollout, length, groups=groups, seed=seed)

    assert [vars(group) for group in groups] == [vars(group) for group in captured["groups"]]
    rewards = policy.reward(rollout.inputs, rollout.prompts, rollout.completion_ids)
    advantages = group_advantages(rewards, 4)
    torch.testing.assert_close(advantages, captured["advantages"], atol=1e-5, rtol=1e-5)
    assert advantages.abs().max() > 0.1
    if policy.options.estimator == "sampled":
        # What is sampled is drawn anew: the term is compared at the trainer's weights.
        assert terms.upsilon is not None and terms.upsilon.shape == captured["upsilon"].shape
        terms.upsilon = captured["upsilon"]
    elif policy.options.uses_weights:
        torch.testing.assert_close(terms.upsilon, captured["upsilon"], atol=1e-5, rtol=1e-5)
        assert captured["upsilon"].std() > 1e-3
    torch.testing.assert_close(terms.weigh(advantages), output["advantages"], atol=1e-5, rtol=1e-5)

    logp, mask = policy.logps(rollout)
    assert logp.requires_grad and torch.equal(mask, output["completion_mask"])
    loss, _ = gcpo_loss(logp, terms.weigh(advantages), mask, loss_type=loss_type)
    if policy.options.kappa:
        assert terms.kl is not None
        torch.testing.assert_close(terms.kl.context_logp, output["context_logps"], atol=1e-5, rtol=1e-5)
        assert output["context_logps"].abs().max() > 1.0
        assert torch.equal(terms.kl.context_weights, output["context_weights"])
        assert torch.equal(terms.kl.counted, output["has_collider"])
        if terms.kl.query_logp is not None:
            to_query = policy.options.kl_target == "projection"
            wanted = (logp * mask).detach() if to_query else output["context_logps"][..., 0]
            torch.testing.assert_close(terms.kl.query_logp, wanted, atol=1e-5, rtol=1e-5)
        causal_logp = None
        if terms.first_contexts is not None:
            causal_logp, _ = policy.logps(Rollout(rollout.prompts, terms.first_contexts, rollout.completion_ids))
        second, metrics = causal_kl_loss(
            terms.kl, policy.options, logp, mask, causal_logp=causal_logp, loss_type=loss_type
        )
        assert metrics["kl_causal"] > 1e-3
        loss = loss + second
    trainer.current_gradient_accumulation_steps = 1
    expected = trainer._compute_loss(trainer.model, output)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(trainer.model.parameters()))
    largest = max(gradient.abs().max().item() for gradient in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, largest), rtol=1e-4)
    assert largest > 1e-3


@pytest.mark.parametrize("representation", ["last", "mean"])
def test_what_generation_leaves_is_what_a_pass_gives(representation: str, model: Any) -> None:
    given = options(representation=representation, context_attention=None)
    policy = make_policy(model.train(), given, generation_kwargs=ENDS_EARLY)
    rollout = policy.rollout(list(prompts(2)))
    step, length = make_step(policy), max(map(len, rollout.completion_ids))
    groups = step.make_groups(rollout, seed=1)
    assert rollout.states is not None and len(rollout.states.completions) == 8
    kept = step.terms(rollout, length, groups=groups, seed=1)
    rollout.states = None
    read = step.terms(rollout, length, groups=groups, seed=1)
    torch.testing.assert_close(kept.upsilon, read.upsilon, atol=1e-5, rtol=1e-5)
    assert kept.kl is not None and read.kl is not None
    torch.testing.assert_close(kept.kl.context_logp, read.kl.context_logp, atol=1e-5, rtol=1e-5)
    assert model.training and all(part.training for part in model.modules())


def test_what_is_sampled_is_what_is_scored(model: Any) -> None:
    """A model's own generation config may hold a penalty or top-p for chats; candidates follow logits / temperature."""
    model.generation_config.update(repetition_penalty=3.0, top_p=0.3, top_k=2, min_p=0.5, no_repeat_ngram_size=1)
    policy = make_policy(model, num_generations=2000, max_completion_length=1, temperature=0.7)
    rollout = policy.rollout([{"prompt": "1+1="}])
    with torch.no_grad():
        expected = (model(torch.tensor(rollout.prompt_ids[:1])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor(rollout.completion_ids).flatten(), minlength=len(expected)) / 2000
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / 2000).sqrt() + 2 / 2000).all()
    assert expected.max() > 0.05
    narrow = make_policy(model, num_generations=100, max_completion_length=1, generation_kwargs={"top_k": 1})
    assert len(set(map(tuple, narrow.rollout([{"prompt": "1+1="}]).completion_ids))) == 1


def test_colliders_leave_the_candidates_stream_alone(model: Any) -> None:
    """Candidates come from torch's stream, colliders from the step's seed: twice the same, and another one later."""
    drawn = []
    for with_colliders in (False, True):
        policy = make_policy(model)
        step = make_step(policy)
        torch.manual_seed(2)
        first = policy.rollout(list(prompts(2)))
        if with_colliders:
            once, again = (step.make_groups(first, policy.step_seed) for _ in range(2))
            assert once == again != step.make_groups(first, policy.step_seed + 1)
        before = policy.step_seed
        drawn.append((first.completion_ids, policy.rollout(list(prompts(2))).completion_ids))
        assert policy.step_seed != before
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


# ---------------------------------------------------------------------------------------------------------------------
# Beside the model's own logits
# ---------------------------------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    **FAMILIES,
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),  # learned positions
    "phi": ("PhiConfig", {}),  # a bias in the output layer
}


@torch.no_grad()
def plain(
    model: Any, prompt: list[int], completion: list[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and last state of a completion, from one unpadded row and the model's own logits."""
    ids = torch.tensor([[*prompt, *completion]])
    model.eval()
    output = model(input_ids=ids, output_hidden_states=True)
    logits = output.logits[0, -len(completion) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, -len(completion) :, None])[:, 0], output.hidden_states[-1][0, -1]


PROMPTS = [[7, 8, 9, 10, 20, 21, 22], [7, 8, 9, 30], [7, 8, 9, 10, 40], [50]]
COMPLETIONS = [[60, EOS], [61, 62, 63, 64, EOS], [65], [66, 67, EOS]]


def tiny_model(name: str) -> Any:
    kind, changed = OTHERS[name]
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": None}
    sizes = {} if name == "gpt2" else SIZES
    config = getattr(transformers, kind)(vocab_size=len(make_tokenizer()), **special, **{**sizes, **changed})
    model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_scores_of_a_family(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    assert (model.get_output_embeddings().bias is not None) == (name == "phi")
    if name == "gpt2":
        torch.nn.init.normal_(model.transformer.wpe.weight)
        assert model.transformer.drop.p > 0  # which no score but that of training may have
    expected = [plain(model, x, y, 0.7) for x, y in zip(PROMPTS, COMPLETIONS, strict=True)]
    policy = make_policy(model.eval(), temperature=0.7)
    rollout = Rollout([""] * 4, PROMPTS, COMPLETIONS)
    logp, mask = policy.logps(rollout)
    model.train()
    assert logp.requires_grad and mask.sum(1).tolist() == [2, 5, 1, 3]
    found = [logp.detach()]
    with torch.no_grad():
        for tokens in ("scored_query", "scored_contexts"):  # by level, and in packed trees, where the model can
            scores, z = policy.score(PROMPTS, COMPLETIONS, 5, tokens)
            found.append(scores)
            for row, (_, state) in zip(z, expected, strict=True):
                torch.testing.assert_close(row, state, atol=1e-4, rtol=1e-4)
    for scores in found:
        for row, y, (wanted, _) in zip(scores, COMPLETIONS, expected, strict=True):
            torch.testing.assert_close(row[: len(y)], wanted, atol=1e-5, rtol=1e-5)
    assert policy.shares == (name not in ("mistral", "gemma2", "gemma3", "lfm2", "falcon_mamba"))
    rollout = policy.rollout(list(prompts(2)))
    assert all(1 <= len(ids) <= 10 for ids in rollout.completion_ids)


@pytest.mark.parametrize(
    "changed", [{}, {"target_modules": "all-linear", "lora_dropout": 0.5}], ids=["lora", "all-linear, dropout"]
)
def test_an_adapter_is_scored_and_trains(changed: dict[str, Any], model: Any) -> None:
    adapted = get_peft_model(model, lora(**changed))
    shake(adapted)
    with adapted.disable_adapter():
        base = plain(adapted, PROMPTS[0], COMPLETIONS[0], 1.0)[0]
    expected = [plain(adapted, x, y, 1.0)[0] for x, y in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert (expected[0] - base).abs().max() > 0.05
    policy = make_policy(adapted.train())
    with torch.no_grad():
        scores, _ = policy.score(PROMPTS, COMPLETIONS, 5, "scored_contexts")
    for row, wanted in zip(scores, expected, strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted, atol=1e-5, rtol=1e-5)
    rollout = policy.rollout(list(prompts(2)))
    terms = make_step(policy).terms(rollout, 10)
    assert terms.upsilon is not None and terms.upsilon.std() > 0
    logp, _ = policy.logps(rollout)
    logp.sum().backward()
    reached = {name for name, value in adapted.named_parameters() if value.grad is not None and value.grad.any()}
    assert reached == {name for name, _ in adapted.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    "changed",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_parameters": ["lm_head.weight"]}],
    ids=["module", "parameter"],
)
def test_an_adapter_on_the_head_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    untied = AutoModelForCausalLM.from_pretrained(save_policy(tmp_path, tie_word_embeddings=False))
    with pytest.raises(ValueError, match="The output layer must be a linear layer without an adapter"):
        make_policy(get_peft_model(untied, lora(**changed)))


@pytest.mark.filterwarnings("ignore:Position ids")
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_read_with_every_row(kind: Any, model: Any) -> None:
    adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    policy = make_policy(adapted)
    assert not policy.shares
    rollout = policy.rollout(list(prompts(2)))
    with pytest.warns(UserWarning, match="share_prefix"):
        terms = make_step(policy).terms(rollout, 10)
    assert terms.upsilon is not None and terms.upsilon.isfinite().all()
    logp, _ = policy.logps(rollout)
    for row, x, y in zip(logp, rollout.prompt_ids, rollout.completion_ids, strict=True):
        logits = adapted(input_ids=torch.tensor([x + y])).logits[0, -len(y) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(y)[:, None])[:, 0]
        torch.testing.assert_close(row[: len(y)], wanted, atol=1e-4, rtol=1e-4)


def test_a_continuation_of_one_token_asks_for_nothing(model: Any) -> None:
    with torch.no_grad():
        (reading,) = make_policy(model).read([Continuation([], [EOS], 0)], keep=True)
    assert reading.logp.shape == (0,) and reading.z.isnan().all() and reading.own[0][0].shape[1] == 1


# ---------------------------------------------------------------------------------------------------------------------
# What wraps a model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def loss_and_gradients(policy: ModelPolicy, model: Any) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    rollout = policy.rollout(list(prompts(2)))
    terms = make_step(policy).terms(rollout, 10, seed=4)
    logp, mask = policy.logps(rollout)
    assert terms.kl is not None
    advantages = group_advantages(policy.reward(rollout.inputs, rollout.prompts, rollout.completion_ids), 4)
    loss, _ = gcpo_loss(logp, terms.weigh(advantages), mask)
    width = mask.shape[1]
    terms.kl.context_logp = terms.kl.context_logp[:, :width]
    if terms.kl.query_logp is not None:
        terms.kl.query_logp = terms.kl.query_logp[:, :width]
    (loss + causal_kl_loss(terms.kl, policy.options, logp, mask)[0]).backward()
    return terms, loss.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("wrapper", ["ddp", "accelerate", "accelerate, bf16"])
def test_wrapped_models(wrapper: str, folder: str, one_process: None) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    results = []
    given = options(context_attention=None, share_prefix=True, kappa=0.5)
    try:
        for wrap in (False, True):
            own = wrapped = AutoModelForCausalLM.from_pretrained(folder).train()
            accelerator = None
            if wrap and wrapper == "ddp":
                wrapped = torch.nn.parallel.DistributedDataParallel(own)
            elif wrap:
                accelerator = Accelerator(cpu=True, mixed_precision="bf16" if "bf16" in wrapper else "no")
                wrapped = accelerator.prepare(own)
            policy = make_policy(wrapped, given, accelerator=accelerator)
            assert (policy.rank, policy.size) == (0, 1) and policy.unwrapped is own
            results.append(loss_and_gradients(policy, own))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    (plain_terms, plain_loss, plain_gradients), (terms, loss, gradients) = results
    if "bf16" in wrapper:  # other candidates: a step is whole
        assert terms.upsilon.isfinite().all() and all(value.isfinite().all() for value in gradients.values())
        return
    torch.testing.assert_close(terms.upsilon, plain_terms.upsilon, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms.kl.context_logp, plain_terms.kl.context_logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, plain_loss, atol=1e-6, rtol=1e-5)
    for name, value in plain_gradients.items():
        torch.testing.assert_close(gradients[name], value, atol=1e-6, rtol=1e-4)
    assert max(value.abs().max() for value in gradients.values()) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_generations": 1}, ValueError, "`num_generations` must be at least 2, got 1"),
        ({"num_generations": 2.0}, TypeError, "`num_generations` must be"),
        ({"max_completion_length": 0}, ValueError, "`max_completion_length` must be"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be"),
        ({"temperature": float("nan")}, ValueError, "`temperature` must be"),
        ({"context_batch_size": 0}, ValueError, "`context_batch_size` must be"),
        ({"max_completion_length": 2000}, ValueError, "more than the model's 2048 positions. Lower"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_arguments(changed: dict[str, Any], error: type, message: str, model: Any) -> None:
    with pytest.raises(error, match=message):
        make_policy(model, options(candidate_context_tokens=None), **changed)


def test_without_an_end_token(model: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"must have an `eos_token`: without one, no completion ever ends"):
        make_policy(model, tokenizer=tokenizer)


def test_without_a_padding_token_the_end_token_pads(model: Any) -> None:
    """The same numbers: what pads is hidden by the mask."""
    results = []
    for pads in (True, False):
        tokenizer = make_tokenizer()
        if not pads:
            tokenizer.pad_token = None
        policy = make_policy(model, tokenizer=tokenizer, generation_kwargs=ENDS_EARLY)
        assert policy.pad_token_id == (0 if pads else EOS)
        torch.manual_seed(1)
        rollout = policy.rollout([{"prompt": "1+1="}, {"prompt": "10+10="}])
        results.append((rollout, make_step(policy).terms(rollout, 10), policy.logps(rollout)[0]))
    (rollout, terms, logp), (other, again, other_logp) = results
    assert rollout.completion_ids == other.completion_ids
    assert len(set(map(len, rollout.completion_ids))) > 1
    torch.testing.assert_close(terms.upsilon, again.upsilon, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms.kl.context_logp, again.kl.context_logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logp, other_logp, atol=1e-5, rtol=1e-5)


def test_messages_without_a_chat_template(model: Any, folder: str, tmp_path: Path) -> None:
    """transformers says so, as it does under GCPOTrainer."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    policy = make_policy(model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="chat_template is not set") as ours:
        policy.rollout(list(prompts(1, conversational=True)))
    trainer = make_trainer(folder, tmp_path, conversational=True)
    trainer._tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template is not set") as theirs:
        first_batch(trainer)
    assert str(ours.value) == str(theirs.value)
    assert len(policy.rollout(list(prompts(1))).completion_ids) == 4  # text needs none


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "`inputs` must be rows with a column `prompt`, got an empty list"),
        ([{"question": "1+1="}], "`inputs` must be rows with a column `prompt`, got .*question"),
        ([{"prompt": "1"}, {"prompt": []}], r"`prompt` must be text, or a list of messages .*, got \[\]"),
        ([{"prompt": None}], "`prompt` must be text, or a list of messages .*, got None"),
        ([{"prompt": ""}], "`prompt` must hold a token, got ''"),
        ([{"prompt": "1" * 2040}], "A prompt with its completion needs 2050 tokens, more than the model's 2048"),
    ],
    ids=["none", "no column", "no message", "None", "empty", "long"],
)
def test_refused_prompts(rows: list[dict[str, Any]], message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(model).rollout(rows)


def test_a_prompt_that_only_its_contexts_make_too_long(model: Any) -> None:
    policy = make_policy(model)
    rollout = policy.rollout([{"prompt": "1" * 2030}])
    with pytest.warns(UserWarning, match=r"A fusion prompt .* more than the model's 2048 positions.* Lower"):
        terms = make_step(policy).terms(rollout, 10)
    assert policy.metrics["groups_without_colliders"] == 1.0 and not terms.kl.counted.any()
    assert terms.upsilon.isfinite().all()


def test_rewards(model: Any) -> None:
    """Columns reach the function; None and what is not finite is no reward; a wrong number of them is refused."""
    seen: dict[str, Any] = {}

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [1, None, float("inf"), 0.5]

    policy = make_policy(model, reward_func=reward)
    rows = [{"prompt": [{"role": "user", "content": "1"}], "answer": k} for k in range(4)]
    ids = [[20, EOS], [21], [22], [23]]
    rewards = policy.reward(rows, [row["prompt"] for row in rows], ids)
    torch.testing.assert_close(rewards, torch.tensor([1.0, torch.nan, torch.nan, 0.5]), equal_nan=True)
    assert seen["answer"] == [0, 1, 2, 3] and seen["prompts"] == [row["prompt"] for row in rows]
    assert seen["completions"][0] == [{"role": "assistant", "content": policy.tokenizer.decode([20])}]
    with pytest.raises(ValueError, match="`reward_func` must return 3 rewards, one for each completion, got 4"):
        policy.reward(rows[:3], [row["prompt"] for row in rows[:3]], ids[:3])
    with pytest.raises(ValueError, match="`reward_func` must be given"):
        make_policy(model, reward_func=None).reward(rows, [""] * 4, ids)


def test_generation_kwargs_are_those_that_the_policy_leaves_open(model: Any) -> None:
    for name in ("max_new_tokens", "temperature", "num_return_sequences", "stop_strings"):
        with pytest.raises(ValueError, match=f"`generation_kwargs` must leave out .*{name}"):
            make_policy(model, generation_kwargs={name: 2})
    policy = make_policy(model, generation_kwargs={"min_new_tokens": 9})
    (collider,) = policy.generate([[20, 21]], 0, limit=5, temperature=None)
    assert len(collider) == 5  # what is asked for of candidates does not bind a shorter collider
    with pytest.raises(ValueError, match="`reward_func` must return 1 rewards, one for each completion, got NoneType"):
        make_policy(model, reward_func=lambda **columns: None).reward([{"prompt": "a"}], ["a"], [[9]])


def test_the_papers_form(model: Any) -> None:
    """pi_theta under x_{i,0}: the policy's log-probabilities under what the terms name, with their gradient."""
    given = options(causal_policy_context="context", context_attention=None, kl_fraction=1.0)
    policy = make_policy(model, given, generation_kwargs=ENDS_EARLY)
    rollout = policy.rollout([{"prompt": "1+1="}, {"prompt": "22+2="}])
    length = max(map(len, rollout.completion_ids))
    terms = make_step(policy).terms(rollout, length)
    logp, mask = policy.logps(rollout)
    causal_logp, _ = policy.logps(rollout, terms.first_contexts)
    assert terms.kl is not None and (causal_logp - logp).abs().max() > 1e-2
    # Nothing has been trained since: under the context, it is what the step scored there.
    torch.testing.assert_close(causal_logp.detach() * mask, terms.kl.context_logp[..., 0] * mask, atol=1e-5, rtol=1e-5)
    loss, metrics = causal_kl_loss(terms.kl, given, logp, mask, causal_logp=causal_logp)
    loss.backward()
    assert float(metrics["kl_causal"]) > 0 and all(p.grad is not None for p in model.parameters())
