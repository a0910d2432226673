"""Random shapes, dtypes, memory layouts and values: every backend's results and gradients against float64.

`fastshap_kernels.testing` says how close is close enough. Configurations are numbered: the same in every process.
"""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from contracts import CALLS, Sizes, draw_sizes
from torch import Tensor

import fastshap_kernels as fk
from fastshap_kernels import testing
from fastshap_kernels.testing import accuracy

OPS = list(testing.OPS)
KINDS = ("normal", "normal", "large", "small", "offset", "one large", "constant", "zero")
#: The worst of thousands of results, some of which a few numbers make (every gradient of one residual, every value of
#: equal ones), and the largest of millions of values, each judged by eight draws: more than one test's worth of luck.
accuracy.TIMES, accuracy.MARGIN = 4, 64
LAYOUTS = ("contiguous", "contiguous", "transposed", "every other", "shifted", "expanded")


def draw_large_sizes(rng: random.Random) -> Sizes:
    """Whole vectors and odd ends, one word of bits and several."""
    widths = (1, 3, 8, 16, 17, 24, 48, 64, 65, 100)
    sizes = draw_sizes(rng) | {"B": rng.randint(1, 3), "M": rng.choice((1, 2, 3, 4, 6, 9, 12, 33))}
    sizes |= {name: rng.choice(widths) for name in ("K", "L", "D")} | {"P": rng.choice((1, 2, 5, 31, 32, 33, 64, 70))}
    sizes |= {"T": rng.randint(1, 40), "E": rng.choice((1, 8, 16, 20, 24, 32, 64, 72))}
    return sizes | {"QP": sizes["Q"] + sizes["P"]}


def changed(rng: random.Random, tensor: Tensor) -> Tensor:
    """The tensor with other values, at other places in memory."""
    kind, layout = rng.choice(KINDS), rng.choice(LAYOUTS)
    half = tensor.dtype == torch.float16
    if kind == "large":
        tensor = tensor * (2 if half else 1e4)
    elif kind == "small":
        tensor = tensor * (1e-2 if half else 1e-6)
    elif kind == "offset":
        tensor = tensor + (1 if half else 100)
    elif kind == "one large" and tensor.numel():
        tensor.view(-1)[rng.randrange(tensor.numel())] = 8 if half else 1e3
    elif kind in ("constant", "zero"):
        tensor = torch.full_like(tensor, 0.7 if kind == "constant" else 0)
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if layout == "every other":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "shifted":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if layout == "expanded" and tensor.ndim:
        return tensor[:1].expand(tensor.shape)
    return tensor


def make(seed: int, number: int, backend: str) -> tuple[str, dict[str, Any]]:
    """The op of a number and its arguments."""
    rng = random.Random(f"{seed} {number} {backend}")
    served = [op for op in OPS if testing.backends(op, backend)]
    op = served[number % len(served)]
    torch.manual_seed(rng.getrandbits(32))
    arguments = CALLS[op].make(rng, draw_large_sizes)
    while op == "layer_norm_segment_sum" and arguments["rows"].shape[1] == 1:
        # A value is its row's mean: gradients are 0 but for rounding, with no scale to compare on. tests/ops has one.
        arguments = CALLS[op].make(rng, draw_large_sizes)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            arguments[name] = changed(rng, value)
    if op == "packed_attention":  # scores of 1e5 are softmax's end: rounding alone decides between two of them
        arguments["qkv"] = arguments["qkv"].clamp(-4, 4)
    if arguments.get("normalization") == "additive" and not has_choice(arguments["bits"], first_of(arguments).shape[1]):
        arguments["normalization"] = "none"  # the gradient would be 0 but for rounding, with no scale to compare on
    return op, arguments | ({"dtype": None} if "dtype" in arguments else {})


def first_of(arguments: dict[str, Any]) -> Tensor:
    """The tensor that the others follow."""
    return next(x for x in arguments.values() if isinstance(x, Tensor))


def has_choice(bits: Tensor, players: int) -> bool:
    """Whether every image has a coalition that is neither empty nor full."""
    sizes = fk.unpack_bits(bits, players).sum(-1)
    return bool(((sizes > 0) & (sizes < players)).any(-1).all())


def results(
    function: Callable[..., Any], arguments: dict[str, Any], names: list[str], cotangent: Tensor | None
) -> list:
    """The first output and its gradients, those of `names`; the others must be the same on every backend."""
    tensors = {name: arguments[name].detach().requires_grad_() for name in names}
    out = function(**(arguments | tensors))
    out = out[0] if isinstance(out, tuple) else out
    if not names or not out.requires_grad:
        return [out.detach()]
    grads = torch.autograd.grad(out, tensors.values(), cotangent.expand(out.shape).to(out.dtype), allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, tensors.values(), strict=True)),
    ]


def plain_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None, **_: Any) -> Tensor:
    """PyTorch's own attention, one sequence at a time, in the dtype of its inputs."""
    outputs = []
    for sequence in qkv.split(cu_seqlens.diff().tolist()):
        query, key, value = sequence.permute(1, 2, 0, 3).unsqueeze(1)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)[0].transpose(0, 1)
        )
    return torch.cat(outputs)


def check(op: str, arguments: dict[str, Any], backend: str) -> None:
    """Raises where a backend is farther from float64 than the rule allows."""
    names = [name for name, x in arguments.items() if accuracy.is_floating(x)]
    call = CALLS[op].function
    served = call(**(arguments | {"backend": backend}))
    wanted = call(**(arguments | {"backend": "reference"}))
    if not names:
        assert torch.equal(served, wanted), f"{int((served != wanted).sum())} of {wanted.numel()} values differ"
        return
    if isinstance(served, tuple):
        served, wanted = served[0], wanted[0]
    cotangent = torch.randn(served.shape, dtype=torch.float64).to(served.dtype)
    dtype = arguments[names[0]].dtype

    def run(chosen: str, *tensors: Tensor) -> list[Tensor]:
        given = arguments | dict(zip(names, tensors, strict=False)) | {"backend": chosen}
        return results(call, given, names, tensors[-1])

    def plain(*tensors: Tensor) -> list[Tensor]:
        return results(plain_attention, arguments | {"qkv": tensors[0]}, names, tensors[-1])

    terms = sum(x.numel() // max(1, min(x.shape)) if x.ndim else 1 for x in (served, *(arguments[n] for n in names)))
    working = {
        "exact_shapley": torch.float64,
        "packed_attention": dtype,
        "linear_shapley_loss": dtype,
        "mask_patches": dtype,
    }
    accuracy.assert_all_accurate(
        run,
        [*(arguments[name] for name in names), cotangent],
        dtype,
        terms=max(terms, 1),
        plain=plain if op == "packed_attention" else None,
        backend=backend,
        working=working.get(op),
    )


def run_one(seed: int, number: int, backend: str) -> tuple[str, str, str]:
    """Name of the op, "accurate", "over tolerance" or "not served", and what was wrong."""
    op, arguments = make(seed, number, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(op, arguments, backend)
        except AssertionError as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return op, "over tolerance", str(error) or f"failed: {where.line}"
        except RuntimeError as error:
            if "can't serve this call" not in str(error):
                raise
            return op, "not served", str(error)
    return op, "accurate", ""
