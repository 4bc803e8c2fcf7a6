"""`gcpo eval`: pass@1 and pass@k of a model on a benchmark, a generated task, a file or a dataset on the hub."""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gcpo.evaluation.sources import TaskArguments
from gcpo.run.inputs import ArgumentsError, argument_errors, check_chat_template, check_model, check_output
from gcpo.run.redaction import redacted


def eval_parser() -> argparse.ArgumentParser:
    """The flags of `gcpo eval`."""
    parser = argparse.ArgumentParser(
        prog="gcpo eval",
        description="pass@1 and pass@k of a model, with standard errors over prompts. Of a generated task, the items "
        "are those that `gcpo train` holds out with the same --task_seed, and --task_eval_size equal to --task_size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="name on the hub or folder, of a model or an adapter")
    add("--model_revision", default="main", help="revision of a model on the hub")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="type of the weights")
    add("--attn_implementation", help="as in transformers")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--device", help="cpu, cuda, cuda:1, ...; default: an accelerator where there is one")
    add(
        "--dataset_name",
        required=True,
        help="benchmark:NAME (aime24, aime25, amc23, math500, minervamath, humaneval), reasoning_gym:NAME, a path, or "
        "a name on the hub",
    )
    add("--dataset_config", help="configuration of a dataset on the hub")
    add("--dataset_test_split", help="split to measure on (default: test, or the only one there is)")
    add("--data_dir", type=Path, help="benchmark: a folder with NAME.jsonl, read instead of the hub")
    add("--allow_code_execution", action="store_true", help="run the programs that a model writes, in a sandbox")
    add(
        "--reward_funcs",
        help="verifier: as in `gcpo train`, one; a completion passes with a score of 1 or more. Default: that of the "
        "benchmark or task; math-verify for rows with an answer",
    )
    for item in fields(TaskArguments):
        kind = bool if item.type is bool else int if item.type is int else str
        default = 100 if item.name == "task_size" else item.default
        if kind is bool:
            add(f"--no_{item.name}", dest=item.name, action="store_false", help=item.metadata["help"])
        else:
            add(f"--{item.name}", type=kind, default=default, help=item.metadata["help"])
    add("--limit", type=int, help="use so many of the dataset's first rows only")
    add("--num_samples", type=int, default=1, help="completions per prompt; 1 at temperature 0")
    add("--pass_at", type=int, nargs="+", default=[1], metavar="K", help="values of k, each at most --num_samples")
    add("--max_new_tokens", type=int, default=256, help="most tokens of a completion")
    add("--temperature", type=float, default=1.0, help="of sampling; 0 takes the most likely token")
    add("--batch_size", type=int, default=64, help="completions generated at a time")
    add("--seed", type=int, default=0, help="of sampling")
    add("--output", type=Path, help="JSON file to write the result to")
    return parser


def run(flags: list[str]) -> int:
    """Run the command; its exit code."""
    args = eval_parser().parse_args(flags)
    with argument_errors():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from gcpo.evaluation.evaluate import EvaluationError, evaluate_pass_at_k
        from gcpo.evaluation.questions import load_questions
        from gcpo.run.machine import default_device

        if args.output is not None:
            check_output(args.output)
        for k in args.pass_at:
            if not 1 <= k <= args.num_samples:
                raise ValueError(f"`--pass_at` must be between 1 and --num_samples ({args.num_samples}), got {k}.")
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"`--limit` must be at least 1, got {args.limit}.")
        device = args.device or default_device()
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"`--device` {device} does not work here: {str(error).splitlines()[0]}") from error
        check_model(args.model_name_or_path)
        dataset, reward = load_questions(
            args.dataset_name,
            TaskArguments(**{item.name: getattr(args, item.name) for item in fields(TaskArguments)}),
            config=args.dataset_config,
            split=args.dataset_test_split,
            reward_func=args.reward_funcs,
            data_dir=args.data_dir,
            allow_code=args.allow_code_execution,
        )
        if args.limit is not None:
            dataset = dataset.select(range(min(args.limit, len(dataset))))
        options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, **options)
        check_chat_template(tokenizer, dataset, args.model_name_or_path)
        model: Any = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=args.dtype, attn_implementation=args.attn_implementation, **options
        )
    model.to(device)
    try:  # what the reward function itself raises keeps its traceback
        result = evaluate_pass_at_k(
            model,
            tokenizer,
            dataset,
            reward,
            num_samples=args.num_samples,
            ks=sorted(set(args.pass_at)),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except EvaluationError as error:
        raise ArgumentsError(str(error)) from error
    print(f"{args.model_name_or_path} on {args.dataset_name}")
    for k, (value, se) in {"1": [result.pass_at_1, result.pass_at_1_se], **result.pass_at_k}.items():
        print(f"{'pass@' + k:<18} {value:.4f} ± {se:.4f} (score >= 1)")
    print(f"{'mean score':<18} {result.mean_score:.4f} ± {result.mean_score_se:.4f}")
    print(f"{'prompts':<18} {result.num_prompts}")
    print(f"{'samples per prompt':<18} {result.num_samples}")
    print(f"{'tokens per sample':<18} {result.mean_completion_length:.1f}")
    if args.output is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.output.write_text(json.dumps({"result": asdict(result), "settings": redacted(settings)}, indent=2) + "\n")
        print(f"written to {args.output}")
    return 0
