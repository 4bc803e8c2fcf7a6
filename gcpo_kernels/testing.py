"""
Inputs and error budgets shared by the tests and the benchmarks.

Inputs are drawn on the CPU in float64 and then cast, so that a seed means the same numbers on every device and in every
type (but for `make_head_inputs`, whose sizes would not bear it, and where `on_device` is asked for). They look like
training: the old policy, the reference and the contexts are the current policy plus noise, and both sides of the clip
range are hit, per token and per sequence. Arguments travel as dicts of keyword arguments.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

MASKS = ("ragged", "none", "all")
LOGITS = ("peaked", "random")
SEQUENCE_SHIFT = 0.3  # of a sequence's mean log-ratio: beyond log(1.2) and log(0.8)


def make_mask(batch: int, tokens: int, kind: str = "ragged", seed: int = 0) -> torch.Tensor:
    """
    (B, T) bool. "ragged": a full sequence, one with a hole (a tool's tokens), an empty one, and prefixes of random
    length; "none": nothing is masked; "all": everything is.
    """
    if kind != "ragged":
        return torch.full((batch, tokens), kind == "none")
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, max(tokens, 1) + 1, (batch,), generator=generator)
    lengths[:2] = tokens
    mask = torch.arange(tokens) < lengths.unsqueeze(1)
    if batch > 1:
        mask[1, tokens // 3 : tokens // 2] = False
    if batch > 2:
        mask[-1] = False
    return mask


def make_token_inputs(
    batch: int = 5,
    tokens: int = 7,
    contexts: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    masked: str = "ragged",
    shift: float = SEQUENCE_SHIFT,
    logp: torch.Tensor | None = None,
    on_device: bool = False,
) -> dict[str, Any]:
    """
    Every tensor argument of `gcpo_loss`: (B, T) scores, (B,) advantages, (B, T, L) context_logp, (B, L)
    context_weights, (B, T) importance_sampling_ratio. `logp`, (B, T), is drawn unless it is given. With `on_device`,
    numbers are drawn on `device` in float32: fast at any size, and a seed means the same on one kind of device only.

    Sequence i has a positive advantage where i % 4 is 0 or 2, and a mean log-ratio of `shift` where it is 0 or 3, else
    of -`shift`: both clip sides, and both sides where the clip does not act. An objective in the ratio of a whole
    sequence, the product of its tokens' (vespo), needs a `shift` of about 1 / T: of its policy term others leave
    nothing.
    """
    home = torch.device(device if on_device else "cpu")
    wide = torch.float32 if on_device else torch.float64
    drawn: dict[str, Any] = {"generator": torch.Generator(home).manual_seed(seed), "device": home, "dtype": wide}

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, **drawn)

    if logp is None:
        logp = -torch.rand(batch, tokens, **drawn).clamp(min=1e-3).log().abs() * 1.5
    logp = logp.detach().to(home, wide)
    row = torch.arange(batch, device=home) % 4
    sign = torch.where((row == 0) | (row == 2), 1.0, -1.0).to(wide)
    shifts = torch.where((row == 0) | (row == 3), -1.0, 1.0).to(wide) * shift
    spread = noise(batch, tokens) * 0.25
    spread = spread - spread.mean(dim=1, keepdim=True) if tokens else spread

    def near(x: torch.Tensor, *shape: int, scale: float) -> torch.Tensor:
        return (x + scale * noise(*shape)).clamp(max=-1e-4)

    old_logp = (logp + spread + shifts.unsqueeze(1)).clamp(max=-1e-4)
    inputs = {
        "logp": logp,
        "advantages": sign * (0.3 + noise(batch).abs()),
        "old_logp": old_logp,
        "ref_logp": near(logp, batch, tokens, scale=0.3),
        "query_logp": near(old_logp, batch, tokens, scale=0.1),
        "causal_logp": near(logp, batch, tokens, scale=0.3),
        "context_logp": near(old_logp.unsqueeze(-1), batch, tokens, contexts, scale=0.4),
        "context_weights": torch.rand(batch, contexts, **drawn) * 2 / max(contexts, 1),
        "importance_sampling_ratio": (0.2 * noise(batch, tokens)).exp(),
    }
    cast = {name: x.to(device=device, dtype=dtype) for name, x in inputs.items()}
    return cast | {"mask": make_mask(batch, tokens, masked, seed).to(device)}


def make_linear_inputs(
    batch: int = 5,
    tokens: int = 7,
    contexts: int = 3,
    hidden: int = 13,
    vocab: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    masked: str = "ragged",
    shift: float = SEQUENCE_SHIFT,
) -> dict[str, Any]:
    """
    Every tensor argument of `linear_gcpo_loss`: those of `make_token_inputs` (float32, or float64 for float64) around
    the log-probabilities of the output layer made here, with hidden (B, T, H), weight (V, H), bias (V,) in place of
    logp.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = {
        "hidden": noise(batch, tokens, hidden).to(dtype),
        "weight": (noise(vocab, hidden) / max(hidden, 1) ** 0.5).to(weight_dtype or dtype),
        "bias": (0.3 * noise(vocab)).to(weight_dtype or dtype),
    }
    u = head["hidden"].double() @ head["weight"].double().T + head["bias"].double()
    logprobs = torch.log_softmax(u, dim=-1)
    # Tokens drawn from the policy itself, as in training: most are likely ones.
    draws = torch.rand(batch, tokens, 1, generator=generator, dtype=torch.float64)
    token_ids = (logprobs.exp().cumsum(dim=-1) < draws).sum(dim=-1).clamp(max=vocab - 1)
    logp = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    scores = torch.float64 if dtype == torch.float64 else torch.float32
    like: dict[str, Any] = {"dtype": scores, "device": device, "seed": seed, "masked": masked, "shift": shift}
    rest = make_token_inputs(batch, tokens, contexts, **like, logp=logp)
    del rest["logp"]
    return {name: x.to(device) for name, x in (head | {"token_ids": token_ids}).items()} | rest


def make_head_inputs(
    rows: int,
    hidden: int,
    vocab: int,
    *,
    logits: str = "peaked",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """
    hidden (N, H), weight (V, H) and token_ids (N,) of any size: nothing of size (N, V) is made, and numbers are drawn
    on `device`, so that a seed means the same numbers on one kind of device only.

    "peaked" is like a language model reading its own samples: a few candidates per token stand out, the token is drawn
    from them, and the median one has a probability near 0.8. "random" is what a fresh layer gives: all are near 1 / V.
    """
    if logits not in LOGITS:
        raise ValueError(f"`logits` must be one of {', '.join(map(repr, LOGITS))}, got {logits!r}.")
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device).clamp(min=1e-6)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = (noise(vocab, hidden) / hidden**0.5).to(dtype)
    x = noise(rows, hidden)
    if logits == "random":
        token_ids = torch.randint(0, vocab, (rows,), generator=generator, device=device)
        return {"hidden": x.to(dtype), "weight": weight, "token_ids": token_ids}
    candidates = torch.randint(0, vocab, (rows, 4), generator=generator, device=device)
    # The other tokens' logits have mean 0 and variance 1: their log-sum-exp is log V + 1/2.
    best = math.log(vocab) + 0.5 + 6.0 + 3.0 * noise(rows, 1)
    behind = torch.arange(4.0, device=device) * (0.5 - 3.0 * uniform(rows, 4).log())
    strength = (best - behind).clamp(min=0.0)
    for k in range(4):  # rows of the weight have a norm near 1
        x += strength[:, k, None] * weight[candidates[:, k]].float()
    # The largest of strength + Gumbel noise is a draw from their softmax.
    drawn = (strength - (-uniform(rows, 4).log()).log()).argmax(dim=1, keepdim=True)
    return {"hidden": x.to(dtype), "weight": weight, "token_ids": candidates.gather(1, drawn).squeeze(1)}


def make_representations(
    prompts: int = 3,
    group: int = 4,
    contexts: int = 3,
    samples: int = 2,
    hidden: int = 9,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """
    z, context_z and context_mask of `causal_weights`: candidates of a prompt share a direction, samples are near their
    candidate. The mask leaves candidate 0 of each prompt without context 0, and candidate 1 without any.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z = noise(prompts, 1, hidden) + 0.6 * noise(prompts, group, hidden)
    context_z = z[:, :, None, None] + 0.5 * noise(prompts, group, contexts, samples, hidden)
    keep = torch.rand(prompts, group, contexts, samples, generator=generator) < 0.7
    keep[:, :1, 0] = False
    keep[:, 1:2] = False
    return {
        "z": z.to(device=device, dtype=dtype),
        "context_z": context_z.to(device=device, dtype=dtype),
        "context_mask": keep.to(device),
    }


def make_hidden_representations(prompts: int = 3, **sizes: Any) -> dict[str, torch.Tensor]:
    """Arguments of `causal_weights_from_hidden`: as `make_representations`, z being one of three states of each row."""
    inputs = make_representations(prompts, **sizes)
    z = inputs.pop("z").flatten(0, 1)
    hidden = torch.stack([z - 1, z, z + 1], dim=1)
    return {"hidden": hidden, "last_index": torch.ones(len(z), dtype=torch.int64, device=z.device), **inputs}


def in_float64(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with floating tensors in float64: what the truth is computed from."""
    return {
        name: x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def with_gradients(arguments: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Copies in which the named tensors are leaves that require gradients."""
    return {
        name: x.detach().clone().requires_grad_(name in names) if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }


def poison(arguments: Mapping[str, Any], value: float = float("nan"), *names: str) -> dict[str, Any]:
    """
    Copies with `value` at masked tokens of the named arguments (of all, where none is named), and in what belongs to
    sequences without any unmasked token. Integer tensors get an index far outside any vocabulary instead.
    """
    mask = arguments["mask"] != 0
    out = dict(arguments)
    for name, x in arguments.items():
        skip = name in ("mask", "weight", "bias") or not isinstance(x, torch.Tensor)
        if skip or (names and name not in names) or (name == "context_weights" and x.dim() == 1):
            continue
        per_token = name != "context_weights" and x.shape[:2] == mask.shape
        flat = name in ("hidden", "token_ids") and not per_token
        where = mask if per_token else mask.flatten() if flat else mask.any(dim=1)
        fill = value if x.is_floating_point() else (-(2**62) if value < 0 else 2**62)
        out[name] = x.detach().clone()
        out[name][~where] = fill
        out[name].requires_grad_(x.requires_grad)
    return out


def assert_close_to_truth(
    ours: torch.Tensor,
    truth: torch.Tensor,
    plain: torch.Tensor | None = None,
    *,
    what: str = "value",
    roundings: float = 16.0,
) -> None:
    """
    Assert that the error of `ours` is at most twice that of `plain`, plus rounding: in the largest element, and in the
    root mean square, where a bias shared by all elements shows.

    Args:
        ours: the result under test.
        truth: the float64 reference, computed from the same (rounded) inputs.
        plain: the same computation in plain torch, in the type of the inputs. None: no error but rounding.
        what: named in the message.
        roundings: float32 (or float64) epsilons allowed, of the truth's size, beside one rounding to ours' type.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}"
    assert truth.dtype == torch.float64, f"{what}: the truth must be float64, got {truth.dtype}"
    for x, which in ((truth, "the truth"), (ours, "ours")):
        assert torch.isfinite(x).all(), f"{what}: {which} is not finite"
    narrow = ours.dtype in (torch.bfloat16, torch.float16)
    wide = torch.finfo(torch.float32 if narrow else ours.dtype)
    relative = roundings * wide.eps + (torch.finfo(ours.dtype).eps / 2 if narrow else 0.0)
    smallest = torch.finfo(ours.dtype).tiny * torch.finfo(ours.dtype).eps
    truth = truth.detach()  # compared where it is: a gradient of a real output layer is gigabytes
    error = (ours.detach().to(truth.device).double() - truth).flatten()
    plain_error = torch.zeros_like(error)
    if plain is not None:
        plain_error = (plain.detach().to(truth.device).double() - truth).flatten()
    for measure, order in (("largest", float("inf")), ("root mean square", 2)):
        size = truth.numel() ** 0.5 if order == 2 else 1.0
        got, allowed, scale = (
            torch.linalg.vector_norm(x, order).item() / max(size, 1.0) if x.numel() else 0.0
            for x in (error, plain_error, truth.flatten())
        )
        limit = 2.0 * allowed + relative * scale + smallest
        assert got <= limit, (
            f"{what}: {measure} error {got:.3e} exceeds {limit:.3e} (plain torch {allowed:.3e}, size {scale:.3e})"
        )


def assert_gradient(
    ours: torch.Tensor | None,
    truth: torch.Tensor,
    plain: torch.Tensor | None = None,
    *,
    what: str = "gradient",
    roundings: float = 16.0,
) -> None:
    """
    `assert_close_to_truth` for gradients: one that is missing, or all zero, fails, and so does a truth that is zero in
    the type of `ours`.
    """
    assert ours is not None, f"{what}: no gradient"
    held = truth.to(ours.dtype).abs().sum() > 0
    assert held, f"{what}: the true gradient is zero in {ours.dtype}, which would let a missing one pass"
    assert ours.abs().sum() > 0, f"{what}: the gradient is zero"
    assert_close_to_truth(ours, truth, plain, what=what, roundings=roundings)
