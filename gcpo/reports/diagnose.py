"""`gcpo diagnose`: names the ways in which a run goes wrong, with the number that shows it and the option to change."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from gcpo.reports.intervals import interval
from gcpo.run.records import Run, Step, is_number, recent


@dataclass(frozen=True)
class Finding:
    """
    One thing that is wrong with a run.

    Attributes:
        name: the signature.
        number: what was measured, and the limit that it broke.
        change: what it means and which option to change.
    """

    name: str
    number: str
    change: str


@dataclass(frozen=True)
class Limits:
    """From where on a number is a failure. Shares and ratios are those of a run's second half, where not said else."""

    near_zero: float = 0.2  # share of |Upsilon| < 0.1
    norm_ratio: float = 1e-3  # |Zbar - Zprime| / |zbar|, median
    spike: float = 10.0  # gradient norm over the run's median
    clamped: float = 0.3  # share of tokens whose p', or whose log-ratio of a KL term, was clamped
    zero_variance: float = 0.8  # share of groups whose rewards are all the same
    length: float = 0.4  # mean length of the last quarter of the steps over that of the first
    cut_off: float = 0.5  # share of completions that reached the length limit
    colliders: float = 0.5  # share of colliders that were cut off or said nothing
    collider_loss: float = 0.25  # mean reward that colliders lack, of the candidates'
    overhead: float = 4.0  # step time over what GRPO's part of it took


Check = Callable[[Run, Limits], Finding | None]

_OWN_PHASES = ("colliders", "collider_rewards", "contexts")  # that GRPO does not have
_BOTH_REWARDS = ("gcpo/colliders/reward", "reward")
_MIN_STEPS = 8  # below, a trend, a spike or a mean is noise
_KL_DEFAULTS = {"collider_choice": "sample", "kl_target": "projection"}


def diagnose(run: Run, limits: Limits = Limits()) -> list[Finding]:
    """The signatures that a run shows, none for a healthy one."""
    return [finding for check in CHECKS if (finding := check(run, limits)) is not None]


def answer_about_loss(run: Run) -> str:
    """What the size of the loss says, which is what people ask first."""
    losses, norms = run.values("loss"), run.values("grad_norm")
    if not losses:
        return "Loss: the log does not hold it."
    size = statistics.fmean(map(abs, losses))
    said = f"Loss is {'0' if size < 5e-4 else 'near 0' if size < 0.05 else 'not 0'} (mean |loss| {size:.2g})"
    if not norms:
        return f"{said}. Whether the run learns shows in `reward`; the log holds no gradient norm."
    norm = statistics.median(norms)
    if norm == 0:
        return f"{said}, and so is the gradient (median norm 0): nothing is being learnt. See below for the reason."
    return (
        f"{said}, and that says nothing: advantages average to 0 within a group, the ratio is 1 at first, and both KL "
        f"terms start near 0, so the loss does too. Its gradient is not 0 (median norm {norm:.2g}): the run learns. "
        "Watch `reward`."
    )


def overhead(step: Step) -> float | None:
    """
    A step's time over GRPO's part of it: without colliders, their rewards, contexts, and the share of scoring that went
    to colliders.
    None where the phases were not logged or the step did nothing causal.
    """
    total = step.get("step_time")
    seconds = {name: step.get(f"gcpo/seconds/{name}") or 0.0 for name in (*_OWN_PHASES, "scoring")}
    if not total or not seconds["colliders"] + seconds["contexts"]:
        return None
    query, colliders = (step.get(f"gcpo/tokens/scored_{kind}") or 0.0 for kind in ("query", "colliders"))
    scoring = seconds["scoring"] * colliders / (query + colliders) if query + colliders else 0.0
    own = total - sum(seconds[name] for name in _OWN_PHASES) - scoring
    return total / own if own > 0 else None


def overheads(run: Run) -> list[float]:
    """`overhead` of the steps that have one."""
    return [ratio for row in run.log if (ratio := overhead(row)) is not None]


def _near_zero(run: Run, limits: Limits) -> Finding | None:
    share = run.recent_mean("gcpo/upsilon/near_zero")
    if share is None or share <= limits.near_zero:
        return None
    alpha = run.config.get("alpha")
    if alpha is not None and alpha < 0.2:
        change = f"`alpha` is {alpha}, and Upsilon at most that: advantages vanish. Raise it (the paper: 2)."
    else:
        change = (
            "Representations have collapsed or point apart, or there are too few samples: try `representation='mean'`, "
            "more `num_colliders`, or `estimator='scored'`; `estimator='none'` leaves advantages alone."
        )
    return Finding("Upsilon near 0", f"{share:.0%} of |Upsilon| below 0.1 (limit {limits.near_zero:.0%})", change)


def _no_signal(run: Run, limits: Limits) -> Finding | None:
    ratios = recent(run.values("gcpo/projection/norm_ratio"))
    if not ratios or (median := statistics.median(ratios)) >= limits.norm_ratio:
        return None
    if run.config.get("num_colliders") == 1:
        change = "With `num_colliders=1` Zbar and Zprime are the same and cancel. Use 2 or more (default 4)."
    else:
        change = (
            "The colliders are all alike, so the projection adds nothing to the group's mean: raise "
            "`collider_temperature` or `num_colliders`, or try `estimator='scored'`. Expect parity with GRPO otherwise."
        )
    number = f"median |Zbar - Zprime| / |zbar| is {median:.2g} (limit {limits.norm_ratio:g})"
    return Finding("projection without signal", number, change)


def _no_pull(run: Run, limits: Limits) -> Finding | None:
    correlations = run.values("gcpo/kl_causal_correlation")
    if run.config.get("kappa") == 0 or len(correlations) < _MIN_STEPS:
        return None
    found = interval(correlations)
    if found.mean > found.half:
        return None
    number = (
        f"log p' - log pi(y | q) of a completion and its advantage correlate with {found} over {found.count} logs: "
        "the 95% interval is not above 0"
    )
    above = run.mean("gcpo/colliders/first_above")
    if above is not None:
        number += f"; c_0 has a higher reward than the other colliders' mean in {above:.0%} of the groups"
    choice, target = (run.config.get(name) or default for name, default in _KL_DEFAULTS.items())
    others = [name for name in ("reward", "greedy") if name != choice]
    if target == "projection" and choice == "sample":
        change = (
            "`collider_choice='sample'` draws c_0 as the other colliders are drawn, so that over draws E[p'] = "
            "pi(y | q): the second KL pulls to what the policy says already, and adds noise."
        )
    else:
        change = (
            f"What the second KL pulls to (`kl_target={target!r}`, `collider_choice={choice!r}`) does not make good "
            "completions likelier than bad ones: it works against the reward, or adds noise."
        )
    targets = "`kl_target='context'` or `'ensemble'`" if target == "projection" else "another `kl_target`"
    choices = " or ".join([f"`collider_choice={others[0]!r}`", *(f"`{name!r}`" for name in others[1:])])
    change += f" Try {choices}, {targets}, or `kappa=0`, which saves the contexts."
    return Finding("second KL without signal", number, change)


def _spikes(run: Run, limits: Limits) -> Finding | None:
    broken = [row["step"] for row in run.log if "grad_norm" in row and not is_number(row["grad_norm"])]
    if broken:
        number = f"gradient norm is not finite at step {broken[0]:g} ({len(broken)} of {len(run.log)} steps)"
        return Finding("gradient-norm spikes", number, _spike_change(run, True))
    steps, norms = run.series("grad_norm")
    if len(norms) < _MIN_STEPS or (median := statistics.median(norms)) == 0:
        return None
    worst = max(norms)
    if worst <= limits.spike * median:
        return None
    at = steps[norms.index(worst)]
    count = sum(norm > limits.spike * median for norm in norms)
    number = (
        f"{count} of {len(norms)} steps above {limits.spike:g} times the median norm; the largest is "
        f"{worst / median:.0f} times, at step {at:g}"
    )
    kl = dict(zip(*run.series("gcpo/kl_causal"), strict=True))
    with_kl = bool(kl) and kl.get(at, 0.0) > 3 * statistics.median(kl.values())
    return Finding("gradient-norm spikes", number, _spike_change(run, with_kl))


def _spike_change(run: Run, with_kl: bool) -> str:
    kappa = run.config.get("kappa")
    if with_kl and kappa != 0 and (kappa is not None or run.values("gcpo/kl_causal")):
        clip = run.config.get("kl_clip")
        bound = "set `kl_clip` (3, say)" if clip is None else f"lower `kl_clip` ({clip:g} now)"
        return (
            "kl_causal spikes with it, as it does where the policy finds a token far less likely than p' does: "
            f"{bound}, which bounds what one token can pull, lower `kappa`"
            f"{'' if kappa is None else f' ({kappa:g} now)'} (the paper: 0.06), or raise `proj_floor`."
        )
    return "kl_causal does not spike with it: lower `learning_rate`, or `alpha`, which scales every advantage."


def _kl_clipped(run: Run, limits: Limits) -> Finding | None:
    shares = {name: run.recent_mean(f"gcpo/{name}") or 0.0 for name in ("kl_clipped", "kl_causal_clipped")}
    name = max(shares, key=lambda name: shares[name])
    if shares[name] <= limits.clamped:
        return None
    held_to = "the reference" if name == "kl_clipped" else "p'"
    return Finding(
        "clipped KL",
        f"{name}: the log-ratio to {held_to} is beyond kl_clip on {shares[name]:.0%} of the tokens (limit "
        f"{limits.clamped:.0%})",
        f"Beyond the clip there is no gradient, so those tokens are not held to {held_to}: raise `kl_clip`, or look "
        "for the reason why the two are so far apart (`learning_rate`, `context_prompt_template`).",
    )


def _length_collapse(run: Run, limits: Limits) -> Finding | None:
    lengths = run.values("completions/mean_length")
    if len(lengths) < _MIN_STEPS:
        return None
    quarter = len(lengths) // 4
    first, last = statistics.fmean(lengths[:quarter]), statistics.fmean(lengths[-quarter:])
    if first == 0 or last >= limits.length * first:
        return None
    return Finding(
        "length collapse",
        f"completions went from {first:.1f} to {last:.1f} tokens ({last / first:.0%}, limit {limits.length:.0%})",
        "The reward pays for short answers, or the policy left the reference: check the reward on an empty answer, "
        "raise `beta`, lower `learning_rate`, or use `loss_type='dr_grpo'`, which does not divide by length.",
    )


def _colliders(run: Run, limits: Limits) -> Finding | None:
    masked, ended = run.recent_mean("gcpo/colliders/masked"), run.recent_mean("gcpo/colliders/ended")
    without = run.recent_mean("gcpo/groups_without_colliders") or 0.0
    if without > limits.colliders and (masked or 0.0) <= limits.colliders:
        number = f"{without:.0%} of the groups have prompts that do not fit with theirs (limit {limits.colliders:.0%})"
        change = (
            "The model has too few positions: lower `candidate_context_tokens`, `num_generations` or "
            "`collider_max_completion_length`, or leave out the longest prompts."
        )
        return Finding("groups without colliders", number, change)
    if masked is not None and masked > limits.colliders:
        number = f"{masked:.0%} of the colliders are left out (limit {limits.colliders:.0%})"
    elif ended is not None and 1 - ended > limits.colliders:
        number = f"{1 - ended:.0%} of the colliders were cut off (limit {limits.colliders:.0%})"
    else:
        return None
    change = (
        "Raise `collider_max_completion_length`, ask for the answer alone, which short colliders have room for "
        "(`fusion_prompt_template='answer'`), or check the template with this model."
    )
    return Finding("colliders say little", number, change)


def _worthless_colliders(run: Run, limits: Limits) -> Finding | None:
    rows = [row for row in recent(run.log) if all(is_number(row.get(name)) for name in _BOTH_REWARDS)]
    if len(rows) < _MIN_STEPS:
        return None
    gain = interval([row[_BOTH_REWARDS[0]] - row[_BOTH_REWARDS[1]] for row in rows])
    candidates = statistics.fmean(row[_BOTH_REWARDS[1]] for row in rows)
    if gain.mean + gain.half >= 0 or gain.mean > -limits.collider_loss * abs(candidates):
        return None
    in_text = "" if run.config.get("collider_attention") == "full" else "after a text (`collider_attention='full'`), "
    change = (
        f"The integrated answers are worse than what they integrate: let them be written {in_text}with more tokens "
        "(`collider_max_completion_length`), or after a `fusion_prompt_template` that this model follows."
    )
    number = (
        f"colliders are rewarded {gain.mean:+.3f} ± {gain.half_text} beside the candidates' {candidates:.3f} "
        f"(limit -{limits.collider_loss:.0%})"
    )
    return Finding("colliders worse than candidates", number, change)


def _overhead(run: Run, limits: Limits) -> Finding | None:
    ratios = overheads(Run(run.name, log=run.log[1:] or run.log))  # the first step warms up
    if not ratios or statistics.median(ratios) <= limits.overhead:
        return None
    phases = {name: run.mean(f"gcpo/seconds/{name}") or 0.0 for name in _OWN_PHASES}
    if phases["collider_rewards"] == max(phases.values()):
        change = (
            "Most of it is spent on rewards of colliders: use `collider_choice='greedy'`, which needs none, and "
            "`log_collider_reward=False`."
        )
    elif phases["colliders"] >= phases["contexts"]:
        change = "Most of it is spent on colliders: lower `num_colliders` or `collider_max_completion_length`."
    elif run.config.get("estimator") == "sampled":
        change = "Most of it is spent under contexts, on fresh samples: use `estimator='loo'` or `'scored'`."
    else:
        change = (
            "Most of it is spent under contexts: lower `num_kl_contexts`, `kl_fraction` or `candidate_context_tokens`, "
            "or use `context_attention='parallel'`."
        )
    number = f"a step takes {statistics.median(ratios):.2f} times GRPO's part of it (plan {limits.overhead:g})"
    return Finding("overhead above plan", number, change)


def _undefined(run: Run, limits: Limits) -> Finding | None:
    fallback, lost = run.mean("gcpo/upsilon/fallback"), run.mean("gcpo/groups_without_reward")
    if fallback:
        number = f"{fallback:.1%} of the weights were undefined and replaced by 1"
        change = "Hidden states are NaN: train in bfloat16 or float32, not float16."
        if run.config.get("weight_scale") == "unit":
            change += (
                " Or their mean is not above 0, so that `weight_scale='unit'` cannot divide by it: then all weights of "
                "the batch are 1. `gcpo/upsilon/mean` tells; try another `representation`, or `weight_scale='alpha'`."
            )
        return Finding("undefined weights", number, change)
    if lost:
        return Finding(
            "groups without reward",
            f"{lost:.1%} of the groups have no finite reward",
            "The reward function returns None, NaN or infinity for whole groups: check it on their completions.",
        )
    return None


def _share_above(metric: str, limit: str, name: str, number: str, change: str) -> Check:
    """A check that a share stays below the limit of that name; `number` is filled with both, and the mean reward."""

    def check(run: Run, limits: Limits) -> Finding | None:
        share, most = run.recent_mean(metric), getattr(limits, limit)
        if share is None or share <= most:
            return None
        reward = run.recent_mean("reward") or 0.0
        return Finding(name, number.format(share=share, limit=most, reward=reward), change)

    return check


CHECKS: tuple[Check, ...] = (
    _near_zero,
    _no_signal,
    _no_pull,
    _spikes,
    _share_above(
        "gcpo/proj_clamped",
        "clamped",
        "clamped p'",
        "p' left [proj_floor, 1] on {share:.0%} of the tokens (limit {limit:.0%})",
        "The second KL pulls to a clamp, not to a distribution: contexts disagree with the query about most tokens. "
        "Check `context_prompt_template` and `proj_floor` (default 1e-6), show more of the candidates "
        "(`candidate_context_tokens`), or lower `kappa`.",
    ),
    _kl_clipped,
    _share_above(
        "frac_reward_zero_std",
        "zero_variance",
        "zero-variance groups",
        "{share:.0%} of the groups have equal rewards, so advantage 0 (limit {limit:.0%}); mean reward {reward:.3g}",
        "Prompts are too easy or too hard, or the reward does not tell answers apart: choose other prompts or a graded "
        "reward, raise `num_generations` or `temperature`.",
    ),
    _length_collapse,
    _share_above(
        "completions/clipped_ratio",
        "cut_off",
        "completions cut off",
        "{share:.0%} reached the length limit (limit {limit:.0%})",
        "Their last token is not an end, which is most of what Upsilon sees with `representation='last'`: raise "
        "`max_completion_length`, or use `representation='mean'`. `mask_truncated_completions` takes them out of the "
        "loss, but not out of the weights.",
    ),
    _colliders,
    _worthless_colliders,
    _overhead,
    _undefined,
)
