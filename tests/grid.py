"""The grid of loss options, and calls that run one case on the public functions and on their references."""

from itertools import product
from typing import Any

import torch

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import SEQUENCE_SHIFT, make_linear_inputs, make_token_inputs, with_gradients

Case = tuple[dict[str, Any], dict[str, Any]]  # options, and changes to the tensors

BACKEND = "torch"  # what `run` runs on; the tests of another backend change it
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
OTHER_LOSSES = ("luspo", "cispo", "sapo", "vespo")
HEADS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.6, "bias": None},
    {"temperature": 1.3, "logit_scale": 1.5, "logit_softcap": 2.0},
    {"logit_softcap": 3.0, "bias": None},
)


def cases() -> list[Case]:
    """
    (options, changes to the tensors) over loss_type x level x beta x kappa x delta, in full; the forms of the other
    arguments cycle with periods that share no factor, so that each meets every option.
    """
    out = []
    grid = product(LOSSES, ("token", "sequence"), (0.0, 0.04), (0.0, 0.06), (None, 1.35))
    for index, (kind, level, beta, kappa, delta) in enumerate(grid):
        options = {"loss_type": kind, "importance_sampling_level": level, "beta": beta, "kappa": kappa, "delta": delta}
        if kind == "dr_grpo":
            options["max_completion_length"] = 9
        if kind == "dapo":
            options["num_items_in_batch"] = (None, 11, 0.5, torch.tensor(23))[index % 4]
        if delta and index % 3 == 0:
            options["delta"] = 1.1  # below the clip range's upper end
        if index % 7 == 3:
            options |= {"epsilon_low": 0.1, "epsilon_high": 0.28, "proj_floor": 0.02}
        if index % 13 in (1, 4, 7, 9):
            options["kl_clip"] = 0.3  # about the spread of the log-ratios: some are clamped
        if index % 13 in (4, 9):
            options["proj_floor"] = 0.5  # above the probability of many tokens, which then is the floor
        changes = {
            "importance_sampling_ratio": (None, "(B, T)", "(B, 1)", "(B,)", "(B, T)")[index % 5],
            "advantages": ("(B,)", "(B, T)", "(B,)")[index % 3],
            "context_weights": (None, "(B, L)", "(L,)", "one is 0", None, "drawn", "(L,)")[index % 7],
            "causal_logp": (True, False, False, True, False)[index % 5],
            "query_logp": index % 3 != 1,
            "old_logp": index % 11 != 0,
            "mask": (torch.bool, torch.int64, torch.float32)[index % 3],
        }
        out.append((options, changes))
    return [*out, *other_cases()]


def other_cases() -> list[Case]:
    """
    (options, changes) over the other loss types x level x beta x what the objective has beside; the rest cycles as in
    `cases`. In each of them the policy term or the causal one has weights.
    """
    out = []
    for index, (kind, level, beta) in enumerate(product(OTHER_LOSSES, ("token", "sequence"), (0.0, 0.04))):
        options = {
            "loss_type": kind,
            "importance_sampling_level": level,
            "beta": beta,
            "kappa": (0.06, 0.0)[index % 3 // 2],
        }
        options |= {"bias_correction_kl": index % 4 != 2, "delta": (None, 1.2, 1.35)[index % 3]}
        if kind == "sapo":
            options |= {"sapo_temperature_pos": 1.7, "sapo_temperature_neg": 0.6}
        if kind == "vespo":
            options |= {"vespo_k_pos": 1.5, "vespo_lambda_pos": 0.8, "vespo_k_neg": 0.7, "vespo_lambda_neg": 0.0}
        if kind == "cispo" and beta:
            options["epsilon_high"] = 1.1
        if kind in ("cispo", "vespo"):
            options["num_items_in_batch"] = (None, 11, torch.tensor(23))[index % 3]
        if index % 5 in (1, 2):
            options["kl_clip"] = 0.3
        weighted = index % 4
        changes = {
            "importance_sampling_ratio": (None, "(B, T)", "(B, 1)", "(B,)", "(B, T)")[index % 5],
            "advantages": ("(B,)", "(B, T)", "(B,)")[index % 3],
            "context_weights": (None, "(B, L)", "one is 0")[index % 3],
            "causal_logp": index % 2 == 0,
            "query_logp": index % 3 != 1,
            "old_logp": index % 11 != 3,
            "mask": (torch.bool, torch.int64, torch.float32)[index % 3],
            "policy_weights": (None, "(B, T)", "(B,)", "(B, 1)")[weighted],
            "kappa_weights": ("(B,)", None, "(B, T)", "(B, T)")[weighted],
        }
        out.append((options, changes))
    return out


def name(case: Case) -> str:
    options, _ = case
    words = [options["loss_type"], options["importance_sampling_level"]]
    words += [key for key in ("beta", "kappa", "delta", "kl_clip", "bias_correction_kl") if options.get(key)]
    return "-".join(words)


def change(inputs: dict[str, Any], changes: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """`inputs` in the forms that `changes` asks for."""
    out = dict(inputs)
    generator = torch.Generator().manual_seed(seed)
    batch, tokens = inputs["mask"].shape
    out["mask"] = inputs["mask"].to(changes["mask"])
    if changes["advantages"] == "(B, T)":
        noise = torch.rand(batch, tokens, generator=generator, dtype=torch.float64).to(inputs["advantages"])
        out["advantages"] = inputs["advantages"].unsqueeze(1) * (0.5 + noise)
    ratio = inputs["importance_sampling_ratio"]
    shapes = {None: None, "(B, T)": ratio, "(B, 1)": ratio[:, :1], "(B,)": ratio[:, 0]}
    out["importance_sampling_ratio"] = shapes[changes["importance_sampling_ratio"]]
    weights = inputs["context_weights"]
    holed = weights.clone()
    holed[::2, -1] = 0.0
    holed[1::2, 0] = 0.0  # context 0 still serves as the context x_i
    uniform = torch.full_like(weights[0], 1.0 / weights.shape[1])
    forms = {None: None, "(B, L)": weights, "(L,)": weights[0], "one is 0": holed, "drawn": uniform}
    out["context_weights"] = forms[changes["context_weights"]]
    for key in ("policy_weights", "kappa_weights"):
        # Some are 0, the whole first row's too; where those of the causal term are, its contexts' scores are garbage.
        drawn = 0.5 + torch.rand(batch, tokens, generator=generator, dtype=torch.float64).to(inputs["advantages"])
        drawn[:1] = 0.0
        drawn[:, 1::3] = 0.0
        forms = {"(B, T)": drawn, "(B, 1)": drawn[:, :1], "(B,)": drawn[:, 0] if tokens else drawn.sum(dim=1)}
        if changes.get(key):
            out[key] = forms[changes[key]]
    if changes.get("kappa_weights"):
        weights = out["kappa_weights"]
        off = (weights if weights.dim() == 2 else weights.unsqueeze(1)).expand(batch, tokens) == 0
        out["context_logp"] = out["context_logp"].masked_fill(off.unsqueeze(-1), torch.nan)
        out["query_logp"] = out["query_logp"].masked_fill(off, torch.nan)
    for key in ("causal_logp", "query_logp", "old_logp"):
        if not changes[key]:
            out[key] = None
    return out


def _shift(options: dict[str, Any], tokens: int) -> float:
    """In vespo a sequence's ratio is the product of its tokens': without this, long ones lose their policy term."""
    return min(SEQUENCE_SHIFT, 2.0 / max(tokens, 1)) if options["loss_type"] == "vespo" else SEQUENCE_SHIFT


def token_call(case: Case, batch: int, tokens: int, contexts: int = 3, **kind: Any) -> tuple[dict[str, Any], ...]:
    """Tensors and options of `gcpo_loss`."""
    options, changes = case
    inputs = make_token_inputs(batch, tokens, contexts, shift=_shift(options, tokens), **kind)
    return change(inputs, changes), options


def linear_call(
    case: Case, batch: int, tokens: int, contexts: int = 3, *sizes: int, **kind: Any
) -> tuple[dict[str, Any], ...]:
    """Tensors and options of `linear_gcpo_loss`, the options of one of HEADS among them."""
    options, changes = case
    inputs = change(make_linear_inputs(batch, tokens, contexts, *sizes, shift=_shift(options, tokens), **kind), changes)
    head = dict(HEADS[len(name(case)) % len(HEADS)])
    if "bias" in head:
        inputs["bias"] = head.pop("bias")
    return inputs, options | head


def run(
    function: str, arguments: dict[str, Any], options: dict[str, Any], backend: str | None = "default"
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """
    Loss, metrics and gradients of the function named, on copies; `backend=None` is the reference, "default" is BACKEND.
    """
    leaves = ("logp", "hidden", "weight", "bias", "causal_logp")
    copies = with_gradients(arguments, *leaves)
    if backend is None:
        loss, metrics = getattr(reference, function)(**copies, **options)
    else:
        backend = BACKEND if backend == "default" else backend
        loss, metrics = getattr(gcpo_kernels, function)(**copies, **options, backend=backend)
    (1.7 * loss).backward()
    return loss.detach(), metrics, {key: copies[key].grad for key in leaves if copies.get(key) is not None}
