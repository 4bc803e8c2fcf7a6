"""The calls that the fuzzer makes: drawn, built into tensors, and written out as a script."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import small_tiles
import torch
from hypothesis import strategies as st

from gcpo_kernels.testing import (
    make_hidden_representations,
    make_linear_inputs,
    make_representations,
    make_token_inputs,
)

INF, NAN = math.inf, math.nan
LEAVES = ("logp", "hidden", "weight", "bias", "causal_logp", "logits", "z", "context_z")
OPTIONS_ONLY = ("group_advantages", "causal_reference_logprob")  # functions without backends
LOSSES = ("gcpo_loss", "linear_gcpo_loss")
WEIGHTS = ("causal_weights", "causal_weights_from_hidden")
SCORES = ("old_logp", "ref_logp", "query_logp", "causal_logp", "importance_sampling_ratio", "context_weights")
SCORES += ("policy_weights", "kappa_weights")

# Values that are put at single places, by argument.
LOG = (0.0, -1e-7, -1e-3, -20.0, -90.0, -1e4)
EXTREMES: dict[str, tuple[float, ...]] = {
    "logp": LOG,
    "causal_logp": LOG,
    **dict.fromkeys(("old_logp", "ref_logp", "query_logp", "context_logp"), (*LOG, -INF, NAN)),
    "advantages": (0.0, 1e4, -1e4, 3.0, -3.0, NAN),
    "importance_sampling_ratio": (0.0, 1e-3, 3.0, 1e4),
    "context_weights": (0.0, 1.0, 30.0),
    "policy_weights": (0.0, 1.0, 30.0),
    "kappa_weights": (0.0, 1.0, 30.0),
    "hidden": (0.0, 1e3, -1e3, 1e-20, NAN),
    "weight": (0.0, 30.0, -30.0),
    "bias": (0.0, 100.0, -100.0, -INF),
    "logits": (0.0, 100.0, 1e4, -1e4, -INF),
    # Not larger: the mean of the others is their sum less one's own, and knows them to a rounding of one's own.
    "z": (0.0, 30.0, -30.0, 1e-20, NAN),
    "context_z": (0.0, 1e12, -1e3, 1e-20, NAN),
    "rewards": (0.0, 1.0, 1e4, -1e4, 0.1, NAN),
    "offset_logp": (0.0, -30.0, 30.0, -200.0, 1e4, INF, -INF, NAN),
}
# Nats that every estimate of `linear_gcpo_loss` is off by; None: no estimate.
OFFSETS = (None, 0.0, 3.0, 20.0, -20.0, 200.0)
# Which kernels Triton takes, for the loss and for scoring.
KERNELS = (("one_read", "two_reads", "epilogue"), ("product", "slices"))

LOSS_OPTIONS: dict[str, tuple[Any, ...]] = {
    "beta": (0.0, 0.04, 1.0),
    "kappa": (0.0, 0.06, 1.0),
    "epsilon_low": (0.2, 0.0, 0.1, 0.9, 3.0),
    "epsilon_high": (0.2, 0.0, 0.28, 5.0),
    "delta": (None, 0.5, 1.1, 1.5, 1e30),
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "max_completion_length": (7, 1, 4096),
    "num_items_in_batch": (None, 0, 1, 11, 0.5, 1e6, torch.tensor(11), torch.tensor(0.0)),
    "proj_floor": (1e-6, 1e-30, 0.02, 0.5),
    "kl_clip": (None, 0.1, 1.5, 25.0, 1e30),  # none of them a log-ratio of EXTREMES, where the gradient jumps
    "bias_correction_kl": (False, True),
    "sapo_temperature_pos": (1.0, 0.05, 7.0),
    "sapo_temperature_neg": (1.05, 0.05, 7.0),
    "vespo_k_pos": (2.0, 0.0, 0.3),
    "vespo_lambda_pos": (3.0, 0.0, 0.5),
    "vespo_k_neg": (3.0, 0.0, 0.3),
    "vespo_lambda_neg": (2.0, 0.0, 0.5),
}
HEAD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0, 0.6, 0.05, 10.0),
    "logit_scale": (1.0, -0.5, 0.1, 4.0),
    "logit_softcap": (None, 2.0, 30.0),
}
WEIGHTS_OPTIONS: dict[str, tuple[Any, ...]] = {
    "alpha": (2.0, 0.0, -3.0),
    "baseline": ("mean", "loo"),
    "similarity": ("cosine", "gaussian", "euclidean"),
}
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gcpo_loss": LOSS_OPTIONS,
    "linear_gcpo_loss": LOSS_OPTIONS | HEAD_OPTIONS,
    "linear_logprob": HEAD_OPTIONS | {"return_entropy": (False, True)},
    "selective_logprob": {"temperature": HEAD_OPTIONS["temperature"], "return_entropy": (False, True)},
    "causal_weights": WEIGHTS_OPTIONS,
    "causal_weights_from_hidden": WEIGHTS_OPTIONS,
    "leave_one_out_mean": {},
    "group_advantages": {"scale": ("group", "batch", "none"), "eps": (1e-4, 1e-2)},
    "causal_reference_logprob": {"proj_floor": LOSS_OPTIONS["proj_floor"], "floor_at_query": (False, True)},
}
WRONG_OPTIONS = (NAN, INF, "x", -1.0, object)


@dataclass(frozen=True)
class Case:
    """A call, small enough to print."""

    function: str
    backend: str
    seed: int = 0
    sizes: tuple[int, ...] = ()  # as the input factory takes them
    masked: str = "none"
    dtypes: tuple[str, str] = ("float32", "float32")  # of activations, of weights
    absent: tuple[str, ...] = ()
    forms: tuple[tuple[str, str], ...] = ()  # (argument, layout or other shape)
    extremes: tuple[tuple[str, int, float], ...] = ()  # (argument, place, value)
    options: dict[str, Any] = field(default_factory=dict)
    upstream: float = 1.0
    invalid: tuple[str, str] | None = None  # (argument, what is wrong with it)
    small_tiles: bool = False
    offset: float | None = None
    kernels: tuple[str, str] = ("one_read", "product")


def transposed(x: torch.Tensor) -> torch.Tensor:
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def sliced(x: torch.Tensor) -> torch.Tensor:
    larger = torch.full([2 * n + 1 for n in x.shape], 77).to(x.dtype)
    view = larger[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view.copy_(x)
    return view


def expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": transposed,
    "sliced": sliced,
    "expanded": expanded,
}
SPOILT: dict[str, Callable[[torch.Tensor], Any]] = {
    "one more dimension": lambda x: x.unsqueeze(0).unsqueeze(0),
    "complex": lambda x: x.to(torch.complex64),
    "a list": lambda x: x.tolist(),
    "on another device": lambda x: x.to("meta"),
}


@st.composite
def cases(draw: st.DrawFn, backend: str) -> Case:
    function = draw(st.sampled_from(list(OPTIONS)))
    small, tiny = st.integers(0, 6), st.integers(1, 4)
    sizes = {
        **dict.fromkeys(
            WEIGHTS, (draw(st.integers(0, 3)), draw(st.integers(2, 5)), draw(tiny), draw(tiny), draw(small) + 1)
        ),
        "leave_one_out_mean": (draw(st.integers(0, 3)), draw(st.integers(2, 5)), 1, 1, draw(small) + 1),
        "group_advantages": (draw(small), draw(tiny)),
    }.get(function, (draw(st.integers(0, 4)), draw(small), draw(tiny)))
    if function in ("linear_gcpo_loss", "linear_logprob", "selective_logprob"):
        sizes = (*sizes, draw(tiny), draw(st.integers(1, 40)))
    types = ("float32", "float16") if backend == "triton" else ("float32", "bfloat16", "float16")
    dtypes = (draw(st.sampled_from(types)), draw(st.sampled_from(types)))
    if function in OPTIONS_ONLY or draw(st.booleans()):
        dtypes = ("float32", "float32")
    options = {key: draw(st.sampled_from(values)) for key, values in OPTIONS[function].items()}
    absent = tuple(draw(st.sets(st.sampled_from(SCORES)))) if function in LOSSES else ()
    if function == "causal_reference_logprob" and draw(st.booleans()):
        absent = ("context_weights",)
    if function in LOSSES and draw(st.integers(0, 3)) == 0:
        absent = (*absent, "context_logp", "context_weights", "kappa_weights")
        options["kappa"] = 0.0
    if "ref_logp" in absent:
        options["beta"] = 0.0
    if function in ("linear_gcpo_loss", "linear_logprob") and draw(st.booleans()):
        absent = (*absent, "bias")
    if function in WEIGHTS and draw(st.booleans()):
        absent = (*absent, "context_mask")
    case = Case(
        function,
        backend,
        draw(st.integers(0, 2**16)),
        sizes,
        draw(st.sampled_from(("none", "ragged", "all"))),
        dtypes,
        absent,
        options=options,
        upstream=draw(st.sampled_from((1.0, -0.37, 1e-3, 100.0))),
        offset=draw(st.sampled_from(OFFSETS)) if function == "linear_gcpo_loss" else None,
        kernels=(draw(st.sampled_from(KERNELS[0])), draw(st.sampled_from(KERNELS[1]))),
    )
    names = [key for key, x in build(case).items() if isinstance(x, torch.Tensor)]
    forms = draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from([*LAYOUTS, "other shape"])), max_size=4))
    extreme = EXTREMES | ({"hidden": EXTREMES["z"]} if function in WEIGHTS else {})
    special = [name for name in names if name in extreme]
    place = st.sampled_from(special).flatmap(
        lambda name: st.tuples(st.just(name), st.integers(0, 40), st.sampled_from(extreme[name]))
    )
    extremes = draw(st.lists(place, max_size=5))
    invalid = None
    if draw(st.integers(0, 9)) == 0:
        what = draw(st.sampled_from([*SPOILT, "option"]))
        first = {"leave_one_out_mean", "group_advantages"} | {n for n in OPTIONS if what == "on another device"}
        named = [name for name in names if function not in first or name != names[0]] if what != "option" else []
        named = named or [key for key in options if key not in ("return_entropy",)]
        if named:
            invalid = (draw(st.sampled_from(named)), what)
    drawn = {"forms": tuple(forms), "extremes": tuple(extremes), "invalid": invalid, "small_tiles": draw(st.booleans())}
    return Case(**(vars(case) | drawn))


def _drawn(case: Case) -> dict[str, Any]:
    """The arguments as the input factories make them."""
    narrow, weight = (getattr(torch, name) for name in case.dtypes)
    if case.function == "group_advantages":
        groups, size = case.sizes
        generator = torch.Generator().manual_seed(case.seed)
        return {"rewards": torch.randn(groups * size, generator=generator), "group_size": size}
    if case.function in ("causal_weights", "leave_one_out_mean"):
        inputs = make_representations(*case.sizes, dtype=narrow, seed=case.seed)
        return {"z": inputs["z"]} if case.function == "leave_one_out_mean" else dict(inputs)
    if case.function == "causal_weights_from_hidden":
        prompts, group, contexts, samples, hidden = case.sizes
        sizes = {"group": group, "contexts": contexts, "samples": samples, "hidden": hidden}
        inputs = make_hidden_representations(prompts, **sizes, dtype=narrow, seed=case.seed)
        generator = torch.Generator().manual_seed(case.seed)
        return inputs | {"last_index": torch.randint(3, (prompts * group,), generator=generator)}
    batch, tokens, contexts = case.sizes[:3]
    weights = torch.rand(2, batch, tokens, generator=torch.Generator().manual_seed(case.seed + 1)) * 1.5
    of_terms = dict(zip(("policy_weights", "kappa_weights"), weights, strict=True))
    if case.function in ("gcpo_loss", "causal_reference_logprob"):
        inputs = make_token_inputs(batch, tokens, contexts, seed=case.seed, masked=case.masked)
        if case.function == "gcpo_loss":
            inputs |= {"logp": inputs["logp"].to(narrow), "old_logp": inputs["old_logp"].to(weight)}
            return inputs | of_terms
        return {key: inputs[key] for key in ("query_logp", "context_logp", "context_weights")}
    inputs = make_linear_inputs(*case.sizes, dtype=narrow, weight_dtype=weight, seed=case.seed, masked=case.masked)
    if case.function == "linear_gcpo_loss":
        inputs |= of_terms
        return inputs if case.offset is None else inputs | {"offset_logp": inputs["ref_logp"] + case.offset}
    if case.function == "linear_logprob":
        return {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    generator = torch.Generator().manual_seed(case.seed)
    logits = 3 * torch.randn(batch, tokens, case.sizes[4], generator=generator)
    return {"logits": logits.to(narrow), "token_ids": inputs["token_ids"]}


def build(case: Case) -> dict[str, Any]:
    """The arguments of a call."""
    arguments = _drawn(case)
    for name in case.absent:
        if arguments.pop(name, None) is not None and name in ("logp",):
            raise AssertionError(name)
    for name, place, value in case.extremes:
        x = arguments.get(name)
        if isinstance(x, torch.Tensor) and x.numel():
            x = x.clone()
            x.view(-1)[place % x.numel()] = value if abs(value) < torch.finfo(x.dtype).max or value != value else 0.0
            if value in (INF, -INF):
                x.view(-1)[place % x.numel()] = value
            arguments[name] = x
    for name, form in case.forms:
        x = arguments.get(name)
        if x is None:
            continue
        if form in LAYOUTS:
            arguments[name] = LAYOUTS[form](x)
        elif name == "advantages" and x.dim() == 1:
            arguments[name] = x.unsqueeze(1) * torch.linspace(0.5, 1.5, arguments["mask"].shape[1])
        elif name == "context_weights" and x.dim() == 2 and x.shape[0]:
            arguments[name] = x[0]
        elif name in ("importance_sampling_ratio", "policy_weights") and x.dim() == 2 and x.shape[1]:
            arguments[name] = x[:, :1]
        elif name == "kappa_weights" and x.dim() == 2 and x.shape[1]:
            arguments[name] = x[:, 0]
        elif name in ("mask", "context_mask"):
            arguments[name] = x.to(torch.int64)
    if case.invalid is not None:
        name, what = case.invalid
        if what in SPOILT and isinstance(arguments.get(name), torch.Tensor):
            arguments[name] = SPOILT[what](arguments[name])
        else:
            case.options[name] = object()
    return arguments


def settings(case: Case) -> tuple[dict[str, dict[str, str]], ...]:
    """Of its small tiles and of the kernels that it takes, as `small_tiles` takes them."""
    tiles = (small_tiles.SETTINGS[case.backend], small_tiles.BLOCKS[case.backend]) if case.small_tiles else ()
    if case.backend != "triton":
        return tiles
    loss, scoring = case.kernels
    choose = f"lambda operation, *rest: {loss!r} if operation == 'loss' else {scoring!r}"
    return (*tiles, {"gcpo_kernels.triton_backend.gate": {"choose": choose}})


def literal(x: Any) -> str:
    """Python that makes an equal value; a tensor's layout by strides over its storage."""
    if not isinstance(x, torch.Tensor):
        return "object()" if type(x) is object else f"float('{x}')" if isinstance(x, float) and x - x != 0 else repr(x)
    if x.device.type == "meta":
        return f"torch.empty({tuple(x.shape)}, dtype={x.dtype}, device='meta')"
    values = str(x.tolist()).replace("nan", "NAN").replace("inf", "INF")
    made = f"torch.tensor({values}, dtype={x.dtype}).view({tuple(x.shape)})"
    if x.is_contiguous():
        return made
    return f"with_strides({made}, {x.stride()})"


def snippet(case: Case) -> str:
    """A script that makes the call and prints it beside the reference."""
    arguments = build(case)
    lines = [
        "import torch",
        "import gcpo_kernels",
        "from gcpo_kernels import reference",
        "",
        "NAN, INF = float('nan'), float('inf')",
        "",
    ]
    if settings(case):
        lines += [*small_tiles.source(*settings(case)), ""]
    made = {key: literal(x) for key, x in arguments.items()}
    if any("with_strides" in text for text in made.values()):
        lines += [
            "def with_strides(x, strides):",
            "    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides)) if x.numel() else 0",
            "    out = torch.zeros(size, dtype=x.dtype).as_strided(x.shape, strides)",
            "    return out.copy_(x) if 0 not in strides else torch.as_strided(x[:1].contiguous(), x.shape, strides)",
            "",
        ]
    lines += ["arguments = {", *(f"    {key!r}: {text}," for key, text in made.items()), "}"]
    lines += ["options = {" + ", ".join(f"{key!r}: {literal(x)}" for key, x in case.options.items()) + "}"]
    backend = "" if case.function in OPTIONS_ONLY else f", backend={case.backend!r}"
    if case.invalid is not None:
        return "\n".join(
            [
                *lines,
                f"# {case.invalid} is wrong: this must raise an error that names it",
                f"print(gcpo_kernels.{case.function}(**arguments, **options{backend}))",
            ]
        )
    lines += [
        f"leaves = [key for key in {LEAVES} if arguments.get(key) is not None]",
        "results = {}",
        f"both = (('ours', gcpo_kernels.{case.function}, False), ('truth', reference.{case.function}, True))",
        "for name, function, wide in both:",
        "    given = dict(arguments)",
        "    if wide:",
        "        given.pop('offset_logp', None)  # the reference has no need of it",
        "    for key, x in list(given.items()):",
        "        if isinstance(x, torch.Tensor) and x.is_floating_point():",
        "            given[key] = (x.double() if wide else x).detach().requires_grad_(key in leaves)",
        f"    extra = {{}} if wide else dict({backend.removeprefix(', ')})",
        "    out = function(**given, **options, **extra)",
        "    outs = [out] if isinstance(out, torch.Tensor) else [x for x in out if isinstance(x, torch.Tensor)]",
        "    print(name, 'out', [x.tolist() for x in outs])",
        "    print(name, *(x for x in out if isinstance(x, dict)))",
        "    results[name] = outs",
        "    if outs[0].requires_grad:",
        f"        scales = [{case.upstream!r} * (k + 1) for k in range(len(outs))]",
        "        upstream = [torch.full((), s, dtype=x.dtype).expand_as(x) for s, x in zip(scales, outs)]",
        "        grads = torch.autograd.grad(outs, [given[key] for key in leaves], upstream, allow_unused=True)",
        "        results[name] = outs + [torch.zeros(()) if g is None else g for g in grads]",
        "        for key, g in zip(leaves, grads):",
        "            print(name, 'd', key, None if g is None else g.tolist())",
        "assert len(results['ours']) == len(results['truth']), 'gradients are missing'",
        "for ours, truth in zip(results['ours'], results['truth']):",
        "    rtol = max(1e-5, torch.finfo(ours.dtype).eps)",
        "    torch.testing.assert_close(ours.double(), truth.double(), rtol=rtol, atol=1e-7)",
    ]
    return "\n".join(lines)
