"""Errors against float64 beside those of plain torch and of TRL's fused head, on tokens as certain as a model's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import make_mask, make_token_inputs, with_gradients

pytest.importorskip("trl")
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

BATCH, TOKENS, HIDDEN, VOCAB = 6, 40, 96, 3001
OPTIONS = {"beta": 0.04, "kappa": 0.06, "loss_type": "bnpo"}
FACTOR = 1.5
Head = Callable[..., torch.Tensor]


def peaked(dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """
    Tokens from nearly uniform to nearly certain: logits of the sampled token reach 25 above the rest, as in a trained
    model, where most tokens are certain and some are forks.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    ids = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=generator)
    sharpness = 25.0 * torch.rand(BATCH, TOKENS, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(BATCH, TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    hidden = (sharpness * weight[ids] + noise).to(dtype)
    weight = weight.to(dtype)
    logp = reference.linear_logprob(hidden.double(), weight.double(), ids)
    rest = make_token_inputs(BATCH, TOKENS, 3, logp=logp, seed=seed)
    del rest["logp"], rest["causal_logp"]
    return rest | {"hidden": hidden, "weight": weight, "token_ids": ids, "mask": make_mask(BATCH, TOKENS, "none")}


def trl_head(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As `add_fused_lm_head` calls it."""
    flat = hidden.flatten(0, 1)
    return ChunkedLogProbFunction.apply(flat, weight, None, ids.flatten(), 1.0, 32_768, None, 1.0, ())[0].view(
        ids.shape
    )


def plain_head(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def results(inputs: dict[str, Any], head: Head | None) -> dict[str, torch.Tensor]:
    """logp, the loss and its gradients; `head=None` is ours."""
    given = with_gradients(inputs, "hidden", "weight")
    rest = {key: x for key, x in given.items() if key not in ("hidden", "weight", "token_ids")}
    hidden, weight, ids = given["hidden"], given["weight"], given["token_ids"]
    if head is None:
        logp = gcpo_kernels.linear_logprob(hidden, weight, ids)
        loss = gcpo_kernels.linear_gcpo_loss(hidden, weight, ids, **rest, **OPTIONS)[0]
    else:
        logp = head(hidden, weight, ids)
        loss = reference.gcpo_loss(logp, **rest, **OPTIONS)[0]
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return {"logp": logp.detach(), "loss": loss.detach(), "d hidden": d_hidden, "d weight": d_weight}


def errors(dtype: torch.dtype, seeds: range) -> dict[str, dict[str, dict[str, float]]]:
    """By quantity and implementation: root mean square over seeds, and the largest, relative to the truth's size."""
    heads: dict[str, Head | None] = {"ours": None, "trl": trl_head, "plain": plain_head}
    found: dict[str, dict[str, list[torch.Tensor]]] = {}
    for seed in seeds:
        inputs = peaked(dtype, seed)
        exact = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
        truth = results(exact, lambda hidden, weight, ids: reference.linear_logprob(hidden, weight, ids))
        for name, head in heads.items():
            for key, x in results(inputs, head).items():
                error = (x.double() - truth[key]).abs() / truth[key].abs().max()
                found.setdefault(key, {}).setdefault(name, []).append(error.flatten())
    return {
        key: {
            name: {"rms": torch.cat(x).square().mean().sqrt().item(), "largest": torch.cat(x).max().item()}
            for name, x in by_name.items()
        }
        for key, by_name in found.items()
    }


@pytest.mark.hazard(15)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nowhere_worse_than_the_better_of_trl_and_plain_torch(dtype: torch.dtype) -> None:
    """Beside them over several batches, in the root mean square and in the largest error (Liger#830)."""
    measured = errors(dtype, range(4))
    # Where all agree to a rounding or two, the smaller error is luck.
    floor = 4 * torch.finfo(torch.float32).eps
    for key, by_name in measured.items():
        for measure in ("rms", "largest"):
            better = min(by_name["trl"][measure], by_name["plain"][measure])
            ours = by_name["ours"][measure]
            assert ours <= max(FACTOR * better, floor), f"{key}, {measure}: {ours:.3e}, the better peer {better:.3e}"
    if dtype == torch.bfloat16:  # and the peers do round: the comparison is of something
        assert measured["logp"]["plain"]["rms"] > 100 * measured["logp"]["ours"]["rms"]


@pytest.mark.hazard(23)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_first_ratio_is_one(level: str, dtype: torch.dtype) -> None:
    """Scored without gradient and trained by the same kernels, at the same weights: R - 1 below 1e-6 (trl#4159)."""
    inputs = peaked(dtype, seed=9)
    with torch.no_grad():
        old = gcpo_kernels.linear_logprob(inputs["hidden"], inputs["weight"], inputs["token_ids"])
    trained = with_gradients(inputs, "hidden", "weight")
    new = gcpo_kernels.linear_logprob(trained["hidden"], trained["weight"], trained["token_ids"]).detach()
    assert ((new - old).exp() - 1).abs().max() < 1e-6
    # Inside the loss: with advantages of one sign only R is left of it.
    loss, metrics = gcpo_kernels.linear_gcpo_loss(
        trained["hidden"],
        trained["weight"],
        trained["token_ids"],
        torch.ones(BATCH),
        inputs["mask"],
        old_logp=old,
        importance_sampling_level=level,
        epsilon_low=1e-6,
        epsilon_high=1e-6,
        loss_type="bnpo",
    )
    assert loss.item() == pytest.approx(-1.0, abs=1e-6)
    assert metrics["clip_low"] == metrics["clip_high"] == 0


if __name__ == "__main__":
    for kind in (torch.float32, torch.bfloat16):
        for quantity, rows in errors(kind, range(4)).items():
            print(kind, quantity, {name: f"{x['rms']:.2e} {x['largest']:.2e}" for name, x in rows.items()})
