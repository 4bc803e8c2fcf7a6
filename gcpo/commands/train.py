"""`gcpo train`: GCPO with the flags and YAML files of `trl grpo`, and those of GCPOConfig."""

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import ProgressCallback
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_peft_config, get_quantization_config
from trl.scripts.grpo import GRPOScriptArguments

from gcpo.commands.flags import TrainParser, check_installed
from gcpo.config import GCPOConfig
from gcpo.run.inputs import (
    TASK_PREFIX,
    TASK_REWARD,
    TRL_REWARDS,
    ArgumentsError,
    TaskArguments,
    argument_errors,
    ask_problems,
    check_answers,
    check_chat_template,
    check_model,
    checked,
    column_names,
    is_task,
    load_named,
    load_rewards,
    load_task,
    take_split,
)
from gcpo.run.progress import StepProgress
from gcpo.run.prompts import PromptError, check_prompts
from gcpo.run.resume import check_same_model, checkpoints, last_complete_checkpoint, step_of, why_incomplete
from gcpo.run.reward_timeout import with_timeout

_LAUNCHED = "GCPO_LAUNCHED"


@dataclass
class GCPOScriptArguments(TaskArguments, GRPOScriptArguments):
    """What to train on and for: TRL's arguments, and generated tasks as `--dataset_name reasoning_gym:NAME`."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Reward functions: {', '.join(TRL_REWARDS)} (TRL's), {TASK_REWARD} (the task's own scorer; the "
            "default for reasoning_gym:NAME), or a dotted path such as my_package.rewards.my_reward. Default for rows "
            "with an answer, without a reward model: math-verify, as in `gcpo eval`."
        },
    )
    task_eval_size: int = field(
        default=100, metadata={"help": "reasoning_gym: items held out when evaluation is on, as in `gcpo eval`."}
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a reward function may take for one generation batch. Past them it is stopped and its "
            "completions count as having no reward. Default: no limit, as in TRL."
        },
    )
    resume: bool = field(
        default=False,
        metadata={
            "help": "Go on from the newest whole checkpoint in output_dir, or start where there is none: the same "
            "command again after a kill. Checkpoints that are not whole are skipped with a warning."
        },
    )


def make_parser(prog: str = "gcpo train") -> TrainParser:
    """The flags of `trl grpo`, with GCPOConfig in place of GRPOConfig."""
    groups: Any = (GCPOScriptArguments, GCPOConfig, ModelConfig, DatasetMixtureConfig)
    parser = TrainParser(
        groups,
        prog=prog,
        epilog="To start several processes: --accelerate_config FILE (or the name of one of TRL's), and any flag of "
        "`accelerate launch`, such as --num_processes.",
    )
    # TRL's defaults ask for bfloat16 on an accelerator; without one, a run needs no flag to start on the CPU.
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True, bf16=False)
    return parser


def parse(argv: list[str]) -> tuple[GCPOScriptArguments, GCPOConfig, ModelConfig, DatasetMixtureConfig, list[str]]:
    """
    Read flags and the YAML file of `--config`.

    Returns:
        The four groups of arguments, and what is meant for `accelerate launch` (as with `trl grpo`, any of its flags
        may stand among the others). A flag that neither knows is an error.
    """
    script_args, config, model_args, mixture, launch_args = make_parser().parse_args_and_config(
        argv, return_remaining_strings=True
    )
    return script_args, config, model_args, mixture, launch_args


def load_splits(args: GCPOScriptArguments, mixture: DatasetMixtureConfig, with_eval: bool) -> tuple[Any, Any | None]:
    """The training split and, with evaluation on, the held-out one."""
    if is_task(args.dataset_name) and not mixture.datasets:
        return load_task(str(args.dataset_name), args, args.task_eval_size if with_eval else 0)
    splits: Mapping[str, Any]
    if mixture.datasets:
        splits = get_dataset(mixture)
    elif args.dataset_name is None:
        raise ValueError(f"`--dataset_name` is missing: a dataset's name or path, or {TASK_PREFIX}NAME.")
    else:
        splits = load_named(args.dataset_name, args.dataset_config, args.dataset_streaming)
    train = take_split(splits, "dataset_train_split", args.dataset_train_split)
    held_out = take_split(splits, "dataset_test_split", args.dataset_test_split) if with_eval else None
    return (
        ask_problems(train, args.task_conversational),
        None if held_out is None else ask_problems(held_out, args.task_conversational),
    )


def resolve_checkpoint(config: GCPOConfig, resume: bool = False) -> str | None:
    """
    `--resume_from_checkpoint` as a folder; `last` and `true` name the newest whole one in `--output_dir`, as `--resume`
    does. For `--resume`, None where there is no whole checkpoint: the run was stopped before its first. Without either,
    a folder that holds checkpoints is refused: a later `--resume` would take them for the new run's.
    """
    value = config.resume_from_checkpoint
    if value is not None and str(value).lower() in ("false", "none"):
        value = None
    if resume and value is not None:
        raise ValueError(
            f"`--resume` and `--resume_from_checkpoint {value}` are two answers to one question: give one."
        )
    if value is None:
        if resume:
            return last_complete_checkpoint(str(config.output_dir))
        found = checkpoints(str(config.output_dir))
        if found:
            raise ValueError(
                f"`--output_dir` {config.output_dir!r} holds {found[0].name} of an earlier run: `--resume` goes on "
                "with it; for a new run, name another folder or remove the checkpoints."
            )
        return None
    if str(value).lower() not in ("true", "last"):
        if not Path(value).is_dir():
            raise FileNotFoundError(f"`--resume_from_checkpoint` must be a checkpoint folder or 'last', got {value!r}.")
        reason = why_incomplete(value)
        if reason is not None:
            raise ValueError(
                f"`--resume_from_checkpoint` must be a whole checkpoint, got {value!r}: {reason}. `--resume` takes the "
                "newest whole one."
            )
        return str(value)
    last = last_complete_checkpoint(str(config.output_dir))
    if last is None:
        raise FileNotFoundError(
            f"`--resume_from_checkpoint {value}`: no checkpoint in {config.output_dir!r} that is whole."
        )
    return last


def prompts_per_rollout(config: GCPOConfig) -> int:
    """Prompts of one rollout, over all processes."""
    return int(config.generation_batch_size or 1) // int(config.num_generations or 1)


def check_size(config: GCPOConfig, num_prompts: int | None) -> None:
    """Refuse a dataset smaller than one rollout: only whole ones are trained on, so nothing would be."""
    wanted = prompts_per_rollout(config)
    if num_prompts is not None and num_prompts < wanted:
        raise ValueError(
            f"The dataset has {num_prompts} prompts, one rollout takes {wanted}: lower `per_device_train_batch_size`, "
            "`gradient_accumulation_steps` or `steps_per_generation`."
        )


def count_steps(config: GCPOConfig, num_prompts: int | None) -> int | None:
    """Optimizer steps of a run; None where the dataset's length is unknown."""
    if config.max_steps > 0:
        return config.max_steps
    if num_prompts is None:
        return None
    rollouts = num_prompts // prompts_per_rollout(config)
    batches = rollouts * int(config.steps_per_generation or 1) * config.num_iterations
    return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))


def summary(config: GCPOConfig, model: str, task: str, steps: int | None) -> str:
    """One line on what is about to run."""
    colliders = config.num_colliders if config.is_causal else 0
    return (
        f"gcpo train: model={model} task={task} n={config.num_generations} L={colliders} "
        f"estimator={config.estimator} kappa={config.kappa} steps={'unknown' if steps is None else steps} "
        f"output_dir={config.output_dir}"
    )


def launch(argv: list[str], launch_args: list[str]) -> int:
    """Start the same command again under `accelerate launch`, as `trl grpo` does."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    command = [*resolve_accelerate_config_argument(launch_args), "--module", "gcpo.cli", "train", *argv]
    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args(command))
    except subprocess.CalledProcessError as error:
        return error.returncode
    finally:
        del os.environ[_LAUNCHED]
    return 0


def wants_launch(config: GCPOConfig, launch_args: list[str]) -> bool:
    """Whether this process is to start others instead of training itself."""
    from accelerate.commands.config.config_args import default_config_file

    if any(name in os.environ for name in (_LAUNCHED, "LOCAL_RANK", "WORLD_SIZE")):
        return False
    several = not config.use_cpu and torch.accelerator.device_count() > 1
    return bool(launch_args) or several or Path(default_config_file).is_file()


def prepare(argv: list[str]) -> int | tuple[Any, str | None, str]:
    """
    Check the arguments and build the trainer.

    Returns:
        The trainer, the checkpoint to continue from and the line that says what will run; or an exit code, where
        `accelerate launch` has done the work in other processes.
    """
    # TRL's own default trips it; nothing that the user could change.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    with argument_errors():
        script_args, config, model_args, mixture, launch_args = parse(argv)
        check_installed(config, model_args)
        starts_others = wants_launch(config, launch_args)
    if starts_others:
        return launch(argv, launch_args)
    with argument_errors():
        model = check_model(model_args.model_name_or_path)
        checkpoint = resolve_checkpoint(config, script_args.resume)
        if mixture.datasets and script_args.dataset_name:
            print("gcpo train: warning: `datasets` is given, so --dataset_name is not read", file=sys.stderr)
            script_args.dataset_name = None
        train_dataset, eval_dataset = load_splits(script_args, mixture, config.eval_strategy != "no")
        train_dataset = check_prompts(train_dataset)
        if eval_dataset is not None:
            eval_dataset = check_prompts(eval_dataset, "The dataset to evaluate on")
        num_prompts = len(train_dataset) if hasattr(train_dataset, "__len__") else None
        check_size(config, num_prompts)
        rewards: list[Any] = load_rewards(
            script_args.reward_funcs,
            script_args.dataset_name,
            column_names(train_dataset),
            with_model=bool(script_args.reward_model_name_or_path),
        )
        for dataset in (train_dataset, eval_dataset):
            if dataset is not None:
                check_answers(dataset, rewards)
        limit = script_args.reward_timeout
        if limit is not None:
            if not 0 < limit < math.inf:
                raise ValueError(f"`--reward_timeout` must be finite and above 0, got {limit}.")
            rewards = [with_timeout(reward, limit) for reward in rewards]
        rewards = [checked(reward) for reward in rewards]
        if script_args.reward_model_name_or_path:
            rewards = [script_args.reward_model_name_or_path, *rewards]
        if not rewards:
            raise ValueError("`--reward_funcs` or `--reward_model_name_or_path` is missing.")
        init_kwargs = {
            "revision": model_args.model_revision,
            "trust_remote_code": config.trust_remote_code,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        }
        given = dict(cast(dict[str, Any], config.model_init_kwargs or {}))
        if "torch_dtype" in given:  # its former name, which the present one would win over
            given["dtype"] = given.pop("torch_dtype")
        config.model_init_kwargs = init_kwargs | given

        from gcpo.trainer import GCPOTrainer

        trainer = GCPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        trainer.keeps_account = True  # `gcpo report` and `gcpo diagnose` read it, with the causal parts off too
        check_chat_template(trainer.processing_class, train_dataset, model)
        if checkpoint is not None:
            check_same_model(checkpoint, trainer.model)
    steps = count_steps(config, num_prompts)
    return trainer, checkpoint, summary(config, model, script_args.dataset_name or "a mixture of datasets", steps)


def train(trainer: Any, checkpoint: str | None, announcement: str) -> int:
    """Train, save, and return the exit code."""
    say, config = trainer.accelerator.print, trainer.args
    say(announcement, flush=True)
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(StepProgress())
    begun = 0
    if checkpoint is not None:
        begun = step_of(checkpoint)  # now: `save_total_limit` may remove it
        say(f"gcpo train: going on from {checkpoint}", flush=True)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        kept = next((path for path in checkpoints(config.output_dir) if why_incomplete(path) is None), None)
        where = f"continue with --resume_from_checkpoint {kept}" if kept else "no checkpoint was saved"
        print(f"gcpo train: interrupted at step {trainer.state.global_step}; {where}", file=sys.stderr)
        return 130
    except PromptError as error:  # a row of a stream
        raise ArgumentsError(str(error)) from error
    state = trainer.state
    if state.global_step == 0:  # a stream's length is not known before
        wanted = prompts_per_rollout(config)
        raise ArgumentsError(f"No step was made, and nothing is saved: one rollout takes {wanted} prompts.")
    if begun >= state.max_steps:
        say(f"gcpo train: already finished: {checkpoint} is of step {begun}, of {state.max_steps}")
    trainer.save_model(config.output_dir)
    say(f"gcpo train: saved to {config.output_dir}")
    if config.push_to_hub:
        trainer.push_to_hub()
        say(f"gcpo train: pushed to {trainer.hub_model_id}")
    trainer.accelerator.end_training()
    return 0
