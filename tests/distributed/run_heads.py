"""
One of two processes that checks output layers spread over both. Started by test_heads.py under torch.distributed.run,
with the names of the checks to run.
"""

import itertools
import os
import sys
from typing import Any

import grid
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from gcpo.run.leaving import leave
from gcpo_kernels import gcpo_loss, linear_gcpo_loss, linear_logprob, torch_backend
from gcpo_kernels.testing import assert_close_to_truth, make_linear_inputs, poison, with_gradients

VOCAB = 37
SIZES = (30, 7)  # rows of the weight that each process holds
LEARNING_RATE = 0.05


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """This process's rows of a weight or bias, or of its gradient."""
    return x.split(SIZES)[dist.get_rank()]


def sharded(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {k: rows_of(inputs[k]) for k in ("weight", "bias") if inputs.get(k) is not None}


def assert_equal(ours: Any, want: Any, what: str) -> None:
    """Equal but for roundings: relative to the largest entry, in the type of the tensors."""
    assert ours.dtype == want.dtype and ours.shape == want.shape, what
    error, size = (ours - want).double().abs().max().item(), want.double().abs().max().item()
    assert error <= 64 * torch.finfo(want.dtype).eps * max(size, 0.1), f"{what}: {error} of {size}"


# ---------------------------------------------------------------------------------------------------------------------
# A vocabulary divided over a process group
# ---------------------------------------------------------------------------------------------------------------------


def small_tiles() -> None:
    """Tiles of a few rows, as many as the vocabulary allows: processes must agree although theirs differ in size."""
    torch_backend._TILE_BYTES["cpu"] = 1280
    torch_backend._MIN_TILE_ROWS["cpu"] = 3
    torch_backend._BLOCK_ELEMENTS["cpu"] = 80


def check_loss(inputs: dict[str, Any], options: dict[str, Any], backend: str, what: str) -> None:
    """Loss, metrics and every gradient with the vocabulary divided are those without."""
    options = dict(options)
    want, want_metrics, want_grads = grid.run("linear_gcpo_loss", inputs, options, backend)
    options["process_group"] = dist.group.WORLD
    loss, metrics, grads = grid.run("linear_gcpo_loss", sharded(inputs), options, backend)
    assert_equal(loss, want, f"{what}: loss")
    assert metrics.keys() == want_metrics.keys()
    for key in metrics:
        assert_equal(metrics[key], want_metrics[key], f"{what}: {key}")
    assert grads.keys() == want_grads.keys()
    for key, grad in grads.items():
        expected = want_grads[key]
        assert (grad is None) == (expected is None), f"{what}: {key}"
        if grad is not None:
            expected = rows_of(expected) if key in ("weight", "bias") else expected
            assert_equal(grad, expected, f"{what}: gradient of {key}")


def inputs_for(backend: str, seed: int = 0) -> dict[str, Any]:
    """float64 where that is possible, and few tokens for Triton's interpreter, which takes its time."""
    if backend == "torch":
        return make_linear_inputs(vocab=VOCAB, dtype=torch.float64, seed=seed)
    return make_linear_inputs(batch=4, tokens=3, vocab=VOCAB, seed=seed)


def check_losses(backend: str) -> None:
    cases = grid.cases() if backend == "torch" else grid.cases()[::13]
    for number, (options, changes) in enumerate(cases):
        head = dict(grid.HEADS[number % len(grid.HEADS)])
        inputs = grid.change(inputs_for(backend, number), changes)
        if "bias" in head:
            inputs["bias"] = head.pop("bias")
        check_loss(inputs, options | head, backend, f"{backend} {options} {head}")


def check_logprob(inputs: dict[str, Any], head: dict[str, Any], backend: str, what: str) -> None:
    """Log-probabilities, entropies and every gradient with the vocabulary divided are those without."""
    keys = ("hidden", "weight", "bias", "token_ids")
    results = []
    for arguments, group in ((inputs, None), (sharded(inputs), dist.group.WORLD)):
        options = head | {"return_entropy": True, "backend": backend, "process_group": group}
        leaves = with_gradients({k: arguments[k] for k in keys}, "hidden", "weight", "bias")
        logp, entropy = linear_logprob(**leaves, **options)
        upstream = torch.linspace(-1, 2, logp.numel(), dtype=logp.dtype).view(logp.shape)
        torch.autograd.backward([logp, entropy], [upstream, upstream.flip(0)])
        with torch.no_grad():  # without gradients, another path
            scored = linear_logprob(**leaves, **options)
        grads = {k: leaves[k].grad for k in keys[:3] if leaves[k] is not None}
        results.append((logp.detach(), entropy.detach(), *scored, grads))
    for ours, want in zip(results[1][:4], results[0][:4], strict=True):
        assert_equal(ours, want, what)
    for key, grad in results[1][4].items():
        want = results[0][4][key]
        assert_equal(grad, rows_of(want) if key != "hidden" else want, f"{what}: gradient of {key}")


def check_logprobs(backend: str) -> None:
    for number, head in enumerate(grid.HEADS):
        inputs = inputs_for(backend, number)
        inputs["bias"] = None if "bias" in head else inputs["bias"]
        check_logprob(inputs, {k: x for k, x in head.items() if k != "bias"}, backend, f"{backend} {head}")
    inputs = inputs_for(backend)
    for rows in (slice(0, 30), slice(30, 37)):  # one process's logits far above the other's
        moved = inputs | {"bias": inputs["bias"].clone()}
        moved["bias"][rows] += 1000.0
        check_logprob(moved, {}, backend, f"{backend} rows {rows} far above the others")


def check_odd_inputs(backend: str) -> None:
    """All logits of one process at -inf, garbage where masked, a frozen head."""
    inputs = inputs_for(backend)
    options = {"beta": 0.04, "kappa": 0.06}
    some = inputs | {"bias": inputs["bias"].clone(), "token_ids": inputs["token_ids"] % 30}
    some["bias"][30:] = -torch.inf
    check_loss(some, options, backend, f"{backend} a part at -inf")
    check_loss(poison(inputs, float("nan")), options, backend, f"{backend} garbage where masked")
    frozen = sharded(inputs)
    frozen["hidden"] = frozen["hidden"].clone().requires_grad_()
    loss, _ = linear_gcpo_loss(**frozen, **options, process_group=dist.group.WORLD, backend=backend)
    loss.backward()
    _, _, grads = grid.run("linear_gcpo_loss", inputs, options, backend)
    assert_equal(1.7 * frozen["hidden"].grad, grads["hidden"], "frozen head")


def check_half_precision() -> None:
    """bfloat16: within twice the error of the undivided function."""
    inputs = make_linear_inputs(vocab=VOCAB, dtype=torch.bfloat16)
    arguments = {k: inputs[k] for k in ("hidden", "weight", "bias", "token_ids")}
    truth = linear_logprob(**{k: x.double() if x.is_floating_point() else x for k, x in arguments.items()})
    plain = linear_logprob(**arguments)
    ours = linear_logprob(**sharded(arguments), process_group=dist.group.WORLD)
    assert_close_to_truth(ours, truth, plain)


def check_refusals() -> None:
    """What is wrong is refused, by every process alike: none may wait for one that has given up."""
    inputs = sharded(make_linear_inputs(vocab=VOCAB))
    arguments = {k: inputs[k] for k in ("hidden", "weight", "bias", "token_ids")}
    group = {"process_group": dist.group.WORLD}
    with pytest.raises(ValueError, match=r"`token_ids` must be in \[0, 37\).*got values from .* to 37"):
        linear_logprob(**arguments | {"token_ids": torch.full_like(inputs["token_ids"], VOCAB)}, **group)
    fewer = {k: arguments[k][: 5 - dist.get_rank()] for k in ("hidden", "token_ids")}
    with pytest.raises(ValueError, match=r"`hidden` must be the same on every process.*got tokens \[35, 28\]"):
        linear_logprob(**arguments | fewer, **group)
    none = {k: inputs[k][: 7 * dist.get_rank()] for k in ("weight", "bias")}
    with pytest.raises(ValueError, match=r"`weight` must have at least one row on every process.*got \(0, 7\) by rank"):
        linear_logprob(**arguments | none, **group)
    with pytest.raises(TypeError, match=r"`process_group` must be a torch.distributed.ProcessGroup, got str"):
        linear_logprob(**arguments, process_group="tp")
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(make_linear_inputs(vocab=VOCAB)["weight"], mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"`process_group` takes .* got a DTensor: pass `weight.to_local\(\)`"):
        linear_logprob(**arguments | {"weight": weight}, **group)
    put_away = torch.nn.Parameter(torch.empty(0))
    put_away.ds_status = "NOT_AVAILABLE"
    with pytest.raises(ValueError, match=r"`weight` is a parameter that DeepSpeed ZeRO-3 has put away.*in the forward"):
        linear_logprob(**arguments | {"weight": put_away})


def vocabulary(backend: str) -> None:
    small_tiles()
    check_losses(backend)
    check_logprobs(backend)
    check_odd_inputs(backend)
    if backend == "torch":
        check_half_precision()
        check_refusals()


# ---------------------------------------------------------------------------------------------------------------------
# A weight divided by FSDP2 or ZeRO-3, with other tokens on each process
# ---------------------------------------------------------------------------------------------------------------------


def dtensor() -> None:
    """A DTensor is gathered once, and its gradient is the mean over processes; the same with the bias."""
    mesh = init_device_mesh("cpu", (2,))
    rank, options = dist.get_rank(), {"beta": 0.04, "kappa": 0.06, "loss_type": "dr_grpo", "max_completion_length": 7}
    batches = [make_linear_inputs(vocab=VOCAB, seed=seed) for seed in (0, 1)]
    head = {k: batches[0][k] for k in ("weight", "bias")}
    wants = [grid.run("linear_gcpo_loss", batch | head, options, "torch") for batch in batches]
    spread = {k: distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for k, x in head.items()}
    with CommDebugMode() as communication:
        loss, _ = linear_gcpo_loss(**batches[rank] | spread, **options)
        (1.7 * loss).backward()
    assert_equal(loss.detach(), wants[rank][0], "loss")
    for key, x in spread.items():
        assert isinstance(x.grad, DTensor) and x.grad.placements == (Shard(0),)
        assert_equal(x.grad.full_tensor(), (wants[0][2][key] + wants[1][2][key]) / 2, key)
    counts = {str(key).split(".")[-1]: count for key, count in communication.get_comm_counts().items()}
    assert counts == {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}, counts  # one each for weight and bias


class Policy(torch.nn.Module):
    """Token ids in, GCPO's loss out, with the output layer's weight handed to the kernel inside the forward."""

    def __init__(self, tied: bool, fused: bool):
        super().__init__()
        self.fused = fused
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCAB, 13)
        self.body = torch.nn.Linear(13, 13)
        self.head = torch.nn.Linear(13, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, token_ids: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        hidden = torch.tanh(self.body(self.embed(token_ids)))
        options = {"beta": 0.04, "kappa": 0.06, "loss_type": "dr_grpo", "max_completion_length": 7}
        if self.fused:
            return linear_gcpo_loss(hidden, self.head.weight, bias=self.head.bias, **batch, **options)[0]
        batch = dict(batch)
        logp = linear_logprob(hidden, self.head.weight, batch.pop("token_ids"), bias=self.head.bias)
        return gcpo_loss(logp, **batch, **options)[0]


def batches(rank: int | None) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Two steps of two micro-batches: this process's half of the rows, or all of them."""
    out = []
    for seed in range(4):
        inputs = make_linear_inputs(batch=6, vocab=VOCAB, seed=seed)
        batch = {k: x for k, x in inputs.items() if k not in ("hidden", "weight", "bias")}
        if rank is not None:
            batch = {k: x[3 * rank : 3 * rank + 3] for k, x in batch.items()}
        out.append((batch["token_ids"].roll(1, dims=1), batch))
    return out


def trained(model: torch.nn.Module, rank: int | None) -> dict[str, torch.Tensor]:
    """Parameters after two steps of SGD with two micro-batches each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for number, (ids, batch) in enumerate(batches(rank)):
        (model(ids, batch) / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def assert_trained_alike(ours: dict[str, torch.Tensor], tied: bool, what: str) -> None:
    want = trained(Policy(tied, True), None)
    before = dict(Policy(tied, True).named_parameters())
    for name, x in want.items():
        moved = (x - before[name].detach()).abs().max().item()
        error = (ours[name] - x).abs().max().item()
        assert moved > 1e-3, f"{what}: {name} hardly moved"
        assert error < 1e-5 * x.abs().max().item(), f"{what}: {name} is off by {error}, moved {moved}"


def fsdp2() -> None:
    for tied, fused in itertools.product((True, False), (True, False)):
        model = Policy(tied, fused)
        if not tied:
            fully_shard(model.body)
            # A unit of its own that is never called: nothing else gathers it.
            fully_shard(model.head)
        fully_shard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert_trained_alike(trained(model, dist.get_rank()), tied, f"FSDP2, tied {tied}, fused {fused}")


def zero3() -> None:
    import deepspeed
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # compiled at first use, in minutes; gloo does as well
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for tied, fused in itertools.product((True, False), (True, False)):
        model = Policy(tied, fused)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            config={
                "train_micro_batch_size_per_gpu": 3,
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            },
        )
        assert all(p.numel() == 0 for p in model.parameters())
        for ids, batch in batches(dist.get_rank()):
            engine.backward(engine(ids, batch))
            engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            ours = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert_trained_alike(ours, tied, f"ZeRO-3, tied {tied}, fused {fused}")


CHECKS = {
    "vocabulary-torch": lambda: vocabulary("torch"),
    "vocabulary-triton": lambda: vocabulary("triton"),
    "dtensor": dtensor,
    "fsdp2": fsdp2,
    "zero3": zero3,
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        CHECKS[name]()
        dist.barrier()
        if os.environ["RANK"] == "0":
            print(f"passed: {name}", flush=True)
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
