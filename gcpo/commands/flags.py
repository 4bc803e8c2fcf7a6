"""Flags and YAML files of `gcpo train` and `gcpo plan`: TRL's parser, which names what is wrong in one line."""

import difflib
import json
import sys
from argparse import Action, ArgumentTypeError
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import GRPOConfig, ModelConfig, TrlParser

# What releases of TRL and transformers before those supported here called something else.
RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "include_inputs_for_metrics": "include_for_metrics",
    "warmup_ratio": "warmup_steps",  # which takes a share of all steps below 1
    "group_by_length": "train_sampling_strategy",
    "use_liger": "use_liger_kernel",
    "use_liger_loss": "use_liger_kernel",
    "vllm_max_model_len": "vllm_max_model_length",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "wandb_log_unique_prompts": "log_unique_prompts",
}
# What they had and these do not.
GONE = {
    "max_prompt_length": "prompts are not cut any more; filter the dataset",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "overwrite_output_dir": "output_dir is written to in any case",
    "save_safetensors": "checkpoints are in that format in any case",
}
_JSON_OR_FILE = ("accelerator_config", "fsdp_config", "deepspeed")


class TrainParser(TrlParser):
    """TRL's parser: one line per error instead of all the flags, and no flag that nobody reads."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # For `accelerate launch`; read where making the options has failed.
        self.launch_args: list[str] = []
        self.use_cpu = False
        self._names_are_keys = False
        dicts = {name for name, hint in get_type_hints(GRPOConfig).items() if _takes_dict(hint)}
        for action in self._actions:
            if action.dest in dicts:
                # Read here to be checked; TRL reads most of them from the text, in a way of its own.
                as_text = action.dest in GRPOConfig._VALID_DICT_FIELDS
                action.type = _Json(as_text, may_be_file=action.dest in _JSON_OR_FILE)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}\n`{self.prog} --help` lists every flag.", file=sys.stderr)
        raise SystemExit(2)

    def parse_args_and_config(self, args: Any = None, *rest: Any, **kwargs: Any) -> tuple[Any, ...]:
        given = sys.argv[1:] if args is None else args
        self.launch_args = []
        argv = [part for arg in given for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        if argv.count("--config") > 1:
            raise ValueError("`--config` must be given once: flags beside it change what the file says.")
        if "--config" in argv:
            value = argv[argv.index("--config") + 1 :][:1]
            if not value or not Path(value[0]).is_file():
                raise FileNotFoundError(f"`--config` must be a YAML file, got {value[0] if value else 'nothing'!r}.")
        try:
            return super().parse_args_and_config(argv, *rest, **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"`--config` must be a YAML file: {' '.join(str(error).split())}.") from error

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        values: dict[str, Any] = {}
        for key, value in kwargs.items():
            name = key.replace("-", "_")  # as of flags, both spellings
            if name in values:
                raise ValueError(f"`--config`: `{name}` must be given once, got it as `{key}` too.")
            action = next((action for action in self._actions if action.dest == name), None)
            values[name] = value if action is None else _value_of_yaml(action, value)
        self._names_are_keys = True
        try:
            return self._for_accelerate(super().set_defaults_with_config(**values))
        finally:
            self._names_are_keys = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        namespace, rest = super().parse_known_args(args, namespace)
        self.use_cpu = bool(getattr(namespace, "use_cpu", False))
        return namespace, self._for_accelerate(rest)

    def _for_accelerate(self, rest: list[str]) -> list[str]:
        if not rest:
            return rest
        from accelerate.commands.launch import launch_command_parser

        known = {"--accelerate_config", *launch_command_parser()._option_string_actions}
        if not rest[0].startswith("-"):
            self.error(f"unexpected argument {rest[0]!r}")
        for flag in (arg.split("=", 1)[0] for arg in rest if arg.startswith("--")):
            if flag not in known:
                self.error(self._unknown(flag, known))
        self.launch_args += rest
        return rest

    def _unknown(self, flag: str, of_accelerate: Iterable[str]) -> str:
        """What to say of a flag that nobody knows, or of a key, which comes here as one."""
        name, keys = flag.removeprefix("--").replace("-", "_"), self._names_are_keys
        found = f"`--config`: unknown key {name}" if keys else f"unknown flag {flag}"
        dash = "" if keys else "--"
        if name in RENAMED:
            return f"{found}: it is called {dash}{RENAMED[name]} now"
        if name in GONE:
            return f"{found}, which there is no more: {GONE[name]}"
        if keys and f"--{name}" in self._option_string_actions:  # --no_...
            return f"{found}: write {name.removeprefix('no_')}: false"
        flags = [known for known in self._option_string_actions if known.startswith("--")]
        names = {known[2:].replace("-", "_") for known in (*flags, *of_accelerate)}
        close = difflib.get_close_matches(name, names, n=1)
        return found + (f" (did you mean {dash}{close[0]}?)" if close else "")


def _takes_dict(hint: Any) -> bool:
    return any(kind is dict or getattr(kind, "__origin__", None) is dict for kind in get_args(hint))


class _Json:
    """The `type` of a flag that takes a dict as JSON, or `none`; TRL takes some of them from a file too."""

    def __init__(self, as_text: bool, may_be_file: bool):
        self.as_text = as_text
        self.wanted = "a JSON object such as '{\"name\": 1}'" + (" or a file that holds one" if may_be_file else "")
        self.may_be_file = may_be_file

    def __call__(self, text: str) -> dict[str, Any] | str | None:
        text = text.strip()
        if text.lower() in ("none", "null"):
            return None
        if self.may_be_file and not text.startswith("{"):
            if not Path(text).is_file():
                raise ArgumentTypeError(f"must be {self.wanted}, got {text!r}")
            return text
        try:
            value = json.loads(text)
        except ValueError as error:  # the text itself is not shown: it may hold a token
            raise ArgumentTypeError(f"must be {self.wanted}, got what is no JSON ({error})") from error
        if not isinstance(value, dict):
            raise ArgumentTypeError(f"must be {self.wanted}, got {type(value).__name__}")
        return text if self.as_text else value


def _value_of_yaml(action: Action, value: Any) -> Any:
    """
    A value of a YAML file, which the parser takes as it is unless it is text.

    Raises:
        TypeError: it is of another type than the option.
        ValueError: it is none of the option's choices.
    """
    if value is None:
        return value
    if value is False and action.choices is not None and "no" in action.choices:
        return "no"  # which YAML reads as False
    if action.nargs == "+":
        return [value] if not isinstance(value, list) and action.type in (str, float) else value
    if isinstance(value, str):
        if action.choices is not None and value not in action.choices:
            raise ValueError(f"`{action.dest}` must be one of {', '.join(map(str, action.choices))}, got {value!r}.")
        return value
    if isinstance(action.type, _Json):
        if not isinstance(value, dict):
            raise TypeError(f"`{action.dest}` must be a mapping, got {value!r}.")
        return value
    name = getattr(action.type, "__name__", "")
    if name == "string_to_bool":
        if not isinstance(value, bool) and value not in (0, 1):
            raise TypeError(f"`{action.dest}` must be true or false, got {value!r}.")
        return bool(value)
    if name == "str":
        if isinstance(value, dict):
            raise TypeError(f"`{action.dest}` must be text, got {value!r}.")
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    kinds = {"int": (int, "an integer"), "float": (int | float, "a number")}
    kind, wanted = kinds.get(name, (object, ""))
    if kind is not object and (isinstance(value, bool) or not isinstance(value, kind)):
        raise TypeError(f"`{action.dest}` must be {wanted}, got {value!r}.")
    return value


def check_installed(config: GRPOConfig, model_args: ModelConfig) -> None:
    """Refuse flags whose package is missing, before a model is loaded."""
    if config.use_vllm and find_spec("vllm") is None:
        raise ValueError(
            '`--use_vllm` needs vLLM, which is not installed: `pip install ".[vllm]"` from a checkout, in an '
            "environment of its own."
        )
    if (model_args.load_in_4bit or model_args.load_in_8bit) and find_spec("bitsandbytes") is None:
        flag = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit"
        raise ValueError(f"`--{flag}` needs bitsandbytes, which is not installed: `pip install bitsandbytes`.")
    if model_args.use_peft and find_spec("peft") is None:
        raise ValueError("`--use_peft` needs peft, which is not installed: `pip install peft`.")
    if config.use_liger_kernel and find_spec("liger_kernel") is None:
        raise ValueError("`--use_liger_kernel` needs liger-kernel, which is not installed: `pip install liger-kernel`.")
    for name in config.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            choices = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"`--report_to` must be none, all, or some of {choices}, got {name!r}.")
        if name not in get_available_reporting_integrations():
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except (RuntimeError, ImportError) as error:
                raise ValueError(f"`--report_to {name}`: {' '.join(str(error).split())}") from error
