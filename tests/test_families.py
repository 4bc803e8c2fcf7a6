"""Model families: a step of GCPO on a tiny random model of each, whole and with an adapter, scored as it computes."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig
from test_peft import plain_scores, trainer_scores
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import (
    SHORT_TEMPLATES,
    count_low,
    make_plain_text_tokenizer,
    make_tokenizer,
    options,
    parameters,
    prompts,
    worst_difference,
)
from trl import GRPOConfig, GRPOTrainer

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.causal.contexts import PromptBuilder
from gcpo.evaluation.evaluate import evaluate_pass_at_k
from gcpo.run.inputs import check_chat_template

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 2.0, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}),
    "falcon_mamba": ("FalconMambaConfig", {}),
}

SHORT = {"num_colliders": 2, "collider_max_completion_length": 2, "max_completion_length": 4, **SHORT_TEMPLATES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def save_family(name: str, folder: Path) -> str:
    """A tiny model of the family, and the tokenizer of the other tests, in a folder that is made once."""
    path = folder / name
    if not path.exists():
        tokenizer = make_tokenizer()
        kind, changed = FAMILIES[name]
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        torch.manual_seed(0)
        config = getattr(transformers, kind)(vocab_size=len(tokenizer), **ids, **{**SIZES, **changed})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.filterwarnings("ignore:`share_prefix` needs")
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, adapter: bool, folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kappa": 0.5, "max_steps": 1, "max_completion_length": 6}
    if adapter:
        # PEFT refuses a Mamba's output projections.
        modules: str | list[str] = ["in_proj"] if "mamba" in name else "all-linear"
        settings["peft_config"] = LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM")
    trainer = make_trainer(save_family(name, folder), tmp_path, **settings)
    output, _ = first_batch(trainer)
    mask = output["completion_mask"].bool()
    expected = plain_scores(trainer.model, output)
    torch.testing.assert_close(trainer_scores(trainer, output)[mask], expected[mask], atol=1e-4, rtol=1e-4)
    trainer = make_trainer(save_family(name, folder), tmp_path, **settings)
    before = parameters(trainer.model)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["gcpo/upsilon/fallback"] == 0 and logged["gcpo/upsilon/std"] > 0 and logged["gcpo/kl_causal"] > 0
    after = parameters(trainer.model)
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved and all(value.isfinite().all() for value in after.values())
    assert all(("lora_" in key) == adapter for key in moved)


@pytest.mark.slow
def test_a_compiled_model_trains_alike(folder: Path, tmp_path: Path) -> None:
    """`torch_compile`, with the backend that compiles no code: graphs and their gradients as for the default one."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        backend = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = make_trainer(save_family("qwen2", folder), tmp_path, kappa=0.5, **backend)
        trainer.train()
        runs.append((trainer.state.log_history[:2], parameters(trainer.model)))
    (plain, expected), (logged, got) = runs
    for name in ("loss", "gcpo/upsilon/mean", "gcpo/kl_causal"):
        assert [entry[name] for entry in logged] == pytest.approx([entry[name] for entry in plain], rel=1e-4)
    assert worst_difference(expected, {name.replace("_orig_mod.", ""): value for name, value in got.items()}) < 1e-4


def test_a_tokenizer_of_mistral_common_trains(folder: Path, tmp_path: Path) -> None:
    """With the causal parts off as GRPOTrainer does, with them on too; and `gcpo eval` takes it."""
    path = save_family("llama", folder)
    kept: dict[str, Any] = {"reward_funcs": count_low, "train_dataset": prompts(conversational=True)}
    runs = []
    for trainer_class, config, own in (
        (GRPOTrainer, GRPOConfig, {}),
        (GCPOTrainer, GCPOConfig, {"kappa": 0.0, "estimator": "none"}),
        (GCPOTrainer, GCPOConfig, {"context_attention": "full", **SHORT}),
    ):
        args = config(**options(tmp_path, **{"max_steps": 1, "gradient_accumulation_steps": 1, **own}))
        trainer = trainer_class(path, args=args, processing_class=make_plain_text_tokenizer(), **kept)
        trainer.train()
        runs.append(trainer)
    expected, off, causal = (parameters(trainer.model) for trainer in runs)
    assert all(torch.equal(value, off[name]) for name, value in expected.items())
    assert worst_difference(expected, causal) > 0 and runs[2].state.log_history[0]["gcpo/kl_causal"] > 0
    tokenizer = make_plain_text_tokenizer()
    check_chat_template(tokenizer, kept["train_dataset"], path)
    result = evaluate_pass_at_k(
        runs[2].model, tokenizer, prompts(2, conversational=True), count_low, max_new_tokens=2, progress=False
    )
    assert len(result.prompt_scores) == 2


def test_prompts_without_a_user_message_train(folder: Path, tmp_path: Path) -> None:
    """Among others, as GRPOTrainer trains with them: a system message alone, and content that is missing."""
    messages = [[{"role": "system", "content": "1+1="}], [{"role": "user", "content": None}]]
    dataset = datasets.Dataset.from_dict({"prompt": messages})
    one_batch = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    args = GCPOConfig(**options(tmp_path, **{**one_batch, **SHORT, "collider_attention": "full"}))
    trainer = GCPOTrainer(save_family("llama", folder), count_low, args, dataset)
    seen = []
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *others: seen.extend(ids) or generate(ids, *others)
    trainer.train()
    texts = trainer._tokenizer.batch_decode(seen)
    assert {text.partition("|1:")[0] for text in texts if "|1:" in text} == {
        "<|system|>1+1=<eos><|user|>1+1=",
        "<|user|>",
    }


@pytest.mark.parametrize("name", ["tekken_240911.json", "mistral_instruct_tokenizer_240323.model.v3"])
def test_prompts_of_mistral_common_are_those_of_the_whole_text(name: str, tmp_path: Path) -> None:
    mistral = pytest.importorskip("mistral_common")
    if ".model" in name:
        pytest.importorskip("sentencepiece")
    path = Path(mistral.__file__).parent / "data" / name
    tokenizer = transformers.tokenization_mistral_common.MistralCommonBackend(str(path))
    builder = PromptBuilder(
        tokenizer, GCPOConfig(**options(tmp_path), fusion_prompt_template="{question}\n{candidates}")
    )
    around = tokenizer("2\n", add_special_tokens=False)["input_ids"]
    candidate = tokenizer("2\nI think 2.", add_special_tokens=False)["input_ids"][len(around) :]
    before = [{"role": "system", "content": "brief"}]
    got = builder.fusion([*before, {"role": "user", "content": "What is [INST]</s>?"}], [candidate])
    text = "What is [INST]</s>?\nCandidate 1:\nI think 2."
    assert got == tokenizer.apply_chat_template([*before, {"role": "user", "content": text}])["input_ids"]
    assert builder.fusion("1+1?", [candidate]) == tokenizer("1+1?\nCandidate 1:\nI think 2.")["input_ids"]
