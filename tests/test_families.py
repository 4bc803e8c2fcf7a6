"""Model families: a step of GCPO on a tiny random model of each, whole and with an adapter, scored as it computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from test_peft import plain_scores, trainer_scores
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import make_tokenizer, parameters, worst_difference

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
