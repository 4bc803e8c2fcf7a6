"""The command `gcpo`: picks a subcommand, and imports what that one needs and no more."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gcpo import __version__
from gcpo.inputs import (
    ArgumentsError,
    TaskArguments,
    argument_errors,
    check_chat_template,
    check_model,
    is_task,
    load_named,
    load_rewards,
    load_task,
    take_split,
)

DEBUG = "GCPO_DEBUG"


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv: command and flags; those of the process when None.

    Returns:
        The exit code: 0, 1 where a check failed, 2 for wrong arguments, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"gcpo {__version__}")
        return 0
    name, flags = argv[0], argv[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return _fail("gcpo", f"unknown command {name!r}{hint}; there are {', '.join(COMMANDS)}")
    try:
        return COMMANDS[name][0](flags)
    except KeyboardInterrupt:
        print(f"gcpo {name}: interrupted", file=sys.stderr)
        return 130
    except ArgumentsError as error:
        if os.environ.get(DEBUG):
            raise
        return _fail(f"gcpo {name}", f"{error}\n{DEBUG}=1 shows where this was raised.")


def usage() -> str:
    """The text of `gcpo --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: gcpo COMMAND [flags]\n\n"
        "Group Causal Policy Optimization (arXiv 2508.05428) on top of TRL.\n\n"
        f"commands:\n{commands}\n\n"
        f"`gcpo COMMAND --help` lists the flags of a command. {DEBUG}=1 shows where an error was raised."
    )


def _fail(prog: str, message: str) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2


def _train(flags: list[str]) -> int:
    with argument_errors():
        from gcpo.train import prepare, train
    run = prepare(flags)
    return run if isinstance(run, int) else train(*run)


def _doctor(flags: list[str]) -> int:
    argparse.ArgumentParser(prog="gcpo doctor", description=COMMANDS["doctor"][1]).parse_args(flags)
    with argument_errors():
        from gcpo.doctor import run
    return run()


def _demo(flags: list[str]) -> int:
    with argument_errors():
        from gcpo import demo

        parser = argparse.ArgumentParser(prog="gcpo demo", description=COMMANDS["demo"][1])
        demo.add_arguments(parser)
        demo.run(parser.parse_args(flags))
    return 0


def eval_parser() -> argparse.ArgumentParser:
    """The flags of `gcpo eval`."""
    parser = argparse.ArgumentParser(
        prog="gcpo eval",
        description="pass@1 of a model, with its standard error over prompts. Of a generated task, the items are those "
        "that `gcpo train` holds out with the same --task_seed, and --task_eval_size equal to --task_size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="name on the hub or folder, of a model or an adapter")
    add("--model_revision", default="main", help="revision of a model on the hub")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="type of the weights")
    add("--attn_implementation", help="as in transformers")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--device", help="cpu, cuda, cuda:1, ...; default: an accelerator where there is one")
    add("--dataset_name", required=True, help="reasoning_gym:NAME, a path, or a name on the hub")
    add("--dataset_config", help="configuration of a dataset on the hub")
    add("--dataset_test_split", default="test", help="split to measure on")
    add("--reward_funcs", help="verifier: as in `gcpo train`, one; the task's own for reasoning_gym:NAME")
    for item in fields(TaskArguments):
        kind = bool if item.type is bool else int if item.type is int else str
        default = 100 if item.name == "task_size" else item.default
        if kind is bool:
            add(f"--no_{item.name}", dest=item.name, action="store_false", help=item.metadata["help"])
        else:
            add(f"--{item.name}", type=kind, default=default, help=item.metadata["help"])
    add("--limit", type=int, help="use the first rows of the dataset only")
    add("--num_samples", type=int, default=1, help="completions per prompt")
    add("--max_new_tokens", type=int, default=256, help="most tokens of a completion")
    add("--temperature", type=float, default=1.0, help="of sampling; 0 takes the most likely token")
    add("--batch_size", type=int, default=64, help="completions generated at a time")
    add("--seed", type=int, default=0, help="of sampling")
    add("--output", type=Path, help="JSON file to write the result to")
    return parser


def _eval(flags: list[str]) -> int:
    args = eval_parser().parse_args(flags)
    with argument_errors():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from gcpo.evaluate import evaluate_pass_at_1

        if args.output is not None and not args.output.parent.is_dir():
            raise FileNotFoundError(f"`--output` must be in a folder that exists, got {str(args.output)!r}.")
        task = TaskArguments(**{item.name: getattr(args, item.name) for item in fields(TaskArguments)})
        if is_task(args.dataset_name):
            size, task.task_size = task.task_size, 1
            dataset = load_task(args.dataset_name, task, held_out_size=size)[1]
        else:
            splits = load_named(args.dataset_name, args.dataset_config)
            dataset = take_split(splits, "dataset_test_split", args.dataset_test_split)
        if args.limit is not None:
            dataset = dataset.select(range(min(args.limit, len(dataset))))
        rewards = load_rewards(
            [args.reward_funcs] if args.reward_funcs else None, args.dataset_name, dataset.column_names
        )
        if not rewards:
            raise ValueError("`--reward_funcs` is missing.")
        check_model(args.model_name_or_path)
        options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, **options)
        check_chat_template(tokenizer, dataset, args.model_name_or_path)
        model: Any = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=args.dtype, attn_implementation=args.attn_implementation, **options
        )
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        model.to(args.device or accelerator or "cpu")
        result = evaluate_pass_at_1(
            model,
            tokenizer,
            dataset,
            rewards[0],
            num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            batch_size=args.batch_size,
            seed=args.seed,
            progress=sys.stderr.isatty(),
        )
    print(f"{args.model_name_or_path} on {args.dataset_name}")
    print(f"{'pass@1':<18} {result.pass_at_1:.4f} ± {result.pass_at_1_se:.4f}")
    print(f"{'mean score':<18} {result.mean_score:.4f} ± {result.mean_score_se:.4f}")
    print(f"{'prompts':<18} {result.num_prompts}")
    print(f"{'samples per prompt':<18} {result.num_samples}")
    print(f"{'tokens per sample':<18} {result.mean_completion_length:.1f}")
    if args.output is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.output.write_text(json.dumps({"result": asdict(result), "settings": settings}, indent=2) + "\n")
        print(f"written to {args.output}")
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a model with GCPO: the flags and YAML files of `trl grpo`, and GCPO's own"),
    "eval": (_eval, "measure a model's pass@1, with its standard error"),
    "demo": (_demo, "train a tiny model and watch its reward rise"),
    "doctor": (_doctor, "print versions and the device, and check the kernels on this machine"),
}

if __name__ == "__main__":
    sys.exit(main())
