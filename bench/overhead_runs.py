"""
The runs that `bench.step_overhead` compares: trainers on shared weights, driven one optimizer step at a time, and the
peak memory of each phase of a step.

On a GPU, memory is the caching allocator's peak. On a CPU it is the kernel's high-water mark of resident memory, set
back at the beginning of every phase, in a fresh process for every run, in which blocks of 1 MiB and more are mapped one
by one, so that what is freed is gone. What GRPO's process holds between steps beyond weights and optimizer state
(libraries, the interpreter) is taken off all.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import io
import itertools
import multiprocessing
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, set_seed

from bench.candidate_lengths import EndsAt
from gcpo import GCPOConfig, GCPOTrainer
from gcpo.causal.account import SECONDS, TOKENS, StepAccount
from gcpo.demo.tiny import save_smollm2, tiny_tokenizer
from gcpo.evaluation.tasks import reasoning_gym_dataset
from gcpo.forward.generation import read_repeated_prompts_once
from gcpo.planning.architecture import SIZES
from gcpo.planning.candidate_lengths import draw_lengths
from gcpo.run.meter import AccountedGRPOTrainer

_TINY = {
    **SIZES["0.5b"],
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
}
MODELS = ("tiny", "smollm2", "0.5b", "1.5b", "3b", "7b")
_PROMPTS = 64
_MAPPED = 1 << 20  # bytes from which a block is mapped on its own, and given back when it is freed


@dataclass(frozen=True)
class Variant:
    """Options on top of GCPOConfig's defaults, or of the paper's settings."""

    options: dict[str, Any]
    paper: bool = False


class GRPOReadingPromptsOnce(GCPOTrainer):
    """GRPO (`kappa=0`, `estimator="none"`), but its rollout reads a prompt once for all completions, as GCPO's does."""

    keeps_account = True

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple:
        with read_repeated_prompts_once(self._policy.backbone):
            return super()._generate_single_turn(*args, **kwargs)


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Different for nearly every completion, so that advantages are not 0."""
    return [float(len(set(str(completion)))) for completion in completions]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_model(name: str, folder: Path) -> None:
    """
    Save the tokenizer and the config of the model to measure to `folder`, and SmolLM2's weights. Sizes have random
    weights, as no cost depends on them: `load_model` draws these.
    """
    if name == "smollm2":
        save_smollm2(folder)
        return
    questions = reasoning_gym_dataset("chain_sum", _PROMPTS)["prompt"]
    tokenizer = tiny_tokenizer([messages[-1]["content"] for messages in questions])
    config = AutoConfig.for_model(
        **(_TINY if name == "tiny" else SIZES[name]),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder: Path | str, dtype: torch.dtype) -> Any:
    """
    The model of `prepare_model`, on its device. Random weights are drawn there, the same on every call: on a CPU, 1.5B
    of them take half a minute, and a save and a load of 6 GB.
    """
    if list(Path(folder).glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device())
    config = AutoConfig.from_pretrained(folder)
    set_seed(0)
    with device():
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # as a model that is loaded


def make_config(args: argparse.Namespace, variant: Variant | None) -> trl.GRPOConfig:
    """The options of GRPO (`variant` None) or of a variant of GCPO, with the learning rate at 0."""
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(dir=args.folder),
        "seed": 0,
        "learning_rate": 0.0,
        "max_steps": 1,
        "num_generations": args.num_generations,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.prompts * args.num_generations // args.batch_size,
        "max_completion_length": args.completion_tokens,
        "generation_kwargs": {"min_new_tokens": args.completion_tokens},
        "beta": args.beta,
        "bf16": on_gpu and args.dtype == "bfloat16",
        "use_cpu": not on_gpu,
        "gradient_checkpointing": args.gradient_checkpointing,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if variant is None:
        return trl.GRPOConfig(**options)
    if variant.paper:
        return GCPOConfig.paper(**{**options, **variant.options})
    return GCPOConfig(**{**options, "num_colliders": args.num_colliders, **variant.options})


def candidate_lengths(args: argparse.Namespace, seed: int) -> list[int]:
    """Tokens of each candidate of the step with this seed, in the order of TRL's rows."""
    return draw_lengths(args.lengths, args.completion_tokens, args.prompts * args.num_generations, seed)


class Weights:
    """A model on its device, of which every trainer gets a copy that shares weights, gradients and optimizer state."""

    def __init__(self, args: argparse.Namespace):
        self.model = load_model(args.folder, getattr(torch, args.dtype))
        if args.beta:  # TRL loads the reference model from where the model came from
            self.model.save_pretrained(args.folder)
            self.model.config._name_or_path = str(args.folder)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.reference: Any = None

    def view(self) -> Any:
        """Modules of their own around the same parameters."""
        shared = itertools.chain(self.model.parameters(), self.model.buffers())
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared})


class Run:
    """A trainer that takes one optimizer step when asked."""

    def __init__(self, weights: Weights, args: argparse.Namespace, variant: Variant | None):
        config = make_config(args, variant)
        trainer_class: type[AccountedGRPOTrainer] = AccountedGRPOTrainer
        if isinstance(config, GCPOConfig):
            trainer_class = GCPOTrainer if config.is_causal else GRPOReadingPromptsOnce
        self.trainer = trainer_class(
            weights.view(),
            reward,
            args=config,
            train_dataset=reasoning_gym_dataset("chain_sum", _PROMPTS),
            processing_class=AutoTokenizer.from_pretrained(args.folder),
            optimizers=(weights.optimizer, None),
        )
        if self.trainer.ref_model is not None:  # of all runs, one
            weights.reference = weights.reference or self.trainer.ref_model
            self.trainer.ref_model = weights.reference
        self.account = MemoryAccount()
        self.trainer._accounts[True] = self.account
        self.args, self.seed = args, 0
        self.prompt_tokens: list[int] = []  # of each prompt of the last rollout
        self._watch_generation()
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer.train()  # a step that warms up, after which the trainer is ready for more
        self._batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def _watch_generation(self) -> None:
        """
        Note the prompts' lengths, and let candidates end at the lengths of the step. Outputs sampled under contexts
        have lengths of the same distribution; colliders keep their full length, which `min_new_tokens` forces.
        """
        model, contexts = self.trainer.model, random.Random()
        generate = model.generate

        def generate_with_lengths(*given: Any, **kwargs: Any) -> Any:
            phase, (count, width) = self.account.current, kwargs["input_ids"].shape
            if phase == "rollout":
                self.prompt_tokens = kwargs["attention_mask"].sum(dim=1)[:: self.args.num_generations].tolist()
            if self.args.lengths == "full":
                return generate(*given, **kwargs)
            if phase == "rollout":
                contexts.seed(self.seed)
                lengths = candidate_lengths(self.args, self.seed)
            elif phase == "contexts":
                seed = contexts.getrandbits(64)
                lengths = draw_lengths(self.args.lengths, self.args.completion_tokens, count, seed)
            else:
                return generate(*given, **kwargs)
            ends = EndsAt(lengths, width, self.trainer.eos_token_ids)
            return generate(*given, logits_processor=LogitsProcessorList([ends]), **kwargs)

        model.generate = generate_with_lengths

    def step(self, seed: int) -> dict[str, Any]:
        """Seconds and tokens of a step, and peak bytes. Runs that take the same step have the same seed."""
        trainer = self.trainer
        self.seed = seed
        set_seed(seed)
        trainer.model.train()
        trainer._metrics["train"].clear()
        self.account.begin()
        start = time.perf_counter()
        for _ in range(trainer.args.gradient_accumulation_steps):
            trainer.training_step(trainer.model_wrapped, next(self._batches))
        with self.account.phase("optimizer"):
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        elapsed = time.perf_counter() - start
        trainer.state.global_step += 1
        metrics = trainer._metrics["train"]
        return {
            "step_seconds": elapsed,
            "seconds": {phase: metrics[f"gcpo/seconds/{phase}"][0] for phase in SECONDS},
            "tokens": {kind: metrics[f"gcpo/tokens/{kind}"][0] for kind in TOKENS},
            "peak_memory_bytes": dict(self.account.peaks),
            "prompt_tokens": self.prompt_tokens,
        }


class MemoryAccount(StepAccount):
    """A StepAccount that also keeps each phase's peak memory, in bytes."""

    def __init__(self, on_cpu: bool = False) -> None:
        super().__init__()
        self.on_cpu = on_cpu  # whether to read the process's memory, where there is no GPU
        self.peaks: dict[str, int] = {}
        self._open: list[str] = []

    @property
    def current(self) -> str | None:
        """The innermost phase that is open."""
        return self._open[-1] if self._open else None

    def begin(self) -> None:
        self.peaks.clear()
        self._reset()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._credit()
        self._open.append(name)
        try:
            with super().phase(name):
                yield
        finally:
            self._credit()
            self._open.pop()

    def _credit(self) -> None:
        """Charge what was held since the last change of phase to the phase that is open."""
        peak = None
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        elif self.on_cpu:
            peak = resident("VmHWM")
        if peak is not None:
            name = self.current or "other"
            self.peaks[name] = max(self.peaks.get(name, 0), peak)
            self._reset()

    def _reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif self.on_cpu:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here


def resident(name: str) -> int:
    """Bytes of this process by the kernel's count: "VmRSS", or its high-water mark "VmHWM"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {name} in /proc/self/status")


def quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def cpu_memory(args: argparse.Namespace, variants: dict[str, Variant | None]) -> dict[str, dict[str, int]]:
    """Peak bytes per phase of each variant's second step, a process each. The first variant is GRPO."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once; every process starts from there
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        found = {name: pool.submit(_cpu_memory, args, variant).result() for name, variant in variants.items()}
    base = next(iter(found.values()))[1]
    return {name: {phase: peak - base for phase, peak in peaks.items()} for name, (peaks, _) in found.items()}


def _cpu_memory(args: argparse.Namespace, variant: Variant | None) -> tuple[dict[str, int], int]:
    """Resident bytes: the peak of each phase, and what is no weight and no optimizer state between steps."""
    quiet()
    torch.set_num_threads(args.threads)
    mmap_threshold, trim_threshold = -3, -1  # malloc.h's numbers of the two
    libc = ctypes.CDLL(None)
    for number in (mmap_threshold, trim_threshold):
        libc.mallopt(number, _MAPPED)
    weights = Weights(args)
    run = Run(weights, args, variant)
    gc.collect()
    libc.malloc_trim(0)
    held = [*weights.model.parameters(), *(s for state in weights.optimizer.state.values() for s in state.values())]
    if weights.reference is not None:
        held += weights.reference.parameters()
    between = resident("VmRSS") - sum(tensor.numel() * tensor.element_size() for tensor in held)
    run.account.on_cpu = True
    return run.step(1)["peak_memory_bytes"], between
