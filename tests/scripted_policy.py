"""A policy without a model, whose answers are given: colliders by a list, scores by a function of token ids."""

import random
import threading
from contextlib import nullcontext

import torch

from gcpo.causal.port import Continuation, Reading

END = 0  # the end token
HIDDEN = 6


def scores_of(seen: list[int], completion: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (T,) and a representation (H,) that depend on all that is seen, and on nothing else."""
    draw = random.Random(f"{seen}{completion}")
    logp = torch.tensor([-3 * draw.random() for _ in completion])
    return logp, torch.tensor([draw.gauss(0, 1) for _ in range(HIDDEN)])


class ListBuilder:
    """Prompts that are what they show, one after the other, with the end tokens taken out."""

    def content(self, ids):
        return [token for token in ids if token != END]

    def fusion(self, prompt, candidates):
        return [*prompt, 90, *(token for ids in candidates for token in self.content(ids))]

    def context(self, prompt, candidates, collider):
        return [*self.fusion(prompt, candidates), 91, *self.content(collider)]


class World:
    """Processes that are threads: what each brings to a collective call is seen by all."""

    def __init__(self, size: int = 1):
        self.size = size
        self._slots: list = [None] * size
        self._barrier = threading.Barrier(size)

    def exchange(self, rank: int, value):
        self._slots[rank] = value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def run(self, task) -> list:
        """`task(rank)` of every process."""
        found, errors = [None] * self.size, []

        def one(rank):
            try:
                found[rank] = task(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return found


class ScriptedPolicy:
    """
    Args:
        options: of the method.
        colliders: what `generate` returns for all processes together, in the order asked for.
        can_continue: whether contexts may be parallel ones, and prefixes shared.
    """

    max_completion_length, max_positions, hidden_size = 8, None, HIDDEN
    name, device = "scripted", torch.device("cpu")
    eos_token_ids = ending_ids = [END]
    step_seed = 11

    def __init__(self, options, num_generations, colliders, *, can_continue=False, world=None, rank=0, **changed):
        self.options, self.num_generations, self.colliders = options, num_generations, colliders
        self.can_continue, self.world, self.rank = can_continue, world or World(), rank
        self.shares = options.share_prefix and can_continue
        self.masks_truncated, self.allows_nan = False, False
        self.logged: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.asked: list[list[int]] = []  # prompts that `generate` got
        self.__dict__.update(changed)

    @property
    def size(self):
        return self.world.size

    can_decode = False

    def generate(self, prompts, seed, *, limit, temperature, greedy=None):
        self.asked += prompts
        start = self.rank * len(prompts)
        return [self.colliders[min(start + k, len(self.colliders) - 1)] for k in range(len(prompts))]

    def sample_states(self, prompts, seed, rows):
        outputs = [[7, END] for _ in prompts]
        return outputs, torch.stack([scores_of(x, y)[1] for x, y in zip(prompts, outputs, strict=True)])

    def score(self, prompts, completions, length, tokens):
        logp = torch.zeros(len(prompts), length)
        z = []
        for row, x, y in zip(logp, prompts, completions, strict=True):
            scores, state = scores_of(x, y)
            row[: len(y)] = scores[:length]
            z.append(state)
        return logp, torch.stack(z)

    def read(self, rows: list[Continuation], keep=False):
        """Keys are the token ids themselves."""
        readings = []
        for row in rows:
            seen = [int(token) for piece in row.past if piece for token in piece[0][0][0]]
            logp, z = scores_of([*seen, row.ids[0]], row.ids[1:])
            own = torch.tensor([row.ids])
            readings.append(Reading(logp, z, [(own, own)] if keep else []))
        return readings

    def reward(self, inputs, prompts, ids):
        return self.gather(torch.tensor([float(len(y)) for y in ids]))

    def gather(self, tensor):
        return torch.cat(self.world.exchange(self.rank, tensor))

    def gather_lists(self, items):
        return [item for part in self.world.exchange(self.rank, items) for item in part]

    def reduce(self, tensor):
        return torch.stack(self.world.exchange(self.rank, tensor)).sum(dim=0)

    def phase(self, name):
        return nullcontext()

    def count(self, kind, tokens):
        self.tokens[kind] = self.tokens.get(kind, 0) + tokens

    def log(self, name, value):
        self.logged[name] = float(value)
