"""
The processes of one run: how they are started, and what they owe each other, which is the same options, whole groups,
and an end when one of them is lost.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from trl import GRPOConfig

from gcpo._trl import get_config_model_id
from gcpo.run.redaction import redacted

# Of GRPOConfig's own fields, those that may differ: what is logged where, and where a server is.
_MAY_DIFFER = ("log_", "vllm_server_", "num_completions_to_print")
# Of TrainingArguments, those that decide how many batches there are, of which size, and what a step does with them.
_SHARED = (
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_steps "
    "num_train_epochs learning_rate max_grad_norm seed data_seed bf16 fp16 eval_strategy eval_steps save_strategy "
    "save_steps"
).split()
_LAUNCHED = "GCPO_LAUNCHED"
# How torch's backends say that a peer is gone, or that it did not come in time.
_LOST = ("closed by peer", "timed out", "timeout", "connection reset", "broken pipe", "remote process exited")


def check_processes_agree(args: Any, **others: Any) -> None:
    """
    Compare options over all processes of the run: one that takes another path leaves the rest waiting for it.

    Args:
        args: the GCPOConfig of this process.
        **others: further values to compare, by name.

    Raises:
        ValueError: on every process, naming each option that differs and its value by rank.
    """
    if PartialState().num_processes == 1:
        return
    own = {field.name for field in fields(args)} - {field.name for field in fields(GRPOConfig)}
    grpo = {name for name in GRPOConfig.__annotations__ if not name.startswith(_MAY_DIFFER)}
    mine = {name: getattr(args, name) for name in sorted(own | grpo | set(_SHARED))} | others
    # Compared as they are, shown without secrets.
    everyone = gather_object([{name: (repr(value), repr(redacted(value, name))) for name, value in mine.items()}])
    wrong = [name for name in mine if len({values[name][0] for values in everyone}) > 1]
    if wrong:
        found = "; ".join(f"`{name}`: {', '.join(values[name][1] for values in everyone)}" for name in wrong)
        raise ValueError(f"Every process must get the same options, got by rank {found}.")


class GroupsError(ValueError):
    """What as many processes as there are read at a time is no whole number of groups; with more of them it may be."""


@contextmanager
def explained_groups(args: Any) -> Iterator[None]:
    """Explain TRL's refusals of batches that are no whole number of groups: where their size comes from."""
    given = getattr(args, "generation_batch_size", None)
    try:
        yield
    except ValueError as error:
        rows, n = getattr(args, "generation_batch_size", None), getattr(args, "num_generations", None)
        if str(error).startswith("The global eval batch size"):
            raise GroupsError(
                f"`per_device_eval_batch_size` x processes = {args.per_device_eval_batch_size} x {args.world_size} "
                f"must be divisible by the generations of a prompt in evaluation, {args.num_generations_eval or n} "
                "(`num_generations_eval`, or else `num_generations`)."
            ) from error
        if not (rows and n) or rows % n == 0 or "num_generations" not in str(error):
            raise
        if given is not None:  # whatever the number of processes
            raise ValueError(f"`num_generations` must divide `generation_batch_size` = {given}, got {n}.") from error
        raise GroupsError(
            f"`num_generations` must divide the rows of a rollout, which are per_device_train_batch_size x processes x "
            f"steps_per_generation = {args.per_device_train_batch_size} x {max(args.world_size, 1)} x "
            f"{args.steps_per_generation} = {rows}, got {n}: a group may be spread over processes, but must be whole."
        ) from error


@contextmanager
def explained_loss_of_process(timeout: float) -> Iterator[None]:
    """
    What torch raises here where another process has died, or hangs for longer than `timeout` seconds, as an error that
    says so.
    """
    try:
        yield
    except RuntimeError as error:
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not spread or not any(word in str(error).lower() for word in _LOST):
            raise
        state = PartialState()
        raise RuntimeError(
            f"Process {state.process_index} of {state.num_processes} stops: another one has ended, or did not come to "
            f"a collective operation within `ddp_timeout` = {timeout:g} s. Its own output says why. Continue from the "
            "last checkpoint once that is mended."
        ) from error


def wants_launch(use_cpu: bool, launch_args: list[str]) -> bool:
    """Whether this process is to start others instead of training itself."""
    from accelerate.commands.config.config_args import default_config_file

    if any(name in os.environ for name in (_LAUNCHED, "LOCAL_RANK", "WORLD_SIZE")):
        return False
    several = not use_cpu and torch.accelerator.device_count() > 1
    return bool(launch_args) or several or Path(default_config_file).is_file()


def launch(command: list[str], launch_args: list[str]) -> int:
    """Start `gcpo` with a command's flags under `accelerate launch`, as `trl grpo` does; the exit code."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    argv = [*resolve_accelerate_config_argument(launch_args), "--module", "gcpo.cli", *command]
    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:  # which has said what is wrong
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # as of a shell, where a signal ended it
    finally:
        del os.environ[_LAUNCHED]
    return 0


@contextmanager
def explained_server(args: Any, model: Any) -> Iterator[None]:
    """A vLLM server that does not answer inside, as an error that says how to start one."""
    try:
        yield
    except OSError as error:  # requests' own ConnectionError is no ConnectionError
        if not args.use_vllm or "can't be reached" not in str(error):
            raise
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        raise ConnectionError(
            f"No vLLM server answers at {redacted(url)} (`vllm_server_timeout`: {args.vllm_server_timeout} s). "
            f"Start one on GPUs that the trainer does not use:\n"
            f"    VLLM_SERVER_DEV_MODE=1 vllm serve {name} --port {urlsplit(url).port or 80} "
            '--weight-transfer-config \'{"backend": "nccl"}\' --logprobs-mode processed_logprobs --max-logprobs -1\n'
            "or share the trainer's with `vllm_mode='colocate'`."
        ) from error
