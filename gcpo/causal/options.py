"""The options of the method, which need no trainer, and the checks that they are of use."""

import string
from dataclasses import dataclass, field
from typing import Any

from gcpo_kernels.options import BASELINES, SIMILARITIES, check_choice, check_count, check_number

ESTIMATORS = ("loo", "scored", "sampled", "none")
REPRESENTATIONS = ("last", "mean")
POLICY_CONTEXTS = ("query", "context")
CONTEXT_ATTENTIONS = COLLIDER_ATTENTIONS = ("full", "parallel")
COLLIDER_CHOICES = ("sample", "greedy", "reward")
KL_TARGETS = ("projection", "context", "ensemble")
WEIGHT_SCALES = ("alpha", "unit")

_SHOWN = (
    "{question}\n\n"
    "Below are candidate answers to the question above, written independently of each other.\n\n"
    "{candidates}\n\n"
)
# What asks for an integrated answer, by name.
FUSION_PROMPTS = {
    "integrate": _SHOWN
    + "Integrate them into one final answer: keep what is right, correct what is wrong, and answer the question.",
    "answer": _SHOWN
    + "Which final answer do they support, once their mistakes are corrected? Give that answer alone, in the form that "
    "the question asks for, without steps or explanations.",
}
CONTEXT_PROMPT_TEMPLATE = (
    "{question}\n\n"
    "Below are candidate answers to the question above, written independently of each other.\n\n"
    "{candidates}\n\n"
    "Integrated, they gave this final answer:\n{collider}\n\n"
    "Write one more candidate answer to the question."
)
CANDIDATE_TEMPLATE = "Candidate {index}:\n{candidate}"


def option(default: Any, help: str) -> Any:
    """A field of a dataclass that a command-line parser explains with `help`."""
    return field(default=default, metadata={"help": help})


@dataclass
class CausalOptions:
    """
    Options of the causal step, whoever takes it.

    Symbols are the paper's (arXiv 2508.05428): n candidates y_i per prompt q, L = `num_colliders` integrated answers
    c_l per prompt, x_{i,l} = {q, every candidate but y_i, c_l}.

    Parameters:
        alpha (`float`, *optional*, defaults to `2.0`):
            Scale of the causal weight, Upsilon_i = alpha * s(z_i, t_i) (eq. 11).
        kappa (`float`, *optional*, defaults to `0.06`):
            Weight of the KL term towards the causally projected reference (eq. 12). `0.0` turns the term off, and
            with it the forwards that score the candidates under the contexts x_{i,l}.
        estimator (`str`, *optional*, defaults to `"loo"`):
            How the representations under x_{i,l} are estimated: `"loo"`, in closed form from the candidates and the
            colliders; `"scored"`, the hidden state of y_i itself under every x_{i,l}; `"sampled"`, the paper's:
            those of `num_estimator_samples` fresh outputs generated under every x_{i,l}; `"none"`, Upsilon = 1, which
            turns the weighting of advantages off. `kappa=0` with `estimator="none"` is GRPO, at GRPO's cost.
        representation (`str`, *optional*, defaults to `"last"`):
            z of a completion: `"last"`, the last layer's hidden state (after the final norm) of its last token, as in
            the paper; `"mean"`, the mean over its tokens.
        baseline (`str`, *optional*):
            `"mean"`, zbar = mean_k z_k (the paper), or `"loo"`, the mean over the other candidates. Defaults to
            `"loo"` with `estimator="loo"` and to `"mean"` otherwise.
        similarity (`str`, *optional*, defaults to `"cosine"`):
            s of eq. 11: `"cosine"`, `"euclidean"` or `"gaussian"` (the paper's ablation, on unit vectors).
        num_colliders (`int`, *optional*, defaults to `4`):
            L, the integrated answers generated per prompt (the paper: L = n). With one, the projection's two terms
            cancel and only the leave-one-out weighting and a KL term to the old policy remain.
        collider_max_completion_length (`int`, *optional*):
            Most tokens of an integrated answer. Defaults to a 32nd of the candidates' most tokens, but at least 16 and
            at most 256: min(256, max(16, max_completion_length // 32)). They are decoded one after the other, each for
            nearly the price of a step of the rollout.
        collider_choice (`str`, *optional*, defaults to `"sample"`):
            Which collider is c_0, whose context x_{i,0} stands out in eqs. 11 and 13: `"sample"`, the first one drawn
            (the paper), which comes from the same distribution as the others, so that over draws E[p'] = pi(y | q) and
            the second KL term pulls to nothing new; `"greedy"`, one that is decoded greedily, the others sampled;
            `"reward"`, the one with the highest reward, drawn among equals, for which the reward functions run on the
            colliders too.
        collider_attention (`str`, *optional*):
            What colliders are decoded after: `"full"`, the text of a fusion prompt; `"parallel"`, the keys and values
            that the candidates were generated with, each of which saw the query and itself alone, and what the fusion
            prompt says behind the candidates: a few dozen tokens to read instead of the whole prompt. Needs what
            `context_attention="parallel"` needs, and generation by transformers in this process, words behind
            `{candidates}` in the template, and a chat template that lets a user speak after an answer. `None`:
            `"parallel"` where contexts are and that holds, `"full"` otherwise.
        candidate_context_tokens (`int`, *optional*, defaults to `64`):
            How many tokens of each candidate a prompt (or a parallel context) shows, counted from its end, where the
            answer stands. `None`: all of them, as in the paper.
        fusion_prompt_template (`str`, *optional*):
            What asks for an integrated answer: a text that holds `{question}` and `{candidates}`, or the name of one:
            `"integrate"` (the default), or `"answer"`, which asks for the answer alone, as short colliders need it.
        context_prompt_template (`str`, *optional*):
            What the candidate y_i is scored after: the context x_{i,l}. Must hold `{question}`, `{candidates}` and
            `{collider}`.
        candidate_template (`str`, *optional*):
            How one candidate is shown in either. Must hold `{candidate}`, may hold `{index}`.
        kl_target (`str`, *optional*, defaults to `"projection"`):
            What the second KL term pulls to: `"projection"`, p' = a - mean_l b_l + pi(y | q) (eq. 13); `"context"`, a,
            the policy under x_{i,0}; `"ensemble"`, mean_l b_l, the policy under all x_{i,l}. For comparison: each of
            the latter is a distribution, and pulls to what the final answer, or an average one, makes likely.
        weight_scale (`str`, *optional*, defaults to `"alpha"`):
            `"alpha"`, Upsilon as in eq. 11; `"unit"`, divided by its mean over the batch, so that its mean is 1 and the
            step as long as GRPO's: a direction, not a step size. Both are logged.
        proj_floor (`float`, *optional*, defaults to `1e-6`):
            p' is clamped to [proj_floor, 1] (eq. 13); with `kl_clip`, to [min(proj_floor, pi(y | q)), 1].
        kl_clip (`float`, *optional*):
            Bound on the log-ratio of both KL terms, log pi_ref - log pi_theta and log p' - log pi_theta: beyond
            [-kl_clip, kl_clip] it counts as the bound, with gradient 0. k3's gradient, 1 - p'/pi_theta, has no bound
            where pi_theta is tiny, so that one token can make most of a step. With a bound, p' may also be as small as
            pi(y | q) where that is below `proj_floor`: a token that every context finds as unlikely as the query does
            is then not pulled at all. `None`: no bound, as in the paper.
        context_batch_size (`int`, *optional*):
            Rows per forward when scoring under contexts, which are longer than prompts. Defaults to
            `per_device_train_batch_size` in a trainer, and to what a `ModelPolicy` is given.
        context_attention (`str`, *optional*):
            `"full"`: a context is one text and its candidates attend to each other, the paper's reading.
            `"parallel"`, cheaper, another estimate: candidates and colliders are read once, each attending to q and
            itself, and a copy of y_i attends to q, the other candidates, one collider and itself. Needs what
            `share_prefix` needs, and raises without. `None`: `"parallel"` where the model allows it, but `"full"` with
            `estimator="sampled"` or `causal_policy_context="context"`, which need the text, and with a `kl_target` that
            pulls to what contexts say: a model that knows texts alone may find the opposite in parallel ones
            (docs/studies.md).
        num_kl_contexts (`int`, *optional*, defaults to `1`):
            S: score each candidate under x_{i,0} and S others, drawn anew every step, instead of all L - 1. The
            gradient's expectation stays the same (but for the clamp of p'), its variance grows. `None`: all of them,
            as `estimator="scored"` does in any case.
        kl_fraction (`float`, *optional*, defaults to `0.25`):
            Share of the candidates that the second KL term is computed on, drawn anew every step; the term is scaled
            by its inverse. What is not drawn is not scored. `estimator="scored"` takes all in any case.
        causal_policy_context (`str`, *optional*, defaults to `"query"`):
            What pi_theta is conditioned on in the second KL term: `"query"`, q, which reuses the policy's own forward;
            `"context"`, x_i, the paper's form, at the price of a second forward and backward per candidate.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Pass what contexts (and prompts) begin with through the model once: the same scores within float error,
            from fewer tokens. Needs a model without sliding windows; others score contexts one by one, with a warning.
        pack_tokens (`int`, *optional*, defaults to `1024`):
            Contexts are packed into rows of this many tokens, where that is at least twice the longest of them and
            attention is `sdpa`, `eager` or `flex_attention`. Attention over a row costs its square, so longer contexts
            are read level by level instead, each looking back at keys and values that it shares with others.
        reuse_rollout (`bool`, *optional*, defaults to `True`):
            Where the model generates in this process (no vLLM), take the candidates' representations, and for parallel
            contexts their keys and values, from the generation itself instead of reading the candidates again; those
            of outputs sampled under contexts too. Keeps the generation's key/value cache until contexts are scored.
        num_estimator_samples (`int`, *optional*, defaults to `1`):
            m, outputs generated under every context by `estimator="sampled"`. The other estimators generate none.
        mask_truncated_colliders (`bool`, *optional*, defaults to `False`):
            Leave integrated answers that were cut off at their length limit out of every mean, as empty ones are.
        shuffle_candidates (`bool`, *optional*, defaults to `False`):
            Show the candidates of a fusion prompt in an order of its own for every collider. Each collider then has a
            prompt of its own, which is read for it alone: L prefills of a fusion prompt instead of one. Under
            `collider_attention="parallel"` candidates have no order, so that it excludes this.
        collider_temperature (`float`, *optional*):
            Sampling temperature of the colliders. `None`: that of the candidates.
        log_collider_reward (`bool`, *optional*, defaults to `False`):
            Run the reward functions on the integrated answers too and log their mean as `gcpo/colliders/reward`, to
            hold against `reward`. It changes nothing in training.

    Raises:
        TypeError, ValueError: naming the option, what it got and what it wants.
    """

    alpha: float = option(2.0, "Scale of the causal weight Upsilon.")
    kappa: float = option(0.06, "Weight of the KL term to the causal reference. 0: off.")
    estimator: str = option(
        "loo", "Estimator of the causal weight: 'loo', 'scored', 'sampled', or 'none' (Upsilon = 1)."
    )
    representation: str = option(
        "last", "z of a completion: hidden state of its 'last' token, or 'mean' over its tokens."
    )
    baseline: str | None = option(
        None, "Group baseline zbar: 'mean' (paper) or 'loo'. Default: 'loo' for estimator 'loo'."
    )
    similarity: str = option("cosine", "Similarity of eq. 11: 'cosine', 'euclidean' or 'gaussian'.")
    num_colliders: int = option(4, "Integrated answers generated per prompt (L).")
    collider_max_completion_length: int | None = option(
        None, "Most tokens of an integrated answer. Default: min(256, max(16, max_completion_length // 32))."
    )
    collider_choice: str = option("sample", "Which collider is c_0: a 'sample', a 'greedy' one, or by 'reward'.")
    collider_attention: str | None = option(
        None, "'full', or 'parallel': decode colliders on the candidates' keys and values. None: where possible."
    )
    candidate_context_tokens: int | None = option(
        64, "Tokens of each candidate that a prompt shows, from its end. None: all."
    )
    fusion_prompt_template: str = option(
        FUSION_PROMPTS["integrate"],
        "Prompt for an integrated answer, with {question} and {candidates}; or 'integrate' or 'answer'.",
    )
    context_prompt_template: str = option(
        CONTEXT_PROMPT_TEMPLATE, "Context a candidate is scored under; holds {question}, {candidates} and {collider}."
    )
    candidate_template: str = option(
        CANDIDATE_TEMPLATE, "How one candidate is shown; holds {candidate}, may hold {index}."
    )
    kl_target: str = option("projection", "What the second KL pulls to: 'projection', 'context' or 'ensemble'.")
    weight_scale: str = option("alpha", "Scale of Upsilon: 'alpha' (paper), or 'unit': its mean is 1.")
    proj_floor: float = option(1e-6, "Lower clamp of the projected probability p'.")
    kl_clip: float | None = option(None, "Bound on the log-ratio of both KL terms; gradient 0 beyond. None: no bound.")
    context_batch_size: int | None = option(
        None, "Rows per forward when scoring under contexts. Default: per_device_train_batch_size."
    )
    context_attention: str | None = option(
        None,
        "'full', or 'parallel': read each candidate once. None: 'parallel' where possible, for kl_target 'projection'.",
    )
    num_kl_contexts: int | None = option(1, "Contexts drawn per candidate beside the first. None: all are scored.")
    kl_fraction: float = option(0.25, "Share of candidates drawn for the second KL term.")
    causal_policy_context: str = option("query", "pi_theta in the second KL: under 'query' or 'context'.")
    share_prefix: bool = option(True, "Pack contexts that begin alike, so that the beginning is scored once.")
    pack_tokens: int = option(1024, "Tokens of a packed row.")
    reuse_rollout: bool = option(True, "Take representations (and keys and values) from the generation itself.")
    num_estimator_samples: int = option(1, "Outputs generated under every context by estimator 'sampled'.")
    mask_truncated_colliders: bool = option(
        False, "Leave integrated answers that hit their length limit out of every mean."
    )
    shuffle_candidates: bool = option(False, "Shuffle the candidates of a fusion prompt, for every collider anew.")
    collider_temperature: float | None = option(
        None, "Sampling temperature of the colliders. None: that of the candidates."
    )
    log_collider_reward: bool = option(False, "Log the mean reward of the integrated answers too.")

    def __post_init__(self) -> None:
        if isinstance(self.fusion_prompt_template, str):
            self.fusion_prompt_template = FUSION_PROMPTS.get(self.fusion_prompt_template, self.fusion_prompt_template)
        self.check()

    def collider_limit(self, max_completion_length: int | None) -> int:
        """Most tokens of a collider, where candidates have at most `max_completion_length`. None: without a limit."""
        if self.collider_max_completion_length is not None:
            return self.collider_max_completion_length
        return 256 if max_completion_length is None else min(256, max(16, max_completion_length // 32))

    @property
    def group_baseline(self) -> str:
        """`baseline`, or what follows from the estimator."""
        return self.baseline or ("loo" if self.estimator == "loo" else "mean")

    @property
    def uses_weights(self) -> bool:
        """Whether advantages are multiplied by Upsilon."""
        return self.estimator != "none"

    @property
    def prefers_parallel(self) -> bool:
        """Whether contexts are scored in parallel, if the model can."""
        if self.context_attention is None:
            of_text = self.estimator == "sampled" or self.causal_policy_context == "context"
            return self.scores_contexts and not of_text and self.kl_target == "projection"
        return self.scores_contexts and self.context_attention == "parallel"

    @property
    def prefers_parallel_colliders(self) -> bool:
        """Whether colliders are decoded after keys and values, where those are at hand."""
        if self.collider_attention is None:
            return self.prefers_parallel and not self.shuffle_candidates
        return self.collider_attention == "parallel"

    @property
    def rewards_colliders(self) -> bool:
        """Whether the reward functions run on colliders."""
        return self.log_collider_reward or self.collider_choice == "reward"

    @property
    def drawn_contexts(self) -> int | None:
        """`num_kl_contexts`, as far as the estimator and the target leave a choice."""
        if self.estimator == "scored":
            return None
        return 0 if self.kl_target == "context" else self.num_kl_contexts

    @property
    def drawn_fraction(self) -> float:
        """`kl_fraction`, as far as the estimator leaves a choice."""
        return 1.0 if self.estimator == "scored" else self.kl_fraction

    @property
    def uses_rollout_states(self) -> bool:
        """Whether a step has use for the states, keys and values that generating the candidates leaves."""
        return self.uses_weights or self.prefers_parallel or self.collider_attention == "parallel"

    @property
    def scores_contexts(self) -> bool:
        """Whether candidates are scored under the contexts x_{i,l}."""
        return self.kappa > 0 or self.estimator == "scored"

    @property
    def uses_contexts(self) -> bool:
        """Whether the contexts x_{i,l} are built: to score candidates under them, or to sample from them."""
        return self.scores_contexts or self.estimator == "sampled"

    @property
    def is_causal(self) -> bool:
        """Whether a step does anything that GRPO's does not."""
        return self.uses_weights or self.kappa > 0

    def check(self) -> None:
        """Refuse values that the step cannot work with."""
        check_number("alpha", self.alpha)
        check_number("kappa", self.kappa, low=0.0)
        check_number("kl_fraction", self.kl_fraction, above=0.0, high=1.0)
        check_number("proj_floor", self.proj_floor, above=0.0, below=1.0)
        for name in ("kl_clip", "collider_temperature"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0.0)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("representation", self.representation, REPRESENTATIONS)
        check_choice("similarity", self.similarity, SIMILARITIES)
        check_choice("causal_policy_context", self.causal_policy_context, POLICY_CONTEXTS)
        check_choice("collider_choice", self.collider_choice, COLLIDER_CHOICES)
        check_choice("kl_target", self.kl_target, KL_TARGETS)
        check_choice("weight_scale", self.weight_scale, WEIGHT_SCALES)
        if self.baseline is not None:
            check_choice("baseline", self.baseline, BASELINES)
        if self.context_attention is not None:
            check_choice("context_attention", self.context_attention, CONTEXT_ATTENTIONS)
        if self.collider_attention is not None:
            check_choice("collider_attention", self.collider_attention, COLLIDER_ATTENTIONS)
        for name in ("num_colliders", "num_estimator_samples", "pack_tokens"):
            check_count(name, getattr(self, name))
        for name in (
            "candidate_context_tokens",
            "collider_max_completion_length",
            "context_batch_size",
            "num_kl_contexts",
        ):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        _check_template("fusion_prompt_template", self.fusion_prompt_template, {"question", "candidates"})
        _check_template("context_prompt_template", self.context_prompt_template, {"question", "candidates", "collider"})
        _check_template("candidate_template", self.candidate_template, {"candidate"}, optional={"index"})
        if self.context_attention == "parallel" and self.causal_policy_context != "query":
            raise ValueError("`context_attention='parallel'` needs `causal_policy_context='query'`, got 'context'.")
        if self.context_attention == "parallel" and self.estimator == "sampled":
            raise ValueError(
                "`context_attention='parallel'` has no text to sample from: not with `estimator='sampled'`."
            )
        if self.collider_attention == "parallel" and self.shuffle_candidates:
            raise ValueError(
                "`collider_attention='parallel'` shows candidates side by side, in no order: not with "
                "`shuffle_candidates=True`."
            )


def _check_template(name: str, template: Any, required: set[str], optional: frozenset[str] | set[str] = frozenset()):
    if not isinstance(template, str):
        raise TypeError(f"`{name}` must be a string, got {type(template).__name__}.")
    try:
        fields = {key for _, key, _, _ in string.Formatter().parse(template) if key is not None}
    except ValueError as error:
        raise ValueError(f"`{name}` is not a valid format string ({error}); write a literal brace twice.") from error
    missing, unknown = required - fields, fields - required - optional
    repeated = name == "candidate_template" and template.count("{candidate}") != 1
    if missing or unknown or repeated:
        named = ", ".join("{" + key + "}" for key in sorted(required))
        got = ", ".join("{" + key + "}" for key in sorted(fields)) or "none"
        once = " exactly once" if repeated else ""
        names = f", or be one of {', '.join(FUSION_PROMPTS)}" if name == "fusion_prompt_template" else ""
        raise ValueError(f"`{name}` must hold the placeholders {named}{once}{names}, got {got}.")
