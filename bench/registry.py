"""What is measured: operations at shapes of real models, and the tensors of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gcpo_kernels import reference
from gcpo_kernels.testing import make_head_inputs, make_mask, make_token_inputs

# (H, V) of the output layer.
MODELS = {
    "SmolLM2-135M": (576, 49_152),
    "Gemma-3-1B": (1152, 262_144),
    "Qwen2.5-1.5B": (1536, 151_936),
    "Qwen2.5-7B": (3584, 152_064),
    "Llama-3-8B": (4096, 128_256),
    "vocabulary 248,320": (2048, 248_320),
}
# Tokens and model of the shapes that neighbours publish.
PUBLISHED = ((16_384, "vocabulary 248,320"), (8192, "Qwen2.5-1.5B"), (16_384, "Qwen2.5-7B"), (2048, "Llama-3-8B"))

# Each operation, and the group that `--group` names it by.
OPERATIONS = {
    "linear_loss": "linear",
    "scoring": "linear",
    "token_loss": "token_loss",
    "logits_loss": "logits",
    "causal_weights": "causal",
}
GROUPS = ("token_loss", "linear", "logits", "causal")
TITLES = {
    "linear_loss": "Loss from hidden states, with the gradients of hidden states and weight",
    "scoring": "Log-probabilities from hidden states, without gradient",
    "token_loss": "Loss from log-probabilities, with gradient",
    "logits_loss": "Loss from logits, with gradient",
    "causal_weights": "Causal weights, without gradient",
}
GROUP_SIZE = 8  # sequences of a case that needs no more
# Which of a case's tensors gradients are taken of, by operation; the others have none.
LEAVES = {"linear_loss": ("hidden", "weight"), "token_loss": ("logp",), "logits_loss": ("logits",)}
LARGE = 1 << 20  # tokens from which a case's numbers are drawn on its device: on a CPU that takes seconds
Tensors = dict[str, torch.Tensor]  # of a case, by the names of the public functions' arguments
OBJECTIVES: dict[str, dict[str, Any]] = {"grpo": {"beta": 0.04}, "gcpo": {"beta": 0.04, "kappa": 0.06}}


@dataclass(frozen=True)
class Case:
    """
    One operation at one shape.

    Attributes:
        op: of OPERATIONS.
        model: of MODELS, where hidden and vocab come from; "" where neither counts.
        batch, tokens: B and T; for causal weights P and n.
        hidden, vocab, contexts: H, V, L.
        dtype: of hidden states, weight, logits, representations. Log-probabilities are float32.
        objective: of OBJECTIVES. "grpo" is what every other library computes; "gcpo" adds the causal KL.
        logits: "peaked" (like a language model's) or "random".
        masked: "none" or "ragged".
        compiled: whether torch.compile takes part (compiling takes its time).
    """

    op: str
    model: str = ""
    batch: int = GROUP_SIZE
    tokens: int = 0
    hidden: int = 0
    vocab: int = 0
    contexts: int = 4
    dtype: torch.dtype = torch.float32
    objective: str = "grpo"
    logits: str = "peaked"
    masked: str = "none"
    compiled: bool = False

    @property
    def group(self) -> str:
        return OPERATIONS[self.op]

    @property
    def key(self) -> str:
        """Names the case in files, and for `--case` and `--compare`."""
        parts = [self.op]
        if self.op == "causal_weights":
            parts.append(f"P={self.batch},n={self.tokens},L={self.contexts},H={self.hidden}")
        else:
            parts.append(f"N={self.rows}" + (f",H={self.hidden},V={self.vocab}" if self.vocab else ""))
        parts.append(str(self.dtype).removeprefix("torch."))
        if self.with_gradient:
            parts.append(self.objective)
        parts += [x for x, usual in ((self.logits, "peaked"), (self.masked, "none")) if x != usual]
        return "/".join(parts)

    @property
    def rows(self) -> int:
        """N = B * T."""
        return self.batch * self.tokens

    @property
    def with_gradient(self) -> bool:
        return self.op in LEAVES

    @property
    def options(self) -> dict[str, Any]:
        return OBJECTIVES[self.objective]


def _linear(op: str, rows: int, model: str, batch: int = GROUP_SIZE, **rest: Any) -> Case:
    hidden, vocab = MODELS[model]
    return Case(op, model, batch, rows // batch, hidden, vocab, **rest)


def cases(device: torch.device | str, quick: bool = False) -> list[Case]:
    """Those of a device, the most telling first: what a limit on time leaves out is at the end."""
    kind = torch.device(device).type
    if quick:
        return list(_quick("float32" if kind == "cpu" else "bfloat16"))
    return list(_on_cpu() if kind == "cpu" else _on_accelerator())


def _quick(dtype_name: str) -> Iterator[Case]:
    dtype = getattr(torch, dtype_name)
    yield Case("token_loss", batch=8, tokens=2048, objective="grpo", compiled=True)
    yield Case("token_loss", batch=8, tokens=2048, objective="gcpo")
    for logits in ("peaked", "random"):
        yield _linear("linear_loss", 64, "SmolLM2-135M", batch=4, dtype=dtype, logits=logits)
    yield _linear("scoring", 64, "SmolLM2-135M", batch=4, dtype=dtype)
    yield _linear("logits_loss", 64, "SmolLM2-135M", batch=4, dtype=dtype, masked="ragged")
    yield Case("causal_weights", batch=8, tokens=8, contexts=4, hidden=576, dtype=dtype)


def tiny_cases(device: torch.device | str) -> list[Case]:
    """One of each operation, so small that its time says nothing: to try out what measures."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    head: dict[str, Any] = {"model": "tiny", "batch": 4, "tokens": 9, "hidden": 24, "vocab": 131, "dtype": dtype}
    return [
        Case("linear_loss", **head),
        Case("scoring", **head),
        Case("token_loss", batch=4, tokens=33, objective="gcpo"),
        Case("logits_loss", **head, masked="ragged"),
        Case("causal_weights", batch=3, tokens=4, hidden=16, dtype=dtype),
    ]


def _on_cpu() -> Iterator[Case]:
    model = "SmolLM2-135M"
    yield _linear("linear_loss", 4096, model)
    yield _linear("scoring", 4096, model)
    for rows in (16_384, 262_144, 2_097_152):
        for objective in OBJECTIVES:
            yield Case("token_loss", batch=rows // 2048, tokens=2048, objective=objective, compiled=rows == 16_384)
    yield _linear("logits_loss", 1024, model, compiled=True)
    yield Case("causal_weights", batch=64, tokens=8, contexts=8, hidden=3584, compiled=True)
    for rows in (256, 1024):
        yield _linear("linear_loss", rows, model, compiled=rows == 1024)
        yield _linear("scoring", rows, model)
    yield _linear("linear_loss", 1024, model, objective="gcpo")
    yield _linear("linear_loss", 1024, model, logits="random")
    yield _linear("linear_loss", 1024, model, masked="ragged")
    yield _linear("linear_loss", 128, "Qwen2.5-1.5B")


def _on_accelerator() -> Iterator[Case]:
    half: dict[str, Any] = {"dtype": torch.bfloat16}
    for rows, model in PUBLISHED:
        yield _linear("linear_loss", rows, model, **half, compiled=True)
    # How time, memory and error grow with the tokens.
    for rows in (1024, 2048, 4096, 16_384):
        yield _linear("linear_loss", rows, "Qwen2.5-1.5B", **half)
    for rows, model in PUBLISHED:
        yield _linear("scoring", rows, model, **half, compiled=model == "Qwen2.5-1.5B")
    for rows in (16_384, 16_777_216):
        for objective in OBJECTIVES:
            yield Case("token_loss", batch=rows // 2048, tokens=2048, objective=objective, compiled=True)
    yield Case("causal_weights", batch=64, tokens=8, contexts=8, hidden=3584, **half, compiled=True)
    yield _linear("logits_loss", 8192, "Qwen2.5-1.5B", **half, compiled=True)
    yield _linear("linear_loss", 8192, "Qwen2.5-1.5B", **half, objective="gcpo")
    for rows, model in PUBLISHED:
        yield _linear("linear_loss", rows, model, **half, logits="random")
    for rows in (1024, 4096, 16_384):
        yield _linear("scoring", rows, "Qwen2.5-1.5B", **half)
    for rows in (131_072, 1_048_576):
        yield Case("token_loss", batch=rows // 2048, tokens=2048, objective="gcpo")
    yield Case("causal_weights", batch=8, tokens=8, contexts=4, hidden=1536, **half)
    yield _linear("linear_loss", 8192, "Qwen2.5-1.5B", **half, masked="ragged")
    yield _linear("logits_loss", 4096, "Llama-3-8B", **half, masked="ragged")
    for model in ("SmolLM2-135M", "Gemma-3-1B"):
        yield _linear("linear_loss", 8192, model, **half)
        yield _linear("scoring", 8192, model, **half)


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """
    Everything that any implementation takes: those of `gcpo_loss` around the log-probabilities of the layer made here,
    "mask" as bool and "mask_int" as int64; logits (B, T + 1, V) as a model gives them, of which the last position is
    not used.
    """
    if case.op == "causal_weights":
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.batch, case.tokens, case.contexts, 1, case.hidden)

        def noise(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device)

        z = noise(case.batch, 1, case.hidden) + 0.6 * noise(case.batch, case.tokens, case.hidden)
        context_z = z[:, :, None, None] + 0.5 * noise(*shape)
        return {"z": z.to(case.dtype), "context_z": context_z.to(case.dtype)}
    head: Tensors = {}
    logp = None
    if case.vocab:
        made: dict[str, Any] = {"logits": case.logits, "dtype": case.dtype, "device": device, "seed": seed}
        head = make_head_inputs(case.rows, case.hidden, case.vocab, **made)
        logp = _logp(head).view(case.batch, case.tokens)
        head["hidden"] = head["hidden"].view(case.batch, case.tokens, case.hidden)
        head["token_ids"] = head["token_ids"].view(case.batch, case.tokens)
    if case.op == "scoring":
        return head
    if case.op == "logits_loss":
        padded = torch.nn.functional.pad(head.pop("hidden"), (0, 0, 0, 1))
        head["logits"] = padded @ head.pop("weight").T
    contexts = case.contexts if case.options.get("kappa") else 1
    drawn: dict[str, Any] = {"device": device, "seed": seed, "masked": "none", "on_device": case.rows >= LARGE}
    rest = make_token_inputs(case.batch, case.tokens, contexts, **drawn, logp=logp)
    for name in ("causal_logp", "context_weights", "importance_sampling_ratio"):
        del rest[name]
    if not case.options.get("kappa"):
        del rest["context_logp"], rest["query_logp"]
    if case.vocab:
        del rest["logp"]
    rest["mask"] = make_mask(case.batch, case.tokens, case.masked, seed).to(device)
    rest["mask_int"] = rest["mask"].to(torch.int64)
    return head | rest


def _logp(head: Tensors, step: int = 1024) -> torch.Tensor:
    """Log-probabilities in float32, (N,), a block of rows at a time."""
    parts: list[Any] = []
    for x, ids in zip(head["hidden"].split(step), head["token_ids"].split(step), strict=True):
        parts.append(reference.selective_logprob(x @ head["weight"].T, ids))
    return torch.cat(parts)
