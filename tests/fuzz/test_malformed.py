"""Arguments that no op can take, and those that any op must: the table of contracts against the ops."""

import random
from collections import Counter

import malformed
import numpy as np
import pytest
import torch
from contracts import CALLS
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # nested, sparse and quantised tensors are prototypes

FORMS = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": malformed._nested,
    "jagged": malformed._jagged,
    "quantised": malformed._quantized,
    "mkldnn": lambda tensor: tensor.float().to_mkldnn(),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "numpy": lambda tensor: tensor.float().numpy(),
    "list": lambda tensor: tensor.tolist(),
    "long list": lambda tensor: list(range(9999)),
}


def valid(call, **fixed):
    """Valid arguments with no empty tensor; `fixed` ones replace others."""
    rng = random.Random(call.name)
    while True:
        arguments = call.make(rng) | {name: value for name, value in fixed.items() if name in call.roles}
        if all(x.numel() for x in arguments.values() if isinstance(x, torch.Tensor)) and call.is_valid(arguments):
            return arguments


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tensors_of_another_form_are_refused_by_name(call, form):
    arguments = valid(call)
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    for name in names:
        spoiled = arguments | {name: FORMS[form](arguments[name])}
        with pytest.raises((ValueError, TypeError), match=rf"{call.name}: argument `{name}") as raised:
            call.function(**spoiled)
        assert len(str(raised.value)) < 400
        assert "tensor([" not in str(raised.value)


@pytest.mark.parametrize(
    ("op", "argument", "value"),
    [
        ("pack_tokens", "paired", [True]),
        ("pack_tokens", "paired", 1),
        ("pack_tokens", "prefix", True),
        ("pack_tokens", "rows", 500.0),
        ("mask_patches", "grid", (True, True)),
        ("mask_patches", "grid", "12"),
        ("mask_patches", "baseline", 10**400),
        ("mask_patches", "dtype", "float32"),
        ("layer_norm_segment_sum", "eps", 10**400),
        ("layer_norm_segment_sum", "eps", float("nan")),
        ("packed_attention", "scale", float("inf")),
        ("sample_coalitions", "seed", 2**64),
        ("sample_coalitions", "seed", np.float64(3)),
        ("sample_coalitions", "sizes", np.array(["shapley", "uniform"])),
        ("sample_coalitions", "device", 2**64),
        ("kernel_shap", "players", True),
        ("shapley_regression_loss", "reduction", torch.zeros(3)),
        ("linear_shapley_loss", "normalization", None),
        ("exact_shapley", "backend", 5),
        ("coalition_sum", "backend", np.array(["cpu", "reference"])),
        ("segment_sum", "prefix", torch.tensor(1)),
        ("unpack_bits", "players", 2.0),
        ("coalition_sizes", "players", True),
        ("coalition_sizes", "backend", 5),
    ],
)
def test_what_is_no_number_flag_or_name_is_refused_by_name(op, argument, value):
    call = CALLS[op]
    with pytest.raises(ValueError, match=rf"{op}: argument `{argument}"):
        call.function(**(valid(call) | {argument: value}))


def test_a_baseline_that_the_dtype_cannot_hold_is_refused():
    bits = torch.ones(1, 1, 1, dtype=torch.int32)
    images = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"mask_patches: argument `baseline` must be a number that torch.float16"):
        CALLS["mask_patches"].function(images, bits, (1, 1), 1e6)


def test_boundaries_are_described_not_printed():
    rows, cu_seqlens = torch.zeros(5000, 1), torch.arange(5001, dtype=torch.int32)
    cu_seqlens[70] = 0
    with pytest.raises(ValueError, match=r"`cu_seqlens` .* its last 5000, and it falls after index 69") as raised:
        CALLS["segment_sum"].function(rows, cu_seqlens, backend="reference")
    assert len(str(raised.value)) < 300


def test_whole_numbers_of_numpy_are_whole_numbers():
    for call in CALLS.values():
        arguments = valid(call, seed=2**63 - 1, offset=2**40)
        whole = {
            name: np.int64(value)
            for name, value in arguments.items()
            if isinstance(value, int) and not isinstance(value, bool)
        }
        assert malformed.same(call.function(**(arguments | whole)), call.function(**arguments)), call.name


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_shapes_alone_suffice(call):
    """On the meta device, and in a fake mode: what torch.compile and torch.export trace with."""
    arguments = valid(call, backend=None, device=None)
    if arguments.get("rows", 0) is None:
        arguments = valid(call, backend=None, rows=400, paired=False)
    wanted = call.function(**(arguments | {"backend": "reference"} if "backend" in arguments else arguments))
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for backend in (None, "reference"):
            chosen = {"backend": backend} if "backend" in arguments else {}
            fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
            assert shapes(call.function(**(arguments | fake | chosen))) == shapes(wanted)
    chosen = {"backend": "reference"} if "backend" in arguments else {}
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    device = {"device": "meta"} if "device" in arguments else {}
    assert shapes(call.function(**(arguments | meta | device | chosen))) == shapes(wanted)


def shapes(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [tuple(part.shape) if isinstance(part, torch.Tensor) else part for part in parts]


def test_uncounted_rows_of_shapes_alone_are_refused():
    tokens, bits = torch.zeros(2, 6, 3, device="meta"), torch.zeros(2, 2, 1, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"pack_tokens: argument `bits` .* Pass `rows`"):
        CALLS["pack_tokens"].function(tokens, bits, 1)


def test_malformed_calls_are_refused_by_name_or_served_rightly():
    ends = Counter()
    for number in range(800):
        op, ended, names, said = malformed.run_one(2026, number)
        assert ended in ("refused", "served"), f"call {number} of {op}, spoiled {names}: {ended}. {said}"
        ends[ended] += 1
    assert min(ends.values()) > 50  # of both kinds


def test_malformed_calls_of_the_vision_api_name_their_argument():
    """Those that were answered by errors of Python's or PyTorch's, or printed whole lists."""
    import vision_calls

    nested = torch.nested.nested_tensor([torch.rand(9), torch.rand(9)])
    masks = torch.nested.nested_tensor([torch.rand(12, 12) < 0.5, torch.rand(12, 12) < 0.5])
    spoiled = [("coalition_values", "max_rows", []), ("Coalitions", "paired", np.arange(3))]
    spoiled += [("insertion", "attributions", nested), ("segmentation", "masks", masks)]
    spoiled += [("convert", "img_size", list(range(5000))), ("convert", "backbone_gradient", list(range(5000)))]
    spoiled += [
        ("convert", "preprocessing", [0, 1]),
        ("convert", "preprocessing", {}),
        ("MaskedImageGame", "mean", 1j),
        ("fidelity", "coalitions", b"cpu"),
    ]
    spoiled += [("kernel_shap_values", "coalitions", 3), ("evaluate", "data", torch.tensor(0.5))]
    for name, argument, value in spoiled:
        call = vision_calls.CALLS[name]
        with pytest.raises((ValueError, TypeError), match=f"rgument `{argument}`") as raised:
            call.function(**(call.arguments() | {argument: value}))
        assert len(str(raised.value)) < 400
