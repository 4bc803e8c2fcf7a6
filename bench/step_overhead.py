"""
What a step of GCPO costs beside one of GRPO: TRL's own trainer and GCPOTrainer in one process, on one model, with
the learning rate at 0, so that every run of a seed rolls out the same candidates.

    python -m bench.step_overhead --model smollm2
    python -m bench.step_overhead --model 1.5b --dtype bfloat16 --completion_tokens 512     # random weights, a GPU

Completions are forced to their full length: which tokens a model ends on is not what is measured.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.accounting import SECONDS, TOKENS, AccountedGRPOTrainer
from gcpo.tasks import reasoning_gym_dataset
from gcpo.tiny import save_smollm2, tiny_tokenizer

# Qwen2.5's shapes, with random weights: what a step costs does not depend on what they are.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
VOCAB = {"tiny": 1024, "0.5b": 151_936, "1.5b": 151_936}

# What is compared with GRPO. Each is a set of GCPOConfig options on top of the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "GCPO, defaults": {},
    "without the second KL": {"kappa": 0.0},
    "parallel contexts": {"context_attention": "parallel"},
    "1 context drawn": {"num_kl_contexts": 1},
    "1/4 of candidates drawn": {"kl_fraction": 0.25},
    "parallel, 1 context, 1/4 drawn": {"context_attention": "parallel", "num_kl_contexts": 1, "kl_fraction": 0.25},
    "contexts one by one": {"share_prefix": False},
}


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Different for nearly every completion, so that advantages are not 0."""
    return [float(len(set(str(completion)))) for completion in completions]


def prepare_model(name: str, folder: Path) -> None:
    """Save the model to measure, and its tokenizer, to `folder`."""
    if name == "smollm2":
        save_smollm2(folder)
        return
    questions = reasoning_gym_dataset("chain_sum", 64)["prompt"]
    tokenizer = tiny_tokenizer([messages[-1]["content"] for messages in questions])
    config = Qwen2Config(
        vocab_size=max(VOCAB[name], len(tokenizer)),
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SIZES[name],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: Path, args: argparse.Namespace, variant: dict[str, Any] | None) -> dict[str, Any]:
    """Medians over the steps after the first, of GRPO (`variant` None) or of a variant of GCPO."""
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "seed": 0,
        "learning_rate": 0.0,
        "max_steps": args.steps + 1,
        "num_generations": args.num_generations,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.prompts * args.num_generations // args.batch_size,
        "max_completion_length": args.completion_tokens,
        "generation_kwargs": {"min_new_tokens": args.completion_tokens},
        "beta": args.beta,
        "bf16": on_gpu and args.dtype == "bfloat16",
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "num_colliders": args.num_colliders,
        "collider_max_completion_length": args.collider_tokens,
    }
    trainer_class: type[AccountedGRPOTrainer] = GCPOTrainer
    if variant is None:
        options = {key: value for key, value in options.items() if "collider" not in key}
        trainer_class = AccountedGRPOTrainer
    config_class = trl.GRPOConfig if variant is None else GCPOConfig
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    trainer = trainer_class(
        model,
        reward,
        args=config_class(**options, **(variant or {})),
        train_dataset=reasoning_gym_dataset("chain_sum", 64),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "step_time" in entry][1:]

    def median(name: str) -> float:
        return statistics.median(step.get(name) or 0.0 for step in steps)

    return {
        "step_seconds": median("step_time"),
        "step_seconds_all": [step["step_time"] for step in steps],
        "seconds": {phase: median(f"gcpo/seconds/{phase}") for phase in SECONDS},
        "tokens": {kind: median(f"gcpo/tokens/{kind}") for kind in TOKENS},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def show(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    phases = ("rollout", "scoring", "colliders", "contexts", "loss")
    lines = [
        "| | s per step | to GRPO | " + " | ".join(phases) + " | tokens scored | to GRPO |",
        "|---|---|---|" + "---|" * len(phases) + "---|---|",
    ]
    base = results["GRPO"]

    def scored(result: dict[str, Any]) -> float:
        # What passes through the model without gradient; GRPO's rollout alone, where it scores nothing.
        return sum(result["tokens"][kind] for kind in ("scored_query", "scored_colliders", "scored_contexts"))

    for name, result in results.items():
        cells = [f"{result['step_seconds']:.3f}", f"{result['step_seconds'] / base['step_seconds']:.2f}x"]
        cells += [f"{result['seconds'][phase]:.3f}" for phase in phases]
        ratio = f"{scored(result) / scored(base):.1f}x" if scored(base) else "-"
        lines.append(f"| {name} | " + " | ".join([*cells, f"{scored(result):,.0f}", ratio]) + " |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "commit": commit.stdout.strip() or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", *SIZES), default="tiny", help="sizes are random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3, help="measured steps; one more warms up")
    parser.add_argument("--prompts", type=int, default=1, help="prompts per step")
    parser.add_argument("--num_generations", type=int, default=8, help="n")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per forward and backward")
    parser.add_argument("--num_colliders", type=int, default=4, help="L")
    parser.add_argument("--completion_tokens", type=int, default=64)
    parser.add_argument("--collider_tokens", type=int, default=16)
    parser.add_argument("--beta", type=float, default=0.04, help="above 0, GRPO scores its reference model too")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these variants instead of all")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_model(args.model, folder)
        for name in ("GRPO", *(args.only or VARIANTS)):
            print(f"measuring {name}", flush=True)
            results[name] = measure(folder, args, VARIANTS.get(name))
    print(show(results))
    if args.out is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "settings": settings, "results": results}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
