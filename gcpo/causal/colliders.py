"""
Colliders: the integrated answers that the policy writes after being shown all candidates of a prompt.

A drawing has three parts: `start` and `finish` are for all processes together, `decode` is each one's own, and may run
in a thread beside something else.
"""

import random
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from gcpo.causal.answers import checked_outputs
from gcpo.causal.contexts import NoFusionTurn, PromptBuilder
from gcpo.causal.options import CausalOptions
from gcpo.causal.parallel import GroupReading, collider_rows, known_readings, read_groups
from gcpo.causal.port import Continuation, Group, Ids, Policy, Rollout, share

_CHOICE = 303  # a draw's purpose, as those of gcpo.causal.step


@dataclass
class Drawing:
    """
    The colliders of a rollout, on their way.

    Attributes:
        groups: of all processes; their colliders are filled in by `finish`.
        seed: of all draws.
        asked: numbers of the groups that have colliders; the others' prompts do not fit.
        rows: what this process decodes after.
        greedy: which of those rows are decoded greedily.
        parallel: whether rows continue keys and values, rather than being whole prompts.
        found: those keys and values.
        at_once: most rows of a call.
        outputs: what this process has decoded.
    """

    policy: Policy
    options: CausalOptions
    builder: PromptBuilder
    groups: list[Group]
    seed: int
    at_once: int
    asked: list[int] = field(default_factory=list)
    rows: list[Continuation] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    parallel: bool = False
    found: dict[int, GroupReading] = field(default_factory=dict)
    outputs: list[Ids] | None = None

    @classmethod
    def start(
        cls, policy: Policy, options: CausalOptions, builder: PromptBuilder, rollout: Rollout, seed: int
    ) -> "Drawing":
        """Gather the groups of all processes and find out what this one decodes; processes share the work evenly."""
        n = policy.num_generations
        prompts = policy.gather_lists(rollout.prompts)[::n]
        prompt_ids = policy.gather_lists(rollout.prompt_ids)[::n]
        completions = policy.gather_lists(rollout.completion_ids)
        groups = [
            Group(prompt, ids, completions[p * n : (p + 1) * n], [], [])
            for p, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
        ]
        drawing = cls(policy, options, builder, groups, seed, at_once=len(rollout.prompts))
        drawing._plan(rollout)
        return drawing

    @property
    def limit(self) -> int:
        """Most tokens of a collider."""
        return self.options.collider_limit(self.policy.max_completion_length)

    def _plan(self, rollout: Rollout) -> None:
        self.parallel = self._is_parallel()
        if self.parallel:
            lengths = [self._parallel_length(group) for group in self.groups]
            prompts: list[list[Ids]] = []
        else:
            prompts = self._fusion_prompts()
            lengths = [max(map(len, of_group)) for of_group in prompts]
        positions = self.policy.max_positions
        room = None if positions is None else positions - self.limit
        self.asked = [p for p, length in enumerate(lengths) if room is None or length <= room]
        if len(self.asked) < len(lengths):
            warn_of_length(max(lengths) + self.limit, positions, "A fusion prompt with its collider")
        tasks = [(p, l) for p in self.asked for l in range(self.options.num_colliders)]
        if not tasks:
            return
        local = share(tasks, self.policy)
        self.greedy = [self.options.collider_choice == "greedy" and l == 0 for _, l in local]
        if self.parallel:
            self.found = self._read(rollout, {p for p, _ in local})
            shown = self.options.candidate_context_tokens
            groups = dict(enumerate(self.groups))
            self.rows = collider_rows(self.builder, groups, self.found, [p for p, _ in local], shown)
        else:
            self.rows = [Continuation([], prompts[p][l], 0) for p, l in local]

    def _fusion_prompts(self) -> list[list[Ids]]:
        """Of each group, a prompt for each collider; the same one L times unless candidates are shuffled."""
        draw, colliders = random.Random(self.seed), range(self.options.num_colliders)
        found = []
        for group in self.groups:
            if self.options.shuffle_candidates:
                orders = [draw.sample(group.candidates, len(group.candidates)) for _ in colliders]
                found.append([self.builder.fusion(group.prompt, shown) for shown in orders])
            else:
                found.append([self.builder.fusion(group.prompt, group.candidates)] * len(colliders))
        return found

    def _is_parallel(self) -> bool:
        options = self.options
        if not (options.prefers_parallel_colliders and self.policy.can_decode):
            return False
        if options.collider_attention == "parallel":
            return True
        # By default where all groups can be asked so, and leave room for it.
        positions = self.policy.max_positions
        try:
            longest = max(map(self._parallel_length, self.groups))
        except NoFusionTurn:
            return False
        return positions is None or longest + self.limit <= positions

    def _parallel_length(self, group: Group) -> int:
        """Position behind the text that a parallel collider follows."""
        longest = max(map(len, group.candidates))
        return len(group.prompt_ids) + longest + len(self.builder.fusion_turn(group.prompt))

    def _read(self, rollout: Rollout, groups: set[int]) -> dict[int, GroupReading]:
        """Keys and values of the candidates of these groups: the rollout's own, and what has to be read for it."""
        policy, n = self.policy, self.policy.num_generations
        known = known_readings(policy, rollout)
        candidates = [(p, k) for p in sorted(groups) for k in range(n)]
        return read_groups(policy, {p: self.groups[p] for p in groups}, known, candidates, [])

    def decode(self) -> None:
        """
        Decode this process's colliders, at most as many at once as the rollout had rows. It asks other processes for
        nothing but what a forward of the model does.
        """
        policy, outputs = self.policy, []
        for number, start in enumerate(range(0, len(self.rows), self.at_once)):
            part = slice(start, start + self.at_once)
            rows, some = self.rows[part], self.greedy[part]
            settings: dict[str, Any] = {"limit": self.limit, "temperature": self.options.collider_temperature}
            if self.options.collider_choice == "greedy":
                settings["greedy"] = some
            seed = self.seed + policy.rank + 7_919 * number
            if self.parallel:
                outputs += checked_outputs("decode", policy.decode(rows, seed, **settings), len(rows))
            else:
                prompts = [row.ids for row in rows]
                outputs += checked_outputs("generate", policy.generate(prompts, seed, **settings), len(rows))
        self.rows, self.outputs = [], outputs

    def finish(self, inputs: list[dict[str, Any]]) -> list[Group]:
        """
        The groups with their colliders, c_0 first.

        A collider without content (special tokens only), or cut off where those are masked, is kept, marked, and put
        behind the others, so that c_0, which every estimate leans on, is one that says something wherever there is one.
        A group whose prompt did not fit has colliders without content.

        Args:
            inputs: the dataset rows of this process's candidates, for rewards.
        """
        assert self.outputs is not None, "`decode` comes first"
        options, count = self.options, self.options.num_colliders
        outputs = self.policy.gather_lists(self.outputs)[: len(self.asked) * count]
        drawn = {p: outputs[k * count : (k + 1) * count] for k, p in enumerate(self.asked)}
        for p, group in enumerate(self.groups):
            nothing = [self.policy.eos_token_ids[:1] for _ in range(count)]
            group.colliders = sorted(drawn.get(p, nothing), key=lambda ids: not self._counts(ids))  # stable
            group.has_content = list(map(self._counts, group.colliders))
        self._log()
        if options.rewards_colliders and self.asked:
            with self.policy.phase("collider_rewards"):
                self._reward(inputs)
        return self.groups

    def _counts(self, collider: Ids) -> bool:
        if not self.builder.content(collider):
            return False
        return not self.options.mask_truncated_colliders or collider[-1] in self.policy.eos_token_ids

    def _log(self) -> None:
        """Count the colliders' tokens, and log how long they are, how many ended, and how many are left out."""
        policy, groups = self.policy, [self.groups[p] for p in self.asked]
        colliders = [ids for group in groups for ids in group.colliders]
        content = [flag for group in groups for flag in group.has_content]
        lengths = torch.tensor([len(ids) for ids in colliders], dtype=torch.float32)
        ended = [ids[-1] in policy.eos_token_ids for ids in colliders if ids]
        if policy.rank == 0:  # token counts are summed over processes
            policy.count("generated_colliders", int(lengths.sum()))
        if colliders:
            policy.log("colliders/mean_length", lengths.mean())
            policy.log("colliders/ended", sum(ended) / len(content))
            policy.log("colliders/masked", 1.0 - sum(content) / len(content))

    def _reward(self, inputs: list[dict[str, Any]]) -> None:
        """Reward the colliders, those without content too, log what that says, and choose c_0 by it where asked to."""
        groups = [self.groups[p] for p in self.asked]
        rewards = reward_colliders(self.policy, self.options, inputs, self.groups, self.asked)  # (groups, L)
        self.policy.log("colliders/reward", float(rewards[rewards.isfinite()].mean()))
        if self.options.collider_choice == "reward":
            draw = random.Random(self.seed + _CHOICE)
            for k, group in enumerate(groups):
                first = _best(rewards[k].tolist(), group.has_content, draw)
                order = [first, *(l for l in range(len(group.colliders)) if l != first)]
                group.colliders = [group.colliders[l] for l in order]  # the first counts, as it did before
                rewards[k] = rewards[k, order]
        above = []
        for group, row in zip(groups, rewards, strict=True):
            count = torch.tensor(group.has_content, device=row.device) & row.isfinite()
            if count[0] and count[1:].any():
                above.append(bool(row[0] > row[1:][count[1:]].mean()))
        self.policy.log("colliders/first_above", sum(above) / len(above) if above else float("nan"))


def reward_colliders(
    policy: Policy, options: CausalOptions, inputs: list[dict[str, Any]], groups: list[Group], asked: list[int]
) -> torch.Tensor:
    """
    Rewards (len(asked), L) of the colliders of these groups; NaN: there is none. Processes share the work.

    Raises:
        RuntimeError: a reward function cannot score colliders.
    """
    rows = policy.gather_lists(inputs)[:: policy.num_generations]
    tasks = [(rows[p], groups[p].prompt, ids) for p in asked for ids in groups[p].colliders]
    local = share(tasks, policy)
    try:
        rewards = policy.reward(
            [row for row, _, _ in local], [prompt for _, prompt, _ in local], [y for _, _, y in local]
        )
    except Exception as error:
        by = "`collider_choice='reward'`" if options.collider_choice == "reward" else "`log_collider_reward=True`"
        off = "collider_choice='sample'" if options.collider_choice == "reward" else "log_collider_reward=False"
        raise RuntimeError(
            f"{error} This was on colliders, plain completions of the same prompts, which {by} rewards too: let the "
            f"reward function score them, or switch that off with `{off}`."
        ) from error
    return rewards[: len(tasks)].view(len(asked), -1)


def _best(rewards: list[float], counts: list[bool], draw: random.Random) -> int:
    """Which collider that counts has the highest reward, drawn among equals; the first where none has any."""
    rewarded = [(reward, l) for l, reward in enumerate(rewards) if counts[l] and reward == reward]
    best = [l for reward, l in rewarded if reward == max(rewarded)[0]]
    return draw.choice(best) if best else 0


def warn_of_length(tokens: int, positions: int | None, what: str) -> None:
    """Say that some groups do without colliders."""
    warnings.warn(
        f"{what} needs {tokens} tokens, more than the model's {positions} positions: groups like this one are trained "
        "without colliders (`gcpo/groups_without_colliders` counts them). Lower `candidate_context_tokens` (how much "
        "of each candidate is shown), `collider_max_completion_length`, `num_generations` or `max_completion_length`, "
        "or leave the prompt out.",
        stacklevel=2,
    )
