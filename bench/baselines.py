"""
What is compared: this project's functions, plain PyTorch, and what other libraries offer for the same step.

Each implementation takes the tensors of a case as they are and returns a loss, log-probabilities or weights; gradients
follow by autograd. A library that is not installed, or does not run on the device, is named with the reason. Where a
library stops at log-probabilities, the rest of the loss is plain PyTorch.
"""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import gcpo_kernels
from bench import peers
from bench.registry import Case, Tensors
from gcpo_kernels import group

Run = Callable[[Case, Tensors], torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """
    Attributes:
        name: in tables.
        runs: by operation.
        ours: a failed check of it fails the benchmark.
        computes_less: it returns cross-entropy's mean only, no loss per token: no GRPO loss can be built on it. It is
            checked against that, and the tables say so.
        approximate: its gradients leave out small terms on purpose; its error is shown and not checked.
        modules: what must be importable.
        cuda_only: it has no path for other devices.
        compiled: runs only where a case asks for compilation.
        compiles_inside: its library compiles it for every shape, whatever the case asks for.
        fresh: makes a new function for each case, so that none is specialised to another's shapes.
        destroys: tensors that a backward overwrites; they are restored, untimed, before each run.
        prepare: raises where the installed release lacks what it needs.
    """

    name: str
    runs: dict[str, Run]
    ours: bool = False
    computes_less: bool = False
    approximate: bool = False
    modules: tuple[str, ...] = ()
    cuda_only: bool = False
    compiled: bool = False
    compiles_inside: bool = False
    fresh: Callable[[Run], Run] | None = None
    destroys: tuple[str, ...] = ()
    prepare: Callable[[], Any] | None = None

    def missing(self, case: Case, device: torch.device) -> str:
        """Why it does not take part; "" if it does."""
        if self.cuda_only and device.type != "cuda":
            return "needs a CUDA device"
        if case.objective != "grpo" and case.with_gradient and not self.ours and self.modules:
            return "has no causal KL"
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # broken installations raise anything
                return f"{module}: {type(error).__name__}: {error}".splitlines()[0]
        if self.prepare is not None:
            try:
                self.prepare()
            except Exception as error:
                return f"{type(error).__name__}: {error}".splitlines()[0]
        return ""

    def bind(self, case: Case) -> Run:
        run = self.runs[case.op]
        return run if self.fresh is None else self.fresh(run)


# ---------------------------------------------------------------------------------------------------------------------
# This project
# ---------------------------------------------------------------------------------------------------------------------


def _ours_linear(case: Case, x: Tensors) -> torch.Tensor:
    return gcpo_kernels.linear_gcpo_loss(
        x["hidden"], x["weight"], x["token_ids"], **peers.loss_arguments(x), **case.options
    )[0]


def _ours_scoring(case: Case, x: Tensors) -> torch.Tensor:
    return gcpo_kernels.linear_logprob(x["hidden"], x["weight"], x["token_ids"])  # type: ignore[return-value]


def _ours_token(case: Case, x: Tensors) -> torch.Tensor:
    return gcpo_kernels.gcpo_loss(x["logp"], **peers.loss_arguments(x), **case.options)[0]


def _ours_logits(case: Case, x: Tensors) -> torch.Tensor:
    logp = gcpo_kernels.selective_logprob(x["logits"][:, :-1], x["token_ids"])
    return gcpo_kernels.gcpo_loss(logp, **peers.loss_arguments(x), **case.options)[0]  # type: ignore[arg-type]


def _ours_causal(case: Case, x: Tensors) -> torch.Tensor:
    return gcpo_kernels.causal_weights(x["z"], x["context_z"])


# ---------------------------------------------------------------------------------------------------------------------
# Plain PyTorch
# ---------------------------------------------------------------------------------------------------------------------


def _plain_scoring(case: Case, x: Tensors) -> torch.Tensor:
    logits = F.linear(x["hidden"], x["weight"]).float()
    return torch.log_softmax(logits, dim=-1).gather(-1, x["token_ids"].unsqueeze(-1)).squeeze(-1)


def _plain_linear(case: Case, x: Tensors) -> torch.Tensor:
    return peers.plain_loss(case, x, _plain_scoring(case, x))


def _plain_token(case: Case, x: Tensors) -> torch.Tensor:
    return peers.plain_loss(case, x, x["logp"])


def _plain_logits(case: Case, x: Tensors) -> torch.Tensor:
    logp = torch.log_softmax(x["logits"][:, :-1].float(), dim=-1).gather(-1, x["token_ids"].unsqueeze(-1)).squeeze(-1)
    return peers.plain_loss(case, x, logp)


def _plain_causal(case: Case, x: Tensors) -> torch.Tensor:
    return group.causal_weights(x["z"], x["context_z"])


PLAIN: dict[str, Run] = {
    "linear_loss": _plain_linear,
    "scoring": _plain_scoring,
    "token_loss": _plain_token,
    "logits_loss": _plain_logits,
    "causal_weights": _plain_causal,
}


def _compile(run: Run) -> Run:
    torch._dynamo.reset()
    return torch.compile(run, dynamic=False)


IMPLEMENTATIONS = (
    Implementation(
        "gcpo",
        {
            "linear_loss": _ours_linear,
            "scoring": _ours_scoring,
            "token_loss": _ours_token,
            "logits_loss": _ours_logits,
            "causal_weights": _ours_causal,
        },
        ours=True,
    ),
    Implementation("eager PyTorch", PLAIN),
    Implementation("torch.compile", PLAIN, compiled=True, fresh=_compile),
    Implementation(
        "TRL",
        {
            "linear_loss": peers.trl_linear,
            "scoring": peers.trl_scoring,
            "token_loss": peers.trl_token,
            "logits_loss": peers.trl_logits,
        },
        modules=("trl.trainer.grpo_trainer", "trl.kernels"),
    ),
    Implementation(
        "Liger fused linear GRPO",
        {"linear_loss": peers.liger_linear},
        modules=("liger_kernel.chunked_loss.grpo_loss",),
        compiles_inside=True,
    ),
    Implementation(
        "Liger scaled cross-entropy + loss",
        {"linear_loss": peers.liger_nll_linear, "scoring": peers.liger_scoring},
        modules=("liger_kernel.ops.fused_linear_scaled_cross_entropy",),
    ),
    Implementation(
        "Liger triton_grpo_loss",
        {"logits_loss": peers.liger_logits},
        modules=("liger_kernel.transformers.grpo_loss",),
        cuda_only=True,
        destroys=("logits",),
    ),
    Implementation(
        "cut cross-entropy + loss", peers.cce(False), approximate=True, modules=("cut_cross_entropy",), cuda_only=True
    ),
    Implementation("cut cross-entropy, exact + loss", peers.cce(True), modules=("cut_cross_entropy",), cuda_only=True),
    Implementation(
        "torch linear_cross_entropy + loss",
        {"linear_loss": peers.torch_linear, "scoring": peers.torch_scoring},
        prepare=lambda: torch.nn.LinearCrossEntropyOptions,
    ),
    Implementation(
        "torch linear_cross_entropy",
        {"linear_loss": lambda case, x: peers.torch_nll(x, "mean")},
        computes_less=True,
        prepare=lambda: torch.nn.LinearCrossEntropyOptions,
    ),
    Implementation(
        "QuACK chunked_linear_cross_entropy",
        {"linear_loss": peers.quack_linear},
        computes_less=True,
        modules=("quack.linear_cross_entropy",),
        cuda_only=True,
    ),
)


@dataclass(frozen=True)
class Choice:
    """
    Which implementations take part.

    Attributes:
        only: names; None: all.
        without: names to leave out.
        compiled: whether those that compile take part: compiling can take longer than all that is measured.
    """

    only: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    compiled: bool = True

    def of(self, case: Case) -> list[Implementation]:
        """Those of a case that are chosen."""
        return [
            x
            for x in implementations(case)
            if (self.only is None or x.name in self.only)
            and x.name not in self.without
            and (self.compiled or not (x.compiled or x.compiles_inside))
        ]


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The flags that `chosen` reads."""
    names = [x.name for x in IMPLEMENTATIONS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"these of: {', '.join(names)}")
    parser.add_argument("--without", nargs="+", metavar="NAME", choices=names, default=[], help="all but these")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile and what compiles inside")


def chosen(args: argparse.Namespace) -> Choice:
    return Choice(None if args.only is None else tuple(args.only), tuple(args.without), not args.no_compile)


def implementations(case: Case) -> list[Implementation]:
    """Those that have the case's operation; compiled ones where the case asks for compilation."""
    return [x for x in IMPLEMENTATIONS if case.op in x.runs and (case.compiled or not x.compiled)]
