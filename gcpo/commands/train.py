"""`gcpo train`: GCPO with the flags and YAML files of `trl grpo`, and those of GCPOConfig."""

import math
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import ProgressCallback
from trl import DatasetMixtureConfig, ModelConfig, get_peft_config, get_quantization_config
from trl.scripts.grpo import GRPOScriptArguments

from gcpo.commands.flags import TrainParser, check_installed
from gcpo.config import GCPOConfig
from gcpo.evaluation.rewards import TASK_REWARD, TRL_REWARDS, check_answers, checked, load_rewards
from gcpo.evaluation.sources import TaskArguments, column_names, load_splits
from gcpo.run.checkpoints import check_same_model, checkpoint_to_resume, checkpoints, step_of, why_incomplete
from gcpo.run.cycle import check_size, count_steps, prompts_per_rollout
from gcpo.run.inputs import ArgumentsError, argument_errors, check_chat_template, check_model
from gcpo.run.processes import GroupsError, launch, wants_launch
from gcpo.run.progress import StepProgress
from gcpo.run.prompts import PromptError, check_prompts
from gcpo.run.reward_timeout import with_timeout


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


def parse(
    argv: list[str], parser: TrainParser | None = None
) -> tuple[GCPOScriptArguments, GCPOConfig, ModelConfig, DatasetMixtureConfig, list[str]]:
    """
    Read flags and the YAML file of `--config`.

    Args:
        argv: flags.
        parser: a new one of `make_parser()`; made here when None.

    Returns:
        The four groups of arguments, and what is meant for `accelerate launch` (as with `trl grpo`, any of its flags
        may stand among the others). A flag that neither knows is an error.
    """
    script_args, config, model_args, mixture, launch_args = (parser or make_parser()).parse_args_and_config(
        argv, return_remaining_strings=True
    )
    return script_args, config, model_args, mixture, launch_args


def run(flags: list[str]) -> int:
    """Train and save the model, or start the processes that do; the exit code."""
    # TRL's own default trips it; nothing that the user could change.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    with argument_errors():
        parser = make_parser()
        try:
            script_args, config, model_args, mixture, launch_args = parse(flags, parser)
        except GroupsError:  # of this process alone; those that are started are more, and check all that follows too
            launch_args = parser.launch_args
            if not wants_launch(parser.use_cpu, launch_args):
                raise
            starts_others = True
        else:
            check_installed(config, model_args)
            starts_others = wants_launch(config.use_cpu, launch_args)
    if starts_others:
        return launch(["train", *flags], launch_args)
    with argument_errors():
        trainer, checkpoint = prepare(script_args, config, model_args, mixture)
    colliders = config.num_colliders if config.is_causal else 0
    steps = count_steps(config, _length(trainer.train_dataset))
    announcement = (
        f"gcpo train: model={model_args.model_name_or_path} task={script_args.dataset_name or 'a mixture of datasets'} "
        f"n={config.num_generations} L={colliders} estimator={config.estimator} kappa={config.kappa} "
        f"steps={'unknown' if steps is None else steps} output_dir={config.output_dir}"
    )
    return train(trainer, checkpoint, announcement)


def prepare(
    script_args: GCPOScriptArguments, config: GCPOConfig, model_args: ModelConfig, mixture: DatasetMixtureConfig
) -> tuple[Any, str | None]:
    """Check the arguments and build the trainer; with it, the checkpoint to go on from."""
    model = check_model(model_args.model_name_or_path)
    checkpoint = checkpoint_to_resume(str(config.output_dir), config.resume_from_checkpoint, script_args.resume)
    if mixture.datasets and script_args.dataset_name:
        print("gcpo train: warning: `datasets` is given, so --dataset_name is not read", file=sys.stderr)
        script_args.dataset_name = None
    train_dataset, eval_dataset = load_splits(script_args, mixture, config.eval_strategy != "no")
    train_dataset = check_prompts(train_dataset)
    if eval_dataset is not None:
        eval_dataset = check_prompts(eval_dataset, "The dataset to evaluate on")
    check_size(config, _length(train_dataset))
    rewards = _load_rewards(script_args, train_dataset, eval_dataset)
    given = dict(cast(dict[str, Any], config.model_init_kwargs or {}))
    if "torch_dtype" in given:  # its former name, which the present one would win over
        given["dtype"] = given.pop("torch_dtype")
    config.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | given

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
    return trainer, checkpoint


def _load_rewards(args: GCPOScriptArguments, train_dataset: Any, eval_dataset: Any) -> list[Any]:
    judge = args.reward_model_name_or_path
    rewards = load_rewards(args.reward_funcs, args.dataset_name, column_names(train_dataset), with_model=bool(judge))
    for dataset in (train_dataset, eval_dataset):
        if dataset is not None:
            check_answers(dataset, rewards)
    limit = args.reward_timeout
    if limit is not None:
        if not 0 < limit < math.inf:
            raise ValueError(f"`--reward_timeout` must be finite and above 0, got {limit}.")
        rewards = [with_timeout(reward, limit) for reward in rewards]
    if not rewards and not judge:
        raise ValueError("`--reward_funcs` or `--reward_model_name_or_path` is missing.")
    return [*([judge] if judge else []), *map(checked, rewards)]


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None  # of a stream it is not known


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
