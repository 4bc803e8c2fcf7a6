"""
Writes the paper's training data, AIME 1983-2023 and 4,000 problems of NuminaMath, as one JSON-lines file with the
columns that `gcpo train` reads: `prompt` (messages) and `solution` (what `accuracy_reward` compares with).

    python examples/paper_data.py --output runs/paper_data.jsonl

The paper does not say how it drew its subset. This draws from NuminaMath's problems whose solution has a boxed answer.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset

AIME = "di-zhang-fdu/AIME_1983_2024"  # columns Year, Question, Answer
NUMINA = "AI-MO/NuminaMath-CoT"  # columns problem, solution
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."


def as_rows(dataset: Dataset, question: str, solution: str) -> Dataset:
    """`prompt` and `solution` of a dataset whose columns have other names."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        content = f"{row[question]}\n{INSTRUCTION}"
        return {"prompt": [{"role": "user", "content": content}], "solution": str(row[solution])}

    return dataset.map(convert, remove_columns=dataset.column_names)


def paper_data(aime: Dataset, numina: Dataset, size: int = 4000, seed: int = 0) -> Dataset:
    """
    AIME up to 2023, then `size` problems of NuminaMath, those in a random order.

    Raises:
        ValueError: NuminaMath has fewer problems with a boxed answer than asked for.
    """
    aime = aime.filter(lambda row: int(row["Year"]) <= 2023)
    # Answers of AIME are bare integers: as maths, they compare like the boxed ones.
    aime = aime.map(lambda row: {"Answer": f"${row['Answer']}$"})
    numina = numina.filter(lambda row: "\\boxed" in row["solution"])
    if len(numina) < size:
        raise ValueError(f"`size` must be at most {len(numina)}, the problems with a boxed answer, got {size}.")
    numina = numina.shuffle(seed=seed).select(range(size))
    return concatenate_datasets([as_rows(aime, "Question", "Answer"), as_rows(numina, "problem", "solution")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/paper_data.jsonl"))
    parser.add_argument("--size", type=int, default=4000, help="problems of NuminaMath")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    args = parser.parse_args()
    data = paper_data(load_dataset(AIME, split="train"), load_dataset(NUMINA, split="train"), args.size, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    data.to_json(args.output)
    print(f"{len(data)} problems written to {args.output}")


if __name__ == "__main__":
    main()
