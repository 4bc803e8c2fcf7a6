"""What GCPOTrainer does not take: said before anything is loaded where that can be known, and with one clear error."""

from typing import Any

from transformers import ProcessorMixin

from gcpo.causal.contexts import check_length, longest_prompt
from gcpo.run.prompts import check_prompts


def check_model(trainer: Any, policy: Any) -> None:
    """Refuse a model or a tokenizer that the options cannot be carried out with."""
    args = trainer.args
    if args.is_causal and trainer._is_vlm:
        raise ValueError("`processing_class` must be a tokenizer: GCPO shows candidates as text, without images.")
    if trainer._tokenizer.eos_token_id is None:
        raise ValueError("`processing_class` must have an `eos_token`: without one, no completion ever ends.")
    if args.is_causal:
        longest = longest_prompt(args, args.num_generations, policy.max_completion_length or 0)
        check_length(longest, policy.max_positions, "Showing the candidates and colliders of one prompt")


def check_datasets(arguments: dict[str, Any]) -> dict[str, Any]:
    """The datasets among the trainer's arguments, with every prompt looked at, or to be when its row comes up."""
    train, held_out = arguments.get("train_dataset"), arguments.get("eval_dataset")
    checked = {"train_dataset": check_prompts(train, "`train_dataset`")}
    if isinstance(held_out, dict):
        named = {name: check_prompts(part, f"`eval_dataset[{name!r}]`") for name, part in held_out.items()}
        return checked | {"eval_dataset": named}
    return checked | {"eval_dataset": check_prompts(held_out, "`eval_dataset`")}


def refuse_unsupported(arguments: dict[str, Any]) -> None:
    for name in ("tools", "environment_factory"):
        if arguments.get(name):
            raise ValueError(
                f"`{name}` must be None: GCPO shows candidates to the policy as plain text, which a conversation with "
                "tool calls is not. Use GRPOTrainer, or `kappa=0` with `estimator='none'`."
            )
    if isinstance(arguments.get("processing_class"), ProcessorMixin):
        raise ValueError("`processing_class` must be a tokenizer: GCPO shows candidates as text, without images.")
