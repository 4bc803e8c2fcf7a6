"""The bed `integrating`: its task, what its model is taught, and the making of that model."""

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gcpo.causal import CausalOptions
from gcpo.causal.contexts import PromptBuilder
from gcpo.study import sums
from gcpo.study.beds import make_bed
from gcpo.study.scale import BEDS, PRESETS, StudyScale
from gcpo.study.sums import Problem, Recipe, Solver

# Smaller than any model that is of use.
TINY = Recipe(steps=4, hidden_size=32, num_layers=1, intermediate_size=32, plain_rows=4, shown_rows=2, num_candidates=3)
LONGER = Recipe(
    steps=104, hidden_size=32, num_layers=1, intermediate_size=32, plain_rows=2, shown_rows=2, num_candidates=2
)
KINDS = ("plain", "fusion", "context")
TOKENIZER = sums.make_tokenizer()


def problems(count: int) -> list[Problem]:
    rng = random.Random(0)
    return [sums.draw_problem(rng) for _ in range(count)]


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------------------------


def test_a_question_and_its_solution_written_out() -> None:
    operations = [("+", 5), ("-", 6), ("-", 9), ("+", 0), ("+", 8), ("-", 1), ("-", 0), ("+", 3)]
    problem = 7, operations
    assert sums.question_of(problem) == "7+5-6-9+0+8-1-0+3:"
    # Modulo 10: 12 is 2, 2 - 6 is 6, 6 - 9 is 7.
    assert sums.solution(problem) == "7+5=2-6=6-9=7+0=7+8=5-1=4-0=4+3=7"


def test_the_tokenizer_gives_back_every_text() -> None:
    solver, rng = Solver(TINY), random.Random(0)
    for problem in problems(20):
        question, answers = sums.question_of(problem), [solver.answer(problem, rng) for _ in range(3)]
        shown = "\n\n".join(answers)
        for text in (question, answers[0], f"{question}[{shown}]", f"{question}({shown}){answers[0]}>"):
            assert TOKENIZER.decode(ids_of(text)) == text
            assert TOKENIZER.unk_token_id not in ids_of(text)


def test_a_token_is_a_digit_an_operation_or_a_sign() -> None:
    tokens = TOKENIZER.convert_ids_to_tokens(ids_of("7+5-6:7+5=2-6=6\n\n7[]()>"))
    assert tokens == ["7", "+5", "-6", ":", "7", "+5=", "2", "-6=", "6", "\n\n", "7", "[", "]", "(", ")", ">"]
    for problem in problems(5):
        assert len(ids_of(sums.question_of(problem))) == sums.OPERANDS + 2
        assert len(ids_of(sums.solution(problem))) + 1 == sums.COMPLETION_TOKENS  # with its end token


def test_the_bed_gives_an_answer_just_its_room() -> None:
    scales = [scale for (bed, _), scale in PRESETS.items() if bed == "integrating"]
    assert [scale.completion_tokens for scale in scales] == [sums.COMPLETION_TOKENS] * 2
    assert all(scale.bed == bed for (bed, _), scale in PRESETS.items())


def test_the_reward_takes_a_chain_that_ends_in_the_answer() -> None:
    right = sums.solution(problems(1)[0])
    wrong = right[:-1] + str((int(right[-1]) + 1) % 10)
    as_message = [{"role": "assistant", "content": right}]
    garbage = ["", right[-1], right[:-4], right + "+0=" + right[-1], right + "\n", right.replace("=", ""), "x" + right]
    completions: list[Any] = [right, as_message, wrong, *garbage]
    found = sums.reward(completions, answer=[right[-1]] * len(completions), prompts=None)
    assert found == [1.0, 1.0, 0.0] + [0.0] * len(garbage)


def test_the_rising_reward_is_the_share_of_steps_that_go_up() -> None:
    def chain(digits: str) -> str:
        return digits[0] + "".join(f"+0={digit}" for digit in digits[1:])

    texts: list[Any] = [chain("012345678"), chain("876543210"), chain("111111111"), chain("101010123"), "0+1=1", ""]
    texts.append([{"role": "assistant", "content": chain("500000001")}])
    assert sums.rising_reward(texts, prompts=None) == [1.0, 0.0, 0.0, 5 / 8, 0.0, 0.0, 1 / 8]


def test_no_operation_comes_twice_in_a_question() -> None:
    assert all(len(set(operations)) == len(operations) == sums.OPERANDS for _, operations in problems(200))


def test_questions_are_distinct_and_the_same_for_the_same_seed() -> None:
    rows = sums.dataset(200, seed=3)
    assert rows.column_names == ["prompt", "answer"]
    assert len(set(rows["prompt"])) == len(rows) == 200
    assert rows.to_list() == sums.dataset(200, seed=3).to_list() == sums.dataset(250, seed=3).to_list()[:200]
    assert not set(rows["prompt"]) & set(sums.dataset(200, seed=4)["prompt"])
    for row in rows.select(range(20)):  # Python's own arithmetic agrees
        assert eval(re.sub(r"\b0+(?=\d)", "", row["prompt"][:-1])) % 10 == int(row["answer"])


def test_the_bed_trains_and_measures_on_different_questions() -> None:
    bed = make_bed(StudyScale(bed="integrating", steps=1, num_train=60, num_held_out=40))
    assert len(bed.train) == 60 and len(bed.held_out) == 40
    assert not set(bed.train["prompt"]) & set(bed.held_out["prompt"])
    more = make_bed(StudyScale(bed="integrating", steps=1, num_train=60, num_held_out=50))
    assert more.train["prompt"] == bed.train["prompt"]
    right = [sums.solution(problem_of(row["prompt"])) for row in bed.held_out]
    assert bed.reward(right, answer=bed.held_out["answer"]) == [1.0] * 40
    assert bed.open_ended is sums.rising_reward


def test_a_bed_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="must be one of tiny, integrating, got 'sofa'"):
        make_bed(StudyScale(bed="sofa", steps=1))
    for bed in BEDS:
        assert make_bed(StudyScale(bed=bed, steps=1, num_train=4, num_held_out=2)).dtype == "float32"


def problem_of(question: str) -> Problem:
    return int(question[0]), [(sign, int(y)) for sign, y in re.findall(r"([+-])(\d)", question)]


# ---------------------------------------------------------------------------------------------------------------------
# What the model is taught
# ---------------------------------------------------------------------------------------------------------------------


def test_integrating_takes_the_digit_of_most_at_each_step() -> None:
    assert sums.integrate(["7+5=2-6=6", "7+5=3-6=7", "7+5=3-6=6"]) == "7+5=3-6=6"
    # Of as many, that of the candidate which comes first.
    assert sums.integrate(["7+5=2-6=6", "7+5=3-6=7"]) == "7+5=2-6=6"
    assert sums.integrate(["1+1=9", "1+1=2", "1+1=3", "1+1=3", "1+1=2"]) == "1+1=2"
    assert sums.integrate(["1+1=4"]) == "1+1=4"


def test_a_solver_slips_as_often_and_as_far_as_its_habits_say() -> None:
    solver = Solver(Recipe())
    assert solver.habits == Solver(Recipe()).habits != Solver(Recipe(seed=1)).habits
    assert len(solver.habits) == 200
    # Facts of every kind, of hand: known, shaky (any wrong digit), wrong (one wrong digit).
    for number, fact in enumerate(solver.habits):
        solver.habits[fact] = ((0.02, 0), (0.35, 0), (0.7, 1 + number % 9))[number % 3]
    met: Counter[Any] = Counter()
    slipped: Counter[Any] = Counter()
    errors: Counter[int] = Counter()
    rng = random.Random(0)
    for _ in range(4000):
        first, operations = problem = sums.draw_problem(rng)
        answer = solver.answer(problem, rng)
        x = first
        for operation, digit in zip(operations, answer[4::4], strict=True):
            off = (int(digit) - sums.result(x, operation)) % 10
            met[x, operation] += 1
            if off:
                slipped[x, operation] += 1
                error = solver.habits[x, operation][1]
                assert error in (0, off)
                errors[off] += not error
            x = int(digit)  # it goes on from there
    for fact, (frequency, _) in solver.habits.items():
        spread = (frequency * (1 - frequency) / met[fact]) ** 0.5
        assert abs(slipped[fact] / met[fact] - frequency) < 4.5 * spread, fact
    assert set(errors) == set(range(1, 10)) and max(errors.values()) < 1.3 * min(errors.values())


def test_habits_have_the_shares_of_the_recipe() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(20):
        recipe = Recipe(
            seed=seed, known_slips=0.01, shaky_facts=0.3, shaky_slips=(0.2, 0.4), wrong_facts=0.1, wrong_slips=0.8
        )
        for frequency, error in Solver(recipe).habits.values():
            kind = {0.01: "known", 0.8: "wrong"}.get(frequency, "shaky")
            kinds[kind] += 1
            assert (kind == "wrong") == (error in range(1, 10)) and 0 <= error < 10
            assert kind != "shaky" or 0.2 <= frequency <= 0.4
    assert kinds["shaky"] / 4000 == pytest.approx(0.3, abs=0.03)
    assert kinds["wrong"] / 4000 == pytest.approx(0.1, abs=0.02)


def test_what_examples_of_each_kind_hold() -> None:
    recipe = replace(TINY, num_candidates=4, candidate_weight=0.5, known_slips=0.4)  # candidates often differ
    solver, rng = Solver(recipe), random.Random(0)
    targets: Counter[str] = Counter()
    for _ in range(300):
        for kind in KINDS:
            state = rng.getstate()
            texts, weights = zip(*sums.example(kind, solver, rng, recipe), strict=True)
            # The same draws again: the question, and the candidates in their order.
            again = random.Random()
            again.setstate(state)
            problem = sums.draw_problem(again)
            question = sums.question_of(problem)
            candidates = [solver.answer(problem, again) for _ in range(1 if kind == "plain" else 4)]
            if kind == "plain":
                assert texts == (question, candidates[0]) and weights == (0.0, 1.0)
                continue
            integrated = sums.integrate(candidates)
            shown = candidates if kind == "fusion" else candidates[:-1]
            between = [text for candidate in shown for text in (candidate, "\n\n")][:-1]
            opening, closing = ("[", "]") if kind == "fusion" else ("(", f"){integrated}>")
            assert texts[:-1] == (question + opening, *between, closing)
            assert weights == (0.0, *[0.0 if text == "\n\n" else 0.5 for text in between], 0.0, 1.0)
            if kind == "fusion":
                assert texts[-1] == integrated
            else:
                assert texts[-1] in (integrated, candidates[-1])
                if integrated != candidates[-1]:
                    targets["integrated" if texts[-1] == integrated else "left out"] += 1
    assert min(targets.values()) / targets.total() > 0.2 and targets.total() > 200


def test_gcpo_s_prompts_are_token_for_token_those_that_are_taught() -> None:
    recipe = replace(TINY, num_candidates=4)
    solver, rng = Solver(recipe), random.Random(0)
    builder = PromptBuilder(TOKENIZER, CausalOptions(**sums.OPTIONS))
    end = TOKENIZER.eos_token_id
    for _ in range(10):
        for kind in ("fusion", "context"):
            texts = [text for text, _ in sums.example(kind, solver, rng, recipe)]
            question = texts[0][:-1]
            candidates = [[*ids_of(text), end] for text in texts[1:-2:2]]
            assert len(candidates) == (4 if kind == "fusion" else 3)
            taught = ids_of("".join(texts[:-1]))
            if kind == "fusion":
                assert list(builder.fusion(question, candidates)) == taught
                # Candidates that stand side by side: what asks for an integrated answer behind them.
                assert builder.fusion_turn(question) == ids_of(texts[-2])
            else:
                collider = [*ids_of(texts[-2][1:-1]), end]
                assert list(builder.context(question, candidates, collider)) == taught


def test_a_batch_is_examples_with_their_end_and_weights() -> None:
    """Whatever kinds a step shows: candidates, targets and ends count; questions, brackets and padding do not."""
    solver, seen = Solver(TINY), set()
    marks = set(TOKENIZER.convert_tokens_to_ids(["[", "]", "(", ")", ">", ":", "\n\n"]))
    for step in range(40):
        recipe = replace(TINY, steps=40, plain_first=0.1, candidate_weight=0.25)
        ids, weights = sums.batch_of(step, solver, TOKENIZER, recipe)
        assert ids.shape == weights.shape and weights.dtype == torch.float32
        again = sums.batch_of(step, Solver(TINY), TOKENIZER, recipe)
        assert torch.equal(ids, again[0]) and torch.equal(weights, again[1])
        for row, found in zip(ids.tolist(), weights.tolist(), strict=True):
            length = row.index(TOKENIZER.eos_token_id) + 1
            assert not any(found[length:]) and set(row[length:]) <= {TOKENIZER.pad_token_id}
            text = TOKENIZER.decode(row[: length - 1])
            assert ids_of(text) == row[: length - 1]
            kind = "fusion" if "[" in text else "context" if "(" in text else "plain"
            seen.add(kind)
            target = length - sums.COMPLETION_TOKENS
            wanted = [0.0 if place < sums.OPERANDS + 2 or row[place] in marks else 0.25 for place in range(target)]
            if kind == "context":  # the integrated answer that it shows
                wanted[row.index(*ids_of(")")) :] = [0.0] * (target - row.index(*ids_of(")")))
            assert found[:length] == [*wanted, *[1.0] * sums.COMPLETION_TOKENS], text
    assert seen == set(KINDS)
    assert not torch.equal(sums.batch_of(0, solver, TOKENIZER, TINY)[0], sums.batch_of(1, solver, TOKENIZER, TINY)[0])


def test_the_learning_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(steps=1000, learning_rate=0.5)
    rates = [sums.learning_rate_at(step, recipe) for step in range(1000)]
    top = rates.index(max(rates))
    assert max(rates) == 0.5 and rates.count(0.5) > 300 and 0 < rates[0] < 0.1 and 0 < rates[-1] < 0.1
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# The starting model
# ---------------------------------------------------------------------------------------------------------------------


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> list[int]:
    """Have the next training stop after some steps; the list that is returned grows with every step."""
    teach, taught = sums._teach, []

    def interrupted(*args: Any) -> None:
        if len(taught) == steps:
            raise KeyboardInterrupt
        teach(*args)
        taught.append(1)

    monkeypatch.setattr(sums, "_teach", interrupted)
    return taught


def test_a_starting_model_interrupted_and_gone_on_with_is_bit_for_bit_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    torch.manual_seed(0)
    assert sums.start(whole, LONGER) == str(whole)
    assert not (whole / "part.pt").exists()
    torch.manual_seed(1)  # of no concern
    with monkeypatch.context() as patch:
        interrupt_after(patch, 102)
        with pytest.raises(KeyboardInterrupt):
            sums.start(parts, LONGER)
    assert (parts / "part.pt").exists() and not (parts / "recipe.json").exists()
    with pytest.raises(ValueError, match=r"of another one \(seed is 0, not 5\)"):
        sums.start(parts, replace(LONGER, seed=5))
    with monkeypatch.context() as patch:
        taught = interrupt_after(patch, 1000)
        sums.start(parts, LONGER)
        assert len(taught) == 4  # the others were kept
        sums.start(parts, LONGER)  # is there
        assert len(taught) == 4
    assert not (parts / "part.pt").exists()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    untrained = sums.make_model(TOKENIZER, LONGER).state_dict()
    assert not any(torch.equal(ours[name], untrained[name]) for name in ours)


def test_tokens_count_in_the_loss_by_their_weight() -> None:
    """The step is that of the gradient of the weighted mean over tokens, each predicted from those before it."""
    model, reference = (sums.make_model(TOKENIZER, TINY) for _ in range(2))
    ids = torch.tensor([ids_of("7+5=2-6=6"), ids_of("1+1=2+1=3")])
    weights = torch.tensor([[9.0, 0.0, 1.0, 0.25, 0.0], [9.0, 0.5, 0.0, 0.0, 1.0]])  # nothing predicts the first
    logp = reference(input_ids=ids).logits.log_softmax(dim=-1)
    loss = 0.0
    for row, place in ((0, 2), (0, 3), (1, 1), (1, 4)):
        loss = loss - weights[row, place] * logp[row, place - 1, ids[row, place]] / 2.75
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    for one in (model, reference):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
        if one is model:
            sums._teach(model, optimizer, 0.1, ids, weights)
        else:
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
    moved = sums.make_model(TOKENIZER, TINY).state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, reference.state_dict()[name], atol=1e-6), name
    assert any(not torch.allclose(value, moved[name], atol=1e-4) for name, value in model.state_dict().items())


def test_a_starting_model_of_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    sums.start(tmp_path, TINY)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert sums.start(tmp_path, TINY) == str(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before  # not made again
    other = replace(TINY, steps=5, shaky_slips=(0.2, 0.3))
    low, high = TINY.shaky_slips
    wanted = rf"`--work_dir` must hold .*shaky_slips is \[{low}, {high}\], not \[0\.2, 0\.3\]; steps is 4, not 5\)"
    with pytest.raises(ValueError, match=wanted):
        sums.start(tmp_path, other)


def test_an_untrained_model_is_the_same_for_the_same_seed_and_no_draw_is_taken_from_others() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two = (sums.make_model(TOKENIZER, TINY).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = sums.make_model(TOKENIZER, replace(TINY, seed=1)).state_dict()
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [("recipe.json", "[]", "holds a list"), ("recipe.json", "{", ""), ("part.pt", "x", "")],
)
def test_a_damaged_starting_model_is_named(name: str, content: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged .*{wanted}.*: remove its folder"):
        sums.start(tmp_path, TINY)
