"""The KL terms of a loss on a rollout's rows: the second one (eq. 12), and the clip that both may have."""

from dataclasses import replace

import torch

from gcpo.causal.options import CausalOptions
from gcpo.causal.port import KLTerms
from gcpo_kernels import causal_reference_logprob, gcpo_loss


def causal_kl_loss(
    terms: KLTerms,
    options: CausalOptions,
    logp: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T)
    *,
    causal_logp: torch.Tensor | None = None,  # (B, T)
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    kappa * k3 towards the causal reference p' (eqs. 12, 13), to be added to a policy loss.

    Args:
        terms: those of the causal step, of these rows.
        options: `kappa`, `proj_floor` and `kl_clip` are used.
        logp: log-probabilities of the completions under q, with gradient. At the first update after a rollout they
            also are log pi_old.
        mask: tokens that count.
        causal_logp: log-probabilities under x_{i,0}, with gradient, where the policy is conditioned on it. None: logp.
        loss_type, max_completion_length, num_items_in_batch: how tokens are reduced, as in `gcpo_kernels.gcpo_loss`,
            whose types these are. What divides by unmasked tokens divides by those of rows that are not counted, too.

    Raises:
        ValueError: `causal_policy_context="context"`, and no `causal_logp`.

    Returns:
        A scalar with gradient, and metrics over the tokens of counted rows: `kl_causal`, `proj_clamped`, with `kl_clip`
        also `kl_causal_clipped`, and `tokens`, how many there were.
    """
    if options.causal_policy_context == "context" and causal_logp is None:
        raise ValueError(
            "`causal_policy_context='context'` needs `causal_logp`, log-probabilities under `terms.first_contexts` "
            "with gradient (of a ModelPolicy: `policy.logps(rollout, terms.first_contexts)`), got None."
        )
    loss, metrics = gcpo_loss(
        logp,
        torch.zeros_like(logp[:, 0]),
        mask,
        old_logp=logp.detach(),
        causal_logp=causal_logp,
        query_logp=terms.query_logp,
        context_logp=terms.context_logp,
        context_weights=terms.context_weights,
        kappa_weights=terms.counted.to(logp.dtype),
        kappa=options.kappa,
        proj_floor=options.proj_floor,
        kl_clip=options.kl_clip,
        loss_type=loss_type,
        max_completion_length=max_completion_length,
        num_items_in_batch=num_items_in_batch,
    )
    return loss * terms.scale, {**metrics, "tokens": (mask * terms.counted.unsqueeze(1)).sum().float()}


def pulling_to(kl_target: str, terms: KLTerms) -> KLTerms:
    """
    The same terms, made such that the causal reference p' of eq. 13 is what the second KL term pulls to. No loss knows
    of targets: where the target is the only context, has all the weight and stands for the query too, p' = a - a + a.

    Args:
        kl_target: as in `CausalOptions`: `"projection"`, p' as it is; `"context"`, exp(a); `"ensemble"`,
            sum_l w_l exp(b_l).
        terms: of a draw: `context_logp` (B, T, width) and `context_weights` (B, width), 0 behind a row's contexts.

    Returns:
        Terms with `context_logp` (B, T, 1), `context_weights` (B, 1) and `query_logp` (B, T), but for `"projection"`.
        Rows that are not counted have the log-probability 0 and the weight 0.
    """
    if kl_target == "projection":
        return terms
    if kl_target == "context":
        target = terms.context_logp[..., 0]
    else:
        # A context of weight 0 counts for nothing, whatever stands there.
        weights = terms.context_weights.unsqueeze(1)
        target = (terms.context_logp + weights.log()).masked_fill(weights == 0, -torch.inf).logsumexp(dim=-1)
    counted = terms.counted.unsqueeze(1)
    target = torch.where(counted, target, 0.0)
    return replace(terms, context_logp=target.unsqueeze(-1), context_weights=counted.float(), query_logp=target)


def mean_pull(
    terms: KLTerms,
    options: CausalOptions,
    policy_logp: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T)
) -> torch.Tensor:
    """
    How much likelier the second KL term's target finds each completion than the policy that wrote it does: the mean
    over its tokens of d = log p' - log pi_old(y | q). A term that knows what a good completion is has a larger d where
    the advantage is larger.

    Args:
        terms: those of the causal step.
        options: `proj_floor` and `kl_clip` are used, for the clamp of p'.
        policy_logp: log pi_old(y | q), whatever the term pulls to.
        mask: tokens that count.

    Returns:
        (B,) without gradient; NaN for rows that are not counted or have no token.
    """
    kept = terms.counted & (mask != 0).any(dim=1)
    pull = token_pull(terms, options, policy_logp, mask)
    return torch.where(kept, pull.sum(dim=1) / (mask != 0).sum(dim=1), torch.nan)


def token_pull(
    terms: KLTerms,
    options: CausalOptions,
    policy_logp: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T)
) -> torch.Tensor:
    """
    d = log p' - log pi_old(y | q) of every token, (B, T) float32 without gradient; 0 for masked tokens and for those of
    rows that are not counted. Takes what `mean_pull` takes.
    """
    kept = terms.counted & (mask != 0).any(dim=1)
    pull = torch.zeros(policy_logp.shape, device=policy_logp.device)
    policy_logp, mask = policy_logp.detach()[kept].float(), mask[kept] != 0
    query_logp = policy_logp if terms.query_logp is None else terms.query_logp[kept].float()
    log_target = causal_reference_logprob(
        query_logp,
        terms.context_logp[kept].float(),
        context_weights=terms.context_weights.expand(len(kept), -1)[kept],
        proj_floor=options.proj_floor,
        floor_at_query=options.kl_clip is not None,
    )
    pull[kept] = torch.where(mask, log_target - policy_logp, 0.0)
    return pull


def clip_log_ratio(ref_logp: torch.Tensor, logp: torch.Tensor, kl_clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A reference's log-probabilities (B, T), held within `kl_clip` of the policy's, and where they were not, (B, T) bool.
    There the difference of the two is a constant, so that the gradient of a KL term between them is 0.
    """
    difference = ref_logp - logp
    return logp + difference.clamp(-kl_clip, kl_clip), difference.detach().abs() > kl_clip
