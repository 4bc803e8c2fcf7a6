"""A character-level policy of a few thousand parameters, built on the spot, and what the trainer tests share."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORT_TEMPLATES = {
    "fusion_prompt_template": "{question}|{candidates}|?",
    "context_prompt_template": "{question}|{candidates}|{collider}|",
    "candidate_template": "{index}:{candidate}",
}


TURNS = ["<|user|>", "<|assistant|>"]


def make_tokenizer(named_turns: bool = True) -> PreTrainedTokenizerFast:
    """One token for each character. Without `named_turns`, turn markers are special as Llama's are: in no list."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    inner.decoder = decoders.Fuse()
    if not named_turns:
        inner.add_special_tokens(TURNS)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=TURNS if named_turns else [],
        chat_template=TEMPLATE,
    )


class PlainTextTokenizer(PreTrainedTokenizerFast):
    """
    As tokenizers of mistral-common are: every text is plain text, conversations become ids without a template, and what
    others offer besides is missing. Made by `make_plain_text_tokenizer`.
    """

    def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> Any:
        if options.get("split_special_tokens"):
            raise ValueError("`split_special_tokens` is not supported.")
        return super().__call__(text, add_special_tokens=add_special_tokens, split_special_tokens=True)

    def added_tokens_decoder(self) -> dict[int, Any]:  # type: ignore[override]  # a method there, too
        raise NotImplementedError

    def get_chat_template(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError

    def apply_chat_template(self, conversation: Any, tokenize: bool = True, **options: Any) -> Any:  # type: ignore
        assert tokenize and options["return_dict"] and options.get("chat_template") is None
        batched = isinstance(conversation[0], list)
        rows = []
        for messages in conversation if batched else [conversation]:
            ids = []
            for message in messages:
                content = self(message["content"], add_special_tokens=False)["input_ids"]
                ids += [SPECIAL.index("<|user|>"), *content, SPECIAL.index("<eos>")]
            rows.append([*ids, SPECIAL.index("<|assistant|>")])
        return {"input_ids": rows if batched else rows[0]}


def make_plain_text_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.__class__ = PlainTextTokenizer
    return tokenizer


def save_policy(folder: Path, tie_word_embeddings: bool = True, max_positions: int = 2048) -> str:
    """A folder that `from_pretrained` loads model and tokenizer from."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max_positions,
            tie_word_embeddings=tie_word_embeddings,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prompts(count: int = 8, conversational: bool = False) -> Dataset:
    texts = [f"{k}+{k}=" for k in range(count)]
    rows = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    return Dataset.from_dict({"prompt": rows})


def count_low(completions: list[Any], **kwargs: Any) -> list[float]:
    """Reward: how many of a completion's characters come before "P"; varies within nearly every group."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(character < "P" for character in text)) for text in texts]


def options(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Arguments common to GRPOConfig and GCPOConfig for a run of a second."""
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 10,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **overrides,
    }


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def worst_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference between two sets of parameters, relative to each one's largest entry."""
    assert left.keys() == right.keys()
    return max(((left[k] - right[k]).abs().max() / left[k].abs().max()).item() for k in left)
