"""`gcpo plan` counts what a run logs, and its arithmetic is that of formulas written out by hand."""

import json
from collections import Counter
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_cases import draw_options, run_and_count, wrong
from tiny_policy import SHORT_TEMPLATES, SPECIAL, options, prompts, save_policy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from gcpo import GCPOConfig, cli
from gcpo.causal.account import TOKENS
from gcpo.causal.contexts import PromptBuilder
from gcpo.forward.counting import Abilities, Pass, Span
from gcpo.forward.packing import pack
from gcpo.forward.prefix_tree import grow
from gcpo.planning.architecture import SIZES, Architecture, load_config
from gcpo.planning.counts import Counts, Lengths, PlannedScript, abilities_of, count_cycle
from gcpo.planning.plan import Device, pass_flops, plan_step


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def loaded(policy: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 30, 5))
def test_random_options(first: int, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """What a run generated, given to the plan: every kind of token is counted alike."""
    for seed in range(first, first + 5):
        changed = draw_options(seed)
        assert not wrong(*run_and_count(*loaded, tmp_path, changed)), changed


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"context_attention": "full", "kl_fraction": 1.0, "num_kl_contexts": None, "pack_tokens": 1},
        {"share_prefix": False, "reuse_rollout": False, "causal_policy_context": "context"},
        {"estimator": "sampled", "kappa": 0.0, "num_estimator_samples": 2},
        {"kl_target": "context", "num_kl_contexts": 2},
        {"kl_target": "ensemble", "num_kl_contexts": 2, "weight_scale": "unit"},
        {"fused_loss": True, "padding_free": False},
        {"padding_free": True, "per_device_train_batch_size": 8},
        {"fused_loss": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "beta": 0.1},
        {"kappa": 0.0, "estimator": "none", "num_iterations": 2},
        {"fusion_prompt_template": "{question}|{candidates}"},
    ],
    ids=str,
)
def test_lengths_alone_give_what_a_run_logs(
    changed: dict[str, Any], loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose completions all have one length: the script of lengths counts what that of its ids does."""
    size, end = 10, SPECIAL.index("<eos>")
    full = {"min_new_tokens": size - 1, "forced_eos_token_id": end}
    # No other special token, which is never shown.
    full["suppress_tokens"] = [token for token in range(len(SPECIAL)) if token != end]
    changed = {"max_completion_length": size, "collider_max_completion_length": size, **changed}
    # What contexts have in common by chance would be read once, and differ from one processor to another.
    generate = loaded[0].generate

    def generate_apart(*given: Any, logits_processor: Any = (), **kwargs: Any) -> Any:
        apart = LogitsProcessorList([*logits_processor, _OwnBeginnings(kwargs["input_ids"].shape[1])])
        return generate(*given, logits_processor=apart, **kwargs)

    monkeypatch.setattr(loaded[0], "generate", generate_apart)
    logged, counts = run_and_count(*loaded, tmp_path, {"generation_kwargs": full, **changed}, num_prompts=8)
    assert not wrong(logged, counts)
    config = GCPOConfig(**options(tmp_path, num_colliders=3, **{**SHORT_TEMPLATES, **changed}))
    builder, prompt = PromptBuilder(loaded[1], config), prompts()[0]["prompt"]
    ids = loaded[1](prompt)["input_ids"]
    lengths = Lengths.measured(builder, prompt, ids, config.num_generations, completion=size, collider=size)
    abilities = abilities_of(config, Architecture.from_config(loaded[0].config))
    planned = count_cycle(config, PlannedScript(config, lengths), abilities).tokens
    kinds = list(TOKENS)
    if changed.get("causal_policy_context") == "context":
        # Which contexts share a row of the loss depends on the order that rows are shuffled into.
        assert planned.pop("trained") == pytest.approx(logged["trained"], rel=0.05)
        kinds = [kind for kind in kinds if kind not in ("trained", "trained_padding")]
    for kind in kinds:
        assert planned[kind] == logged[kind], kind


class _OwnBeginnings(LogitsProcessor):
    """Every row of a batch begins with a token of its own, by its place."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > self.width:
            return scores
        rows = torch.arange(len(scores))
        return torch.full_like(scores, -torch.inf).index_put((rows, len(SPECIAL) + rows), torch.zeros(len(rows)))


@pytest.mark.parametrize("attention", ["full", "parallel"])
def test_one_context_is_read_for_each_row_that_is_drawn(attention: str, tmp_path: Path) -> None:
    """With `kl_target="context"`; a projection of it reads as many others."""
    given: dict[str, Any] = {
        "context_attention": attention,
        "share_prefix": attention == "parallel",
        "kl_fraction": 0.5,
    }
    contexts = {}
    for target in ("projection", "context", "ensemble"):
        config = GCPOConfig(**options(tmp_path, num_colliders=4, num_kl_contexts=2, kl_target=target, **given))
        script = PlannedScript(config, Lengths(prompt=12, completion=10, collider=6))
        passes = count_cycle(config, script, Abilities()).passes
        contexts[target] = sum(count for one, count in passes.items() if one.phase == "contexts" and one.predicted)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert contexts == {"projection": 3 * rows // 2, "context": rows // 2, "ensemble": 3 * rows // 2}


@pytest.mark.parametrize("pack_tokens", [1, 60, 200, 10_000])
def test_spans_are_shared_as_ids_are(pack_tokens: int) -> None:
    """Every run of tokens spelled out in ids of its own, the last one of a context too."""
    lengths = {"query": 7, "between": 3, "after": 2, **{f"candidate {k}": 4 + k for k in range(3)}}
    lengths |= {f"collider {l}": 5 for l in range(2)}
    first = {name: 100 * number for number, name in enumerate(sorted(lengths))}
    orders = [["candidate 1", "candidate 2"], ["candidate 0", "candidate 2"], ["candidate 0", "candidate 1"]]
    contexts = [["query", *o, "between", f"collider {l}", "after"] for o in orders for l in range(2)]
    spelled = [[first[name] + k for name in context for k in range(lengths[name])] for context in contexts]
    spans: list[Any] = [Span(tuple((name, 0, lengths[name]) for name in context)) for context in contexts]
    packed = [pack(rows, [y] * 6, pack_tokens) for rows, y in ((spelled, [9999] * 6), (spans, Span.of("y", 6)))]
    assert [len(row.ids) for row in packed[0]] == [len(row.ids) for row in packed[1]]
    assert [row.positions for row in packed[0]] == [row.positions for row in packed[1]]
    trees = [grow([context[:-1] for context in rows]) for rows in (spelled, spans)]
    assert [(len(n.ids), n.start, n.path) for n in trees[0][0]] == [(len(n.ids), n.start, n.path) for n in trees[1][0]]
    assert trees[0][1] == trees[1][1]


def test_a_span_is_a_sequence() -> None:
    left, right = Span.of("a", 4) + Span.of("b", 3), Span.of("a", 4) + Span.of("c", 2)
    plain = [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1), ("b", 2)]
    assert len(left) == 7 and list(left) == plain and not Span(()) and left[-1] == ("b", 2)
    for start in range(8):
        for stop in range(8):
            assert list(left[start:stop]) == plain[start:stop]
            assert left[:start] + left[start:] == left
    assert left.common_prefix(right) == 4 and left.common_prefix(left[:6]) == 6 == left[:6].common_prefix(left)
    for start in range(5):
        assert left.common_prefix(right, start) == 4 and left.common_prefix(left[:5], start) == 5
    assert sorted([right, left]) == [left, right]


def test_long_completions_of_large_groups_are_planned_in_seconds(tmp_path: Path) -> None:
    """The paper's settings with n = L = 64 and 16,384 tokens: no list of that many ids is made."""
    changed: dict[str, Any] = {
        "num_generations": 64,
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 1,
    }
    changed |= {"max_completion_length": 16_384, "padding_free": False}
    config = GCPOConfig.paper(**options(tmp_path, **changed))
    lengths = Lengths(100, 16_384, 16_384, 20, (5, 5, 5), 4)
    tokens = count_cycle(config, PlannedScript(config, lengths), Abilities()).tokens
    contexts, context = 64 * 64, 100 + 15 + 63 * (4 + 16_383) + 16_383
    assert tokens["generated"] == tokens["generated_colliders"] == 64 * 16_384
    assert tokens["generated_contexts"] == contexts * 16_384
    assert tokens["trained"] == 64 * (100 + 16_384) + 64 * (context + 16_384)
    # The context of y_i begins as that of y_{i+1} does, up to the candidate that this one leaves out: 63 candidates for
    # the last, 63 - i for y_i, each with what frames it; then the colliders. Of each copy, its completion.
    shown, frames = 63 + sum(range(64)), 63 + sum(range(63))
    beginnings = 105 + shown * 16_383 + frames * 4 + 64 * 5 + contexts * (16_383 + 4)
    assert tokens["scored_contexts"] == beginnings + contexts * 16_385


# ---------------------------------------------------------------------------------------------------------------------
# Operations, bytes, seconds
# ---------------------------------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    """Weights in all, in billions, as Qwen2.5's and SmolLM2's model cards have them."""
    published = {"0.5b": 0.49, "1.5b": 1.54, "3b": 3.09, "7b": 7.61, "14b": 14.7, "32b": 32.5, "smollm2-135m": 0.135}
    assert published.keys() == SIZES.keys()
    for name in ("0.5b", "7b", "smollm2-135m"):
        found = Architecture.from_config(load_config(name)).parameters / 1e9
        assert found == pytest.approx(published[name], rel=0.01), name


def test_operations_are_those_that_torch_counts() -> None:
    """Of a model whose attention computes whole squares, as this plain one does."""
    config = load_config("0.5b")
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2})
    config.update({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "vocab_size": 50})
    architecture = Architecture.from_config(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    scored = Pass("scoring", "", "score", new=7, predicted=7, dense=True)
    # Before 5.19, transformers made the angles of rotary embeddings by a product of its own.
    assert counter.get_total_flops() == pytest.approx(2 * pass_flops(scored, architecture, False), rel=1e-4)
    trained = scored._replace(mode="train", predicted=0)
    body = pass_flops(scored._replace(predicted=0), architecture, False)
    assert pass_flops(trained, architecture, False) == 3 * body and pass_flops(trained, architecture, True) == 4 * body


def test_attention_looks_back_as_far_as_its_window() -> None:
    shape = Architecture.from_config(load_config("0.5b"))

    def pairs(window: int | None, new: int, before: int) -> float:
        layer = replace(shape, windows=(window,))
        return layer.attention_flops(new, before, False) / (4 * shape.heads * shape.head_dim)

    for new, before in ((5, 0), (5, 2), (3, 9), (1, 4)):
        seen = [before + k + 1 for k in range(new)]
        assert pairs(None, new, before) == sum(seen)
        assert pairs(4, new, before) == sum(min(count, 4) for count in seen)
        assert pairs(0, new, before) == 0


def test_decoding_waits_for_memory_and_the_rest_for_operations() -> None:
    shape = Architecture.from_config(load_config("0.5b"))
    config = GCPOConfig(use_cpu=True, bf16=False, gradient_accumulation_steps=2, gradient_checkpointing=False)
    counts = count_cycle(config, PlannedScript(config, Lengths(10, 20, 5)), Abilities(), is_grpo=True)
    device = Device(tflops=1.0, bandwidth=1.0, mfu=0.5, mbu=0.25)
    cost = {item.what: item for item in plan_step(config, shape, counts, device).costs}
    weights = 4 * (shape.layer_weights + shape.hidden * shape.vocab)
    pairs = 16 * (10 + 20 / 2) * 2 * 4 * shape.kv_heads * shape.head_dim * 24
    assert cost["decode"].seconds == pytest.approx(20 * (weights + pairs) / (1e9 * 0.25))
    assert cost["policy under q"].seconds == pytest.approx(cost["policy under q"].flops / (1e12 * 0.5))
    two = plan_step(config, shape, counts, device, num_processes=2)
    assert two.total("flops") == sum(item.flops for item in cost.values())
    assert two.total("seconds", "loss") == pytest.approx(cost["policy under q"].seconds / 2)


def plan(config: GCPOConfig, lengths: Lengths, **abilities: bool) -> Counts:
    return count_cycle(config, PlannedScript(config, lengths), Abilities(**abilities))


def test_memory_by_type_and_optimizer() -> None:
    shape = Architecture.from_config(load_config("0.5b"))
    lengths = Lengths(prompt=10, completion=20, collider=5)

    def held(dtype: str, **options: Any) -> dict[str, float]:
        config = GCPOConfig(use_cpu=True, bf16=False, **options)
        memory = plan_step(config, shape, plan(config, lengths), dtype=dtype).memory
        assert memory.peak == sum(memory.held.values()) + max(memory.phases.values())
        return {name: size / shape.parameters for name, size in memory.held.items()}

    assert held("float32") == {"weights": 4, "optimizer": 8}
    assert held("bfloat16", optim="adamw_bnb_8bit", beta=0.1) == {"weights": 2, "optimizer": 2, "reference": 2}
    assert held("float32", optim="sgd") == {"weights": 4, "optimizer": 0}


def test_savings_save() -> None:
    """Every switch changes the operations of a step, in the right direction."""
    lengths = Lengths(100, 200, 30, fusion_template=20, context_template=(10, 5, 5), candidate_frame=3)
    shape = Architecture.from_config(load_config("0.5b"))

    def operations(
        compact_head: bool = True, can_continue: bool = True, completions: list[int] | None = None, **changed: Any
    ) -> float:
        given = {"context_attention": "full", "gradient_checkpointing": False, "kl_fraction": 1.0, **changed}
        config = GCPOConfig(use_cpu=True, bf16=False, **given)
        abilities = replace(abilities_of(config, shape), can_continue=can_continue)
        counts = count_cycle(config, PlannedScript(config, lengths, completions), abilities)
        return plan_step(config, shape, counts, compact_head=compact_head).total("flops")

    least = operations()
    for changed in (
        {"share_prefix": False},
        {"reuse_rollout": False},
        {"fused_loss": False},
        {"padding_free": False},
    ):
        assert operations(**changed) > least, changed
    with pytest.warns(UserWarning, match="share_prefix"):
        assert operations(can_continue=False) > least
    trl = {"fused_loss": False, "padding_free": False}  # ours makes no logits of prompts, wherever it runs
    assert operations(compact_head=False, **trl) > operations(**trl) and operations(compact_head=False) == least
    assert operations(context_attention="parallel") < least
    unlike = operations(completions=[20, 200] * 4)
    assert unlike < least and unlike < operations(completions=[20, 200] * 4, padding_free=False)


def test_products_of_the_output_layer() -> None:
    """TRL's makes four at every completion token, everywhere on a CPU; ours at those tokens, fused three."""
    shape = Architecture.from_config(load_config("0.5b"))
    lengths, completions = Lengths(prompt=6, completion=5, collider=3), [1, 2, 3, 4, 5, 5, 5, 5]

    def head(compact_head: bool = True, is_grpo: bool = False, **changed: Any) -> float:
        """Operations of the loss phase that a vocabulary of none would save, in products of one token."""
        config = GCPOConfig(use_cpu=True, bf16=False, gradient_checkpointing=True, **changed)
        script = PlannedScript(config, lengths, completions)
        counts = count_cycle(config, script, abilities_of(config, shape), is_grpo)
        flops = [
            plan_step(config, one, counts, compact_head=compact_head).total("flops", "loss")
            for one in (shape, replace(shape, vocab=0))
        ]
        return (flops[0] - flops[1]) / shape.head_flops()

    scored, padded = sum(completions), len(completions) * (6 + 5)
    for compact in (True, False):
        assert head(compact) == head(compact, padding_free=False) == pytest.approx(3 * scored)
        assert head(compact, fused_loss=False) == pytest.approx(4 * scored)
    assert head(True, fused_loss=False, padding_free=False) == head(True, is_grpo=True) == pytest.approx(4 * scored)
    assert head(False, fused_loss=False, padding_free=False) == head(False, is_grpo=True) == pytest.approx(4 * padded)


def test_rows_that_have_ended_are_generated_until_the_last_one_ends() -> None:
    """All weights are read once for each token of the longest; an engine goes on without those that have ended."""
    shape = Architecture.from_config(load_config("0.5b"))
    config = GCPOConfig(use_cpu=True, bf16=False, kappa=0.0, estimator="none")
    completions = [2, 2, 2, 2, 2, 2, 2, 20]
    device = Device(tflops=1e9, bandwidth=1.0, mfu=1.0, mbu=1.0)  # so that memory is all that is waited for
    pair, weights = shape.key_value_bytes(4), 4 * (shape.layer_weights + shape.hidden * shape.vocab)
    for in_house, keys in ((True, 8 * 20 * (10 + 20 / 2)), (False, 7 * 2 * (10 + 2 / 2) + 20 * (10 + 20 / 2))):
        abilities = replace(abilities_of(config, shape), in_house=in_house)
        counts = count_cycle(config, PlannedScript(config, Lengths(10, 20, 5), completions), abilities)
        (decode,) = (cost for cost in plan_step(config, shape, counts, device).costs if cost.what == "decode")
        assert decode.tokens == counts.tokens["generated"] == sum(completions)
        assert decode.seconds == pytest.approx((20 * weights + keys * pair) / 1e9)


@pytest.mark.parametrize(
    ("changed", "attention", "fused", "packed"),
    [
        ({}, None, True, True),
        ({"entropy_coef": 0.01}, None, False, True),
        ({"top_entropy_quantile": 0.5}, "sdpa", False, True),
        ({"torch_compile": True}, None, False, False),
        ({}, "flash_attention_2", True, False),
        ({"kappa": 0.0, "estimator": "none"}, None, False, False),
        ({"kappa": 0.0, "estimator": "none", "fused_loss": True}, None, True, False),
    ],
    ids=str,
)
def test_options_hold_as_the_trainer_decides(
    changed: dict[str, Any], attention: str | None, fused: bool, packed: bool
) -> None:
    shape = Architecture.from_config(load_config("0.5b"))
    config = GCPOConfig(use_cpu=True, bf16=False, **changed)
    abilities = abilities_of(config, shape, attention)
    counts = count_cycle(config, PlannedScript(config, Lengths(10, 20, 5)), abilities)
    (own,) = {item.head for item in counts.passes if item.mode == "train"}
    assert own == ("fused" if fused else "compact" if packed else "trl")
    assert (counts.tokens["trained"] < 8 * 30) == packed
    for name, holds in (("fused_loss", fused), ("padding_free", packed)):
        wanted = replace_option(config, name)
        if holds or not config.is_causal:
            count_cycle(wanted, PlannedScript(wanted, Lengths(10, 20, 5)), abilities)
            continue
        with pytest.raises(ValueError, match=f"`{name}` must be False or None"):
            count_cycle(wanted, PlannedScript(wanted, Lengths(10, 20, 5)), abilities)


def replace_option(config: GCPOConfig, name: str) -> GCPOConfig:
    wanted = copy(config)
    setattr(wanted, name, True)
    return wanted


def test_models_whose_rows_cannot_be_packed_are_not() -> None:
    """A model that learns its positions keeps TRL's rows; one that looks back a window does not."""
    for kind, packed in (("gpt2", False), ("mistral", True)):
        config = AutoConfig.for_model(kind, vocab_size=50)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config.update({"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else sizes)
        shape = Architecture.from_config(config)
        abilities = abilities_of(GCPOConfig(use_cpu=True, bf16=False), shape)
        assert (abilities.against_padding_free is None) == packed and abilities.against_fused_loss is None


def test_a_cycle_of_several_steps_is_divided_among_them() -> None:
    """Two optimizer steps on one rollout: a step generates half of it, and trains on all."""
    lengths, shape = Lengths(10, 20, 5), Architecture.from_config(load_config("0.5b"))
    once, twice = (GCPOConfig(use_cpu=True, bf16=False, num_iterations=k) for k in (1, 2))
    counted = [plan(config, lengths) for config in (once, twice)]
    assert [(c.steps, c.rollouts) for c in counted] == [(1, 1), (2, 1)]
    assert counted[0].tokens["generated"] == counted[1].tokens["generated"]
    assert 2 * counted[0].tokens["trained"] == counted[1].tokens["trained"]
    plans = [plan_step(c, shape, counts) for c, counts in zip((once, twice), counted, strict=True)]
    assert plans[0].tokens["generated"] == 2 * plans[1].tokens["generated"]
    assert plans[0].tokens["trained"] == plans[1].tokens["trained"]
    assert isinstance(counted[0].passes, Counter)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def command(*flags: str) -> int:
    try:
        return cli.main(["plan", *flags])
    except SystemExit as error:
        return int(error.code or 0)


def test_command_prints_tables_ratios_and_hours(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {policy}\nnum_generations: 4\nmax_steps: 7\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--completion_tokens", "50", "--num_processes", "2"]
    assert command(*flags, "--gpu", "h100", "--output", str(tmp_path / "plan.json")) == 0
    out = capsys.readouterr().out
    assert "tokens trained: GRPO 2,848, GCPO" in out
    assert "on 2 devices" in out and "GCPO to GRPO:" in out and "device-hours for 7 steps" in out
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["gcpo"]["tokens"]["generated"] == content["grpo"]["tokens"]["generated"] == 2 * 8 * 50
    assert content["lengths"]["completion"] == 50
    paper = [
        "--model_name_or_path",
        policy,
        "--paper",
        "--num_generations",
        "4",
        "--output",
        str(tmp_path / "paper.json"),
    ]
    assert command(*paper) == 0
    lengths = json.loads((tmp_path / "paper.json").read_text())["lengths"]
    assert lengths["collider"] == lengths["completion"] == 16384
    (tmp_path / "given.yaml").write_text("num_colliders: 2\ncollider_max_completion_length: 64\n")
    flags = ["--model_name_or_path", policy, "--paper", "--num_generations", "4", "--max_completion_length", "512"]
    for given in (
        ["--num-colliders", "2", "--collider-max-completion-length=64"],
        ["--config", str(tmp_path / "given.yaml")],
    ):
        capsys.readouterr()
        assert command(*flags, *given) == 0
        assert "L=2 colliders of 64" in capsys.readouterr().out
    assert command(*flags) == 0
    out = capsys.readouterr().out
    assert "L=4" in out and "estimator=sampled" in out and "policy under x_i" in out and "hours" not in out


H100 = ("--model_name_or_path", "1.5b", "--gpu", "h100", "--num_generations", "8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "`--model_name_or_path` is missing"),
        (["--model_name_or_path", "./nothing"], "`--model_name_or_path` must be"),
        (["--model_name_or_path", "1.5b", "--gpu", "abacus"], "`--gpu` must be one of"),
        (["--model_name_or_path", "1.5b", "--gpu", "h100", "--bf16", "false"], "16-bit peak"),
        (["--model_name_or_path", "1.5b", "--tflops", "3"], "`--bandwidth` is missing"),
        (["--model_name_or_path", "1.5b", "--mfu", "0"], "`--mfu` must be above 0"),
        (["--model_name_or_path", "1.5b", "--prompt_tokens", "0"], "`--prompt_tokens` must be at least 1"),
        (["--model_name_or_path", "1.5b", "--num_processes", "0"], "`num_processes` must be at least 1"),
        (["--model_name_or_path", "1.5b", "--kappa", "-1"], "`kappa` must be finite"),
        (["--model_name_or_path", "1.5b", "--lengths", "short"], "`--lengths` must be one of 'full', 'lognormal'"),
        ([*H100, "--lengths", "lognormal", "--completion_tokens", "9"], "not with `--lengths lognormal`"),
        ([*H100, "--reward_seconds", "-1"], "`--reward_seconds` must be finite and at least 0"),
        (["--model_name_or_path", "1.5b", "--reward_seconds", "1"], "`--reward_seconds` needs a device"),
    ],
)
def test_command_refuses(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*flags) == 2
    assert message in capsys.readouterr().err
