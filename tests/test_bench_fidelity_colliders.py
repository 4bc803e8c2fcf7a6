"""The fidelity benchmark's table of colliders: its contexts are the trainer's, its measures are those of formulas."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import fidelity, fidelity_colliders
from bench.fidelity_colliders import OPTIONS, Scores, behaviour, pull, rewarded_apart, score_lengths, tabulate
from bench.fidelity_runs import Lab
from bench.overhead_runs import prepare_model


def scores(draws: list[torch.Tensor], greedy: torch.Tensor | None = None, **changed: Any) -> Scores:
    query = torch.full(draws[0].shape[:2], -1.0)
    rewards = [[0.0] * draw.shape[-1] for draw in draws]
    given = {"query_logp": query, "mask": torch.ones_like(query).bool(), "rewards": rewards, "tokens": 4.0}
    return Scores(greedy=greedy, draws=draws, **{**given, **changed})


def test_the_pull_is_that_of_the_formulas() -> None:
    query = torch.tensor([[-1.0, -3.0]])
    contexts = torch.tensor([[[-1.0, -2.0, -2.0], [-9.0, -0.5, -0.5]]])
    a, b, c = contexts[..., 0].exp(), contexts.exp().mean(dim=-1), query.exp()
    d, clamped = pull(query, contexts, "projection")
    expected = [math.log(a[0, 0] - b[0, 0] + c[0, 0]) + 1.0, math.log(1e-6) + 3.0]  # the second is below 0: clamped
    assert d.flatten().tolist() == pytest.approx(expected, rel=1e-4) and clamped.tolist() == [[False, True]]
    for target, own in (("context", a), ("ensemble", b)):
        d, clamped = pull(query, contexts, target)
        torch.testing.assert_close(d, own.log() - query)
        assert not clamped.any()
    assert pull(query, contexts - 30.0, "context")[1].all() and pull(query, contexts - 30.0, "ensemble")[1].all()


def test_the_collider_that_is_chosen_comes_first() -> None:
    draw = torch.tensor([-1.0, -2.0, -3.0, -4.0]).expand(1, 1, 4)
    greedy = torch.full((1, 1), -9.0)
    one = scores([draw], greedy, rewards=[[0.0, 1.0, 1.0, 0.5]])

    def order(choice: str, seed: int = 0, of: Scores = one) -> list[float]:
        found = of.context_logp(0, choice, random.Random(seed))
        assert found is not None
        return found.flatten().tolist()

    assert order("sample") == [-1.0, -2.0, -3.0, -4.0]
    assert order("greedy") == [-9.0, -1.0, -2.0, -3.0]  # as many as there are otherwise
    assert {tuple(order("reward", seed)) for seed in range(20)} == {(-2.0, -1.0, -3.0, -4.0), (-3.0, -1.0, -2.0, -4.0)}
    assert order("greedy", of=replace(one, greedy=None)) == order("sample")
    silent = scores([draw[..., :0]], greedy)
    assert silent.context_logp(0, "sample", random.Random(0)) is None
    assert silent.context_logp(0, "greedy", random.Random(0)) is not None
    assert rewarded_apart([one, silent, scores([draw])]) == 0.5  # of two draws that say something


def test_measures_of_two_draws() -> None:
    """Two tokens of two completions, one of them masked; d is set by a context that stands alone."""
    d = torch.tensor([[[1.0, 1.0], [-0.5, 7.0]], [[1.0, -1.0], [0.5, 7.0]]])  # draws, completions, tokens
    mask = torch.tensor([[True, True], [True, False]])
    one = scores([(draw - 5.0).unsqueeze(-1) for draw in d], query_logp=torch.full((2, 2), -5.0), mask=mask)
    found = behaviour([one], "sample", "context")
    assert found["sign_tokens"] == pytest.approx(1 / 3)  # of three tokens one has one sign in both draws
    assert found["sign_sequences"] == 0.0  # means 1 and 0, -0.5 and 0.5
    weights = [[math.expm1(x) ** 2 for x in values] for values in ([1.0, 1.0, -0.5], [1.0, -1.0, 0.5])]
    assert found["squared_weight"] == pytest.approx(sum(map(sum, weights)) / 6, rel=1e-4)
    shares = [max(own) / sum(own) for own in weights]
    assert found["largest_share"] == pytest.approx(sum(shares) / 2, rel=1e-4)
    assert found["clamped"] == 0.0 and math.isnan(found["sign_tokens_error"])
    small = scores([(0.001 * draw - 5.0).unsqueeze(-1) for draw in d], query_logp=torch.full((2, 2), -5.0))
    assert math.isnan(behaviour([small], "sample", "context")["sign_tokens"])
    twice = behaviour([one, replace(one, draws=[one.draws[0]] * 2)], "sample", "context")
    assert twice["sign_tokens"] == pytest.approx(2 / 3) and twice["sign_tokens_error"] == pytest.approx(1 / 3)


def test_exchangeable_colliders_agree_by_chance_and_a_rewarded_one_does_not() -> None:
    """What a collider says of every token, drawn from one distribution; the rewarded ones say the same in all draws."""
    torch.manual_seed(0)
    right = torch.randn(8, 200)
    found = []
    for _ in range(4):
        noise = 0.3 * torch.randn(2, 8, 200, 4)
        noise[:, :, :, 2] += 0.3 * right
        # The collider that is right is as likely to be drawn at one place as at any other.
        places = [torch.randperm(4) for _ in range(2)]
        draws = [-1.5 + noise[k][..., places[k]] for k in range(2)]
        rewards = [[float(place == 2) for place in order.tolist()] for order in places]
        found.append(scores(draws, rewards=rewards))
    sample, reward = (behaviour(found, choice, "projection") for choice in ("sample", "reward"))
    assert abs(sample["sign_tokens"] - 0.5) < 0.05 < 0.1 < reward["sign_tokens"] - 0.5
    assert rewarded_apart(found) == 1.0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("model")
    prepare_model("tiny", folder)
    options = {
        "num_generations": 3,
        "num_colliders": 2,
        "max_completion_length": 6,
        "collider_max_completion_length": 8,
    }
    return Lab(folder, ["chain_sum"], 1, options, seed=0)


def test_scores_are_the_trainers_under_shorter_colliders(lab: Lab) -> None:
    sample = lab.roll_out(0)
    found = score_lengths(lab, 0, sample, [3, 8])
    trainer = lab.trainer(**OPTIONS)
    fusion = lab.trainer()._causal.builder.fusion(sample.group.prompt, sample.group.candidates)
    with torch.no_grad():
        whole = lab.model.generate(torch.tensor([fusion]), do_sample=False, max_new_tokens=8)
    greedy = whole[0, len(fusion) :].tolist()
    for length, one in found.items():
        for draw, group in enumerate((sample.group, sample.other_group)):
            cut = replace(group, colliders=[ids[:length] for ids in group.colliders])
            terms = trainer._causal.terms(sample.rollout, sample.mask.shape[1], groups=[cut])
            assert terms.kl is not None
            torch.testing.assert_close(one.draws[draw], terms.kl.context_logp, atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                first = replace(group, colliders=[greedy[:length]] * 2)
                terms = trainer._causal.terms(sample.rollout, sample.mask.shape[1], groups=[first])
            assert terms.kl is not None and one.greedy is not None
            torch.testing.assert_close(one.greedy, terms.kl.context_logp[..., 0], atol=1e-5, rtol=1e-5)
        whole_rows = [[*sample.group.prompt_ids, *ids] for ids in sample.group.candidates]
        for row, ids in zip(one.query_logp, whole_rows, strict=True):
            with torch.no_grad():
                logp = lab.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            start = len(sample.group.prompt_ids)
            expected = logp[range(start - 1, len(ids) - 1), ids[start:]]
            torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-4)
    assert (found[3].draws[0] - found[8].draws[0]).abs().max() > 1e-6
    assert found[3].tokens == 3.0


def test_the_table_is_written_and_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "colliders.json"
    flags = "--table colliders --model tiny --num_generations 3 --num_colliders 2 --completion_tokens 6"
    flags += " --collider_tokens 8 --tasks chain_sum spell_backward"
    monkeypatch.setattr(sys, "argv", ["fidelity", *flags.split(), "--fusion", "answer", "--out", str(out)])
    fidelity.main()
    content = json.loads(out.read_text())
    rows = content["colliders"]
    assert {row["length"] for row in rows} == {3, 8}  # longer ones are not there
    assert len(rows) == 2 * 3 * 3 and all(row["squared_weight"] >= 0 for row in rows)
    assert list(content["rewarded_apart"]) == ["3", "8"] and content["rollouts"]["tasks"] == [
        "chain_sum",
        "spell_backward",
    ]
    by = {(row["length"], row["choice"], row["target"]): row for row in rows}
    ensemble = [by[8, choice, "ensemble"]["squared_weight"] for choice in ("sample", "reward")]
    assert ensemble[0] == pytest.approx(ensemble[1], rel=1e-6)  # the same colliders, in another order
    assert by[8, "sample", "projection"]["squared_weight"] != by[3, "sample", "projection"]["squared_weight"]
    table = capsys.readouterr().out
    assert "| 8 tokens, `greedy`, `context` |" in table and fidelity.show(content) in table
    assert fidelity_colliders.label(by[3, "reward", "projection"]) == "3 tokens, `reward`"


def test_a_row_of_nothing_is_no_number() -> None:
    """Where no collider says anything, as with one token that is special."""
    silent = scores([torch.zeros(2, 3, 0), torch.zeros(2, 3, 0)])
    (row, *_) = tabulate({1: [silent]})
    assert math.isnan(row["squared_weight"]) and math.isnan(row["sign_tokens"]) and math.isnan(row["largest_share"])
    shown = fidelity_colliders.show({"colliders": [row], "rewarded_apart": {"1": 0.0}})
    assert "| 1 tokens, `sample` | - | - | - | - | - | - | 4.0 |" in shown


@pytest.mark.parametrize("lengths", [["9"], ["0", "-1"]])
def test_lengths_that_do_not_fit_are_refused(
    lengths: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--table", "colliders", "--collider_tokens", "8", "--collider_lengths", *lengths]
    monkeypatch.setattr(sys, "argv", ["fidelity", *flags])
    with pytest.raises(SystemExit):
        fidelity.main()
    assert "--collider_lengths must have one from 1 to 8" in capsys.readouterr().err
