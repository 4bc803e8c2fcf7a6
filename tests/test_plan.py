"""`gcpo plan` counts what a run logs, and its arithmetic is that of formulas written out by hand."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import SHORT_TEMPLATES, SPECIAL, count_low, options, prompts, save_policy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo import GCPOConfig, GCPOTrainer, cli
from gcpo.causal.account import TOKENS
from gcpo.causal.contexts import PromptBuilder
from gcpo.forward.packing import pack
from gcpo.forward.prefix_tree import grow
from gcpo.planning.architecture import SIZES, Architecture, load_config
from gcpo.planning.plan import Device, pass_flops, plan_step
from gcpo.planning.sharing import Run, packed_rows, tree_nodes
from gcpo.planning.workload import Lengths, Pass, Savings, gcpo_passes, grpo_passes, longest_context, tokens_by_kind

COMPLETION, COLLIDER = 10, 6
CHOICES = ("context_attention", "num_kl_contexts", "kl_fraction", "candidate_context_tokens")
DEFAULTS = {item.name: item.default for item in fields(GCPOConfig) if item.name in CHOICES}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def settings(folder: Path, **changed: Any) -> dict[str, Any]:
    """Options of a run whose completions all have their full length, without special tokens, which are never shown."""
    full = {"min_new_tokens": COMPLETION, "suppress_tokens": list(range(len(SPECIAL)))}
    given = {"max_completion_length": COMPLETION, "collider_max_completion_length": COLLIDER}
    whole = {"context_attention": "full", "num_kl_contexts": None, "kl_fraction": 1.0, "candidate_context_tokens": None}
    changed = {"max_steps": 1, "num_colliders": 3, **whole, **given, **SHORT_TEMPLATES, **changed}
    return options(folder, generation_kwargs=full, **changed)


def planned(config: GCPOConfig, policy: str) -> dict[str, float]:
    """Tokens of a step as the plan has them."""
    builder = PromptBuilder(AutoTokenizer.from_pretrained(policy), config)
    prompt = prompts()[0]["prompt"]
    ids = builder.tokenizer(prompt)["input_ids"]
    lengths = Lengths.measured(builder, prompt, ids, completion=COMPLETION, collider=COLLIDER)
    return tokens_by_kind(gcpo_passes(config, lengths))


@pytest.mark.parametrize(
    ("changed", "tolerance"),
    [
        ({"share_prefix": False, "causal_policy_context": "context", "kl_fraction": 0.25, "beta": 0.1}, 0.0),
        ({"share_prefix": False, "reuse_rollout": False, "candidate_context_tokens": 4, "estimator": "scored"}, 0.0),
        ({"share_prefix": False, "num_iterations": 2, "max_steps": 2, "num_kl_contexts": 1}, 0.0),
        ({"context_attention": "parallel"}, 0.0),
        ({"context_attention": "parallel", "reuse_rollout": False, "estimator": "none"}, 0.0),
        ({"kappa": 0.0, "estimator": "none"}, 0.0),
        ({"estimator": "sampled", "num_estimator_samples": 2, "kappa": 0.0}, 0.0),
        # What contexts share beyond what they must (candidates that begin with the same character) saves more tokens,
        # and with small rows, where those of which candidate are closed decides as well.
        ({}, 0.02),
        ({"pack_tokens": 150, "reuse_rollout": False}, 0.1),
        ({"pack_tokens": 1, "num_kl_contexts": 1}, 0.02),
        # Which are drawn decides what they share, and which candidates and colliders are read.
        (DEFAULTS, 0.0),
        ({"share_prompt": True, "gradient_accumulation_steps": 1}, 0.02),
        ({"kl_fraction": 0.5}, 0.1),
        ({"context_attention": "parallel", "num_kl_contexts": 1, "kl_fraction": 0.5, "estimator": "none"}, 0.1),
    ],
    ids=lambda value: "-".join(f"{key}={some}" for key, some in value.items()) if isinstance(value, dict) else "",
)
def test_tokens_are_those_that_a_run_logs(
    changed: dict[str, Any], tolerance: float, policy: str, tmp_path: Path
) -> None:
    config = GCPOConfig(**settings(tmp_path, **changed))
    trainer = GCPOTrainer(policy, count_low, args=config, train_dataset=prompts())
    trainer.keeps_account = True  # without causal parts too
    trainer.train()
    steps = trainer.state.log_history[: config.max_steps]
    expected = planned(config, policy)
    assert expected.keys() <= set(TOKENS)
    for kind in TOKENS:
        logged = sum(step[f"gcpo/tokens/{kind}"] for step in steps) / len(steps)
        within = tolerance if kind in ("scored_contexts", "scored_colliders") else 0.0
        assert logged == pytest.approx(expected.get(kind, 0.0), rel=within, abs=0), kind


@pytest.mark.parametrize("pack_tokens", [1, 60, 200, 10_000])
def test_shared_tokens_are_those_of_packing_and_of_the_tree(pack_tokens: int) -> None:
    """Every run of tokens spelled out in ids of its own, the last one of a context too."""
    lengths = {"query": 7, "between": 3, "after": 2, **{f"candidate {k}": 4 + k for k in range(3)}}
    lengths |= {f"collider {l}": 5 for l in range(2)}
    first = {name: 100 * number for number, name in enumerate(sorted(lengths))}
    orders = [["candidate 1", "candidate 2"], ["candidate 0", "candidate 2"], ["candidate 0", "candidate 1"]]
    contexts = [["query", *o, "between", f"collider {l}", "after"] for o in orders for l in range(2)]
    spelled = [[first[name] + k for name in context for k in range(lengths[name])] for context in contexts]
    runs: list[list[Run]] = [[((name,), float(lengths[name])) for name in context] for context in contexts]
    packed = pack(spelled, [[9999] * 6] * len(spelled), pack_tokens)
    assert packed_rows(runs, 6.0, pack_tokens) == [len(row.ids) for row in packed]
    nodes, _ = grow([ids[:-1] for ids in spelled])
    assert sum(size for _, size in tree_nodes(runs)) == sum(len(node.ids) for node in nodes)


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
    scored = Pass("scoring", "", "score", rows=2, new=7, predicted=7, dense=True)
    # Before 5.19, transformers made the angles of rotary embeddings by a product of its own.
    assert counter.get_total_flops() == pytest.approx(pass_flops(scored, architecture, False), rel=1e-4)
    trained = replace(scored, mode="train", predicted=0)
    body = pass_flops(replace(scored, predicted=0), architecture, False)
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
    passes = grpo_passes(config, Lengths(prompt=10, completion=20, collider=5))
    device = Device(tflops=1.0, bandwidth=1.0, mfu=0.5, mbu=0.25)
    cost = {item.what: item for item in plan_step(config, shape, passes, device).costs}
    weights = 4 * (shape.layer_weights + shape.hidden * shape.vocab)
    pairs = 16 * (10 + 20 / 2) * 2 * 4 * shape.kv_heads * shape.head_dim * 24
    assert cost["decode"].seconds == pytest.approx(20 * (weights + pairs) / (1e9 * 0.25))
    assert cost["policy under q"].seconds == pytest.approx(cost["policy under q"].flops / (1e12 * 0.5))
    two = plan_step(config, shape, passes, device, num_processes=2)
    assert two.total("flops") == sum(item.flops for item in cost.values())
    assert two.total("seconds", "loss") == pytest.approx(cost["policy under q"].seconds / 2)


def test_memory_by_type_and_optimizer() -> None:
    shape = Architecture.from_config(load_config("0.5b"))
    lengths = Lengths(prompt=10, completion=20, collider=5)

    def held(dtype: str, **options: Any) -> dict[str, float]:
        config = GCPOConfig(use_cpu=True, bf16=False, **options)
        memory = plan_step(config, shape, gcpo_passes(config, lengths), dtype=dtype).memory
        assert memory.peak == sum(memory.held.values()) + max(memory.phases.values())
        return {name: size / shape.parameters for name, size in memory.held.items()}

    assert held("float32") == {"weights": 4, "optimizer": 8}
    assert held("bfloat16", optim="adamw_bnb_8bit", beta=0.1) == {"weights": 2, "optimizer": 2, "reference": 2}
    assert held("float32", optim="sgd") == {"weights": 4, "optimizer": 0}


def test_savings_save() -> None:
    """Every switch changes the operations of a step, in the right direction."""
    config = GCPOConfig(use_cpu=True, bf16=False, context_attention="full", gradient_checkpointing=False)
    lengths = Lengths(100, 200, 30, fusion_template=20, context_template=(10, 5, 5), candidate_frame=3)
    savings = Savings.of(config, longest_context(config, lengths))
    shape = Architecture.from_config(load_config("0.5b"))

    def operations(**changed: Any) -> float:
        passes = gcpo_passes(config, lengths, replace(savings, **changed))
        return sum(pass_flops(item, shape, False) for item in passes)

    for changed in ({"contexts": "none"}, {"queries": False}, {"prefills": False}, {"rollout_states": False}):
        assert operations(**changed) > operations(), changed
    assert operations(compact_head=False) > operations()
    assert operations(trained_prompts=True) < operations() and operations(parallel=True) < operations()


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
    ],
)
def test_command_refuses(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*flags) == 2
    assert message in capsys.readouterr().err
