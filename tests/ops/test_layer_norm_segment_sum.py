from functools import partial

import pytest
import torch
from accuracy import BACKEND, DTYPES, KERNELS, assert_all_accurate, check_gradients, normal

import fastshap_kernels as fk

LENGTHS = (3, 0, 1, 40, 0, 70, 7)

#: This op has no kernel of its own for the CPU.
ON_CPU = BACKEND == "cpu"
BACKENDS = ("reference",) if ON_CPU else ("reference", BACKEND)
SERVED = None if ON_CPU else BACKEND


def arguments(generator, lengths=LENGTHS, width=8, dtype=torch.float32):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    random = partial(normal, generator, dtype=dtype)

    return 3 * random(sum(lengths), width) + 1, cu_seqlens, random(width), random(width)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("affine", [True, False])
def test_definition(generator, affine, prefix, backend):
    rows, cu_seqlens, weight, bias = arguments(generator, width=16, dtype=torch.float64)
    if not affine:
        weight = bias = None
    ours = fk.layer_norm_segment_sum(rows, cu_seqlens, weight, bias, prefix, eps=1e-3, backend=backend)
    normal = torch.nn.functional.layer_norm(rows, (16,), weight, bias, 1e-3)
    torch.testing.assert_close(ours, torch.stack([part[prefix:].sum(0) for part in normal.split(LENGTHS)]))


def sums_and_gradients(cu_seqlens, prefix, backend, *inputs):
    """The sums and the gradients of every input that is there; the last is the cotangent."""
    given = [x if x is None else x.clone().requires_grad_() for x in inputs[:-1]]
    sums = fk.layer_norm_segment_sum(given[0], cu_seqlens, *given[1:], prefix, backend=backend)
    sums.backward(inputs[-1])
    return [sums.detach(), *(x.grad for x in given if x is not None)]


def assert_sums_and_gradients_accurate(inputs, cu_seqlens, prefix, dtype):
    run = partial(sums_and_gradients, cu_seqlens, prefix)
    assert_all_accurate(run, inputs, dtype, terms=sum(inputs[0].shape), backend=SERVED)


#: One for each number of registers that a kernel holds a row in, and some that end within them.
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (dtype, width)
        for dtype in DTYPES
        for width in (8, 48, 264, 384, 512, 768, 1000, 1024)
        if (dtype, BACKEND) != (torch.float64, "cuda") or width <= 512
    ],
)
def test_backends_agree(generator, dtype, width):
    rows, cu_seqlens, weight, bias = arguments(generator, (3, 0, 1, 20, 7), width, dtype)
    cotangent = normal(generator, 5, width)
    for prefix, inputs in ((1, (rows, weight, bias)), (0, (rows, weight, None)), (2, (rows, None, bias))):
        assert_sums_and_gradients_accurate((*inputs, cotangent), cu_seqlens, prefix, dtype)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if BACKEND != "cuda"])
def test_a_single_column_has_no_gradient(generator, dtype):
    """Each value is its row's mean: what comes of it is 0, up to rounding of the terms that cancel."""
    rows, cu_seqlens, weight, bias = arguments(generator, width=1, dtype=dtype)
    weight, cotangent = 100 * weight, torch.randn(len(LENGTHS), 1, generator=generator).to(dtype)
    for backend in BACKENDS:
        sums, *gradients = sums_and_gradients(cu_seqlens, 1, backend, rows, weight, bias, cotangent)
        counts = (cu_seqlens.diff() - 1).clamp_min(0).unsqueeze(1)
        torch.testing.assert_close(sums, counts * bias)
        terms = weight.abs().max() * cotangent.abs().max() * 1e-5**-0.5
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert gradients[0].abs().max() <= 32 * eps * terms
        assert gradients[1].abs().max() <= 32 * eps * terms * len(rows) ** 0.5  # a sum over rows


@pytest.mark.parametrize("width", [1536, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows(generator, dtype, width):
    rows, cu_seqlens, weight, bias = arguments(generator, (2, 19), width, dtype)
    cotangent = normal(generator, 2, width)
    assert_sums_and_gradients_accurate((rows, weight, bias, cotangent), cu_seqlens, 1, dtype)


#: What the CUDA kernels leave to others.
ODD = [(torch.bfloat16, 5), (torch.float32, 2050), (torch.float64, 514)]

if BACKEND == "cuda":

    @pytest.mark.parametrize(("dtype", "width"), ODD)
    def test_widths_that_cuda_does_not_take(dtype, width):
        rows, cu_seqlens = torch.zeros(2, width, dtype=dtype), torch.tensor([0, 2], dtype=torch.int32)
        with pytest.raises(RuntimeError, match=r"can't serve this call: it takes widths of whole 16 bytes"):
            fk.layer_norm_segment_sum(rows, cu_seqlens, backend="cuda")

else:

    @pytest.mark.parametrize(("dtype", "width"), [*ODD, (torch.float16, 131)])
    def test_any_width(generator, dtype, width):
        rows, cu_seqlens, weight, bias = arguments(generator, (2, 0, 5), width, dtype)
        cotangent = normal(generator, 3, width)
        assert_sums_and_gradients_accurate((rows, weight, bias, cotangent), cu_seqlens, 1, dtype)


@pytest.mark.parametrize("backend", [] if BACKEND == "cuda" else BACKENDS)
def test_a_single_column_is_its_own_mean(generator, backend):
    rows, cu_seqlens, weight, bias = arguments(generator, (2, 0, 5), 1)
    cotangent = torch.randn(3, 1, generator=generator)
    sums, *gradients = sums_and_gradients(cu_seqlens, 1, backend, rows, weight, bias, cotangent)
    wanted = bias * torch.tensor([[1.0], [0.0], [4.0]])
    # A row minus its mean is rounding, which is then divided by √eps.
    torch.testing.assert_close(sums, wanted, rtol=0, atol=2e-2)
    assert gradients[1].abs() <= 2e-2
    torch.testing.assert_close(gradients[2], cotangent[0] + 4 * cotangent[2])


def test_any_address(generator):
    rows, cu_seqlens, weight, bias = arguments(generator, dtype=torch.bfloat16)

    def shifted(x):
        """The same values, contiguous, and no multiple of 16 bytes in memory."""
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)

    cotangent = torch.randn(len(LENGTHS), 8, generator=generator).bfloat16()
    plain = sums_and_gradients(cu_seqlens, 1, SERVED, rows, weight, bias, cotangent)
    given = [shifted(x).requires_grad_() for x in (rows, weight, bias)]
    sums = fk.layer_norm_segment_sum(given[0], cu_seqlens, *given[1:], 1)
    sums.backward(shifted(cotangent))
    for ours, expected in zip([sums.detach(), *(x.grad for x in given)], plain, strict=True):
        assert torch.equal(ours, expected)


def test_parameters_of_another_dtype(generator):
    rows, cu_seqlens, weight, bias = arguments(generator)
    half = rows.bfloat16().requires_grad_()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    sums = fk.layer_norm_segment_sum(half, cu_seqlens, weight, bias, 1)
    assert sums.dtype == torch.bfloat16
    sums.float().sum().backward()
    assert (half.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_rows_far_from_zero(generator):
    rows, cu_seqlens, weight, bias = arguments(generator, width=64)
    rows = rows + 1e4
    cotangent = normal(generator, len(LENGTHS), 64)
    assert_sums_and_gradients_accurate((rows, weight, bias, cotangent), cu_seqlens, 0, torch.float32)


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_rows_are_left_out_not_multiplied(generator, backend, rubbish):
    rows, cu_seqlens, weight, bias = arguments(generator)
    spoiled = rows.clone()
    starts = cu_seqlens[:-1][cu_seqlens.diff() > 0].long()
    spoiled[starts] = rubbish
    clean, same = (fk.layer_norm_segment_sum(x, cu_seqlens, weight, bias, 1, backend=backend) for x in (rows, spoiled))
    assert torch.equal(clean, same)
    if backend != "reference":
        fk.layer_norm_segment_sum(
            spoiled.requires_grad_(), cu_seqlens, weight, bias, 1, backend=backend
        ).sum().backward()
        assert torch.equal(spoiled.grad[starts], torch.zeros(len(starts), 8))


@pytest.mark.parametrize("eps", [0.0, 1])
def test_eps(generator, eps):
    rows, cu_seqlens, weight, bias = arguments(generator, dtype=torch.float64)
    ours, plain = (
        fk.layer_norm_segment_sum(rows, cu_seqlens, weight, bias, 1, eps=eps, backend=b) for b in (SERVED, "reference")
    )
    torch.testing.assert_close(ours, plain)


def test_strided_and_expanded_inputs(generator):
    rows, cu_seqlens, weight, bias = arguments(generator)
    plain = fk.layer_norm_segment_sum(rows, cu_seqlens, weight, bias)
    strided, wide_weight = torch.stack([rows, rows], -1)[..., 0], torch.stack([weight, weight], 1)[:, 0]
    assert torch.equal(fk.layer_norm_segment_sum(strided, cu_seqlens, wide_weight, bias), plain)
    x, y = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    fk.layer_norm_segment_sum(x, cu_seqlens, weight, bias).sum().backward()  # an expanded gradient
    fk.layer_norm_segment_sum(y, cu_seqlens, weight, bias).backward(torch.ones(len(LENGTHS), 8))
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_empty(generator, lengths, backend):
    rows, cu_seqlens, weight, bias = arguments(generator, lengths)
    given = [x.requires_grad_() for x in (rows, weight, bias)]
    sums = fk.layer_norm_segment_sum(given[0], cu_seqlens, *given[1:], 1, backend=backend)
    assert torch.equal(sums, torch.zeros(len(lengths), 8))
    sums.sum().backward()
    assert rows.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(8))
    assert torch.equal(bias.grad, torch.zeros(8))


def test_gradcheck(generator):
    rows, cu_seqlens, weight, bias = arguments(generator, (2, 0, 3), 4, torch.float64)
    for backend in BACKENDS:
        for given in ((rows, weight, bias), (rows,)):
            inputs = [x.clone().requires_grad_() for x in given]

            def op(x, scale=None, shift=None, backend=backend):
                return fk.layer_norm_segment_sum(x, cu_seqlens, scale, shift, 1, backend=backend)

            check_gradients(op, inputs)


if not ON_CPU:

    def test_opcheck(generator):
        rows, cu_seqlens, weight, bias = arguments(generator)
        given = [x.requires_grad_() for x in (rows, weight, bias)]
        operator = KERNELS.layer_norm_segment_sum.default
        torch.library.opcheck(operator, (given[0], cu_seqlens, *given[1:], 1, 1e-6))
        torch.library.opcheck(operator, (given[0], cu_seqlens, None, None, 1, 1e-6))
        grad = torch.randn(len(LENGTHS), 8, generator=generator).requires_grad_()
        operator = KERNELS.layer_norm_segment_sum_backward.default
        torch.library.opcheck(operator, (grad, given[0], cu_seqlens, given[1], 1, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(generator, backend):
    rows, cu_seqlens, weight, bias = arguments(generator)

    def loss(x, scale, shift):
        return fk.layer_norm_segment_sum(x, cu_seqlens, scale, shift, 1, backend=backend).square().sum()

    x, y = ([z.clone().requires_grad_() for z in (rows, weight, bias)] for _ in range(2))
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*x).backward()
    loss(*y).backward()
    for ours, plain in zip(x, y, strict=True):
        assert torch.equal(ours.grad, plain.grad)


def test_five_runs_give_the_same_bits(generator):
    rows, cu_seqlens, weight, bias = arguments(generator, (300, 70, 130), 72)

    def results():
        x = rows.clone().requires_grad_()
        sums = fk.layer_norm_segment_sum(x, cu_seqlens, weight, bias, 1)
        sums.sin().sum().backward()
        return torch.cat([sums.detach(), x.grad])

    first = results()
    assert all(torch.equal(results(), first) for _ in range(4))


@pytest.mark.parametrize("boundaries", [[0, 3], [1, 4], [0, 3, 2, 4], [0, 5, 4], [0, -1, 4]])
def test_boundaries_are_checked(boundaries):
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    message = r"layer_norm_segment_sum: argument `cu_seqlens` must .*0 to T = 4"
    with pytest.raises(ValueError, match=message):
        fk.layer_norm_segment_sum(torch.zeros(4, 2), cu_seqlens, backend="reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4)}, "`rows` must be a floating-point tensor"),
        ({"cu_seqlens": torch.zeros(2)}, "`cu_seqlens` must be int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "`cu_seqlens`"),
        ({"cu_seqlens": [0, 4]}, "Take it from pack_tokens"),
        ({"weight": torch.ones(3)}, r"`weight` must be \(8,\), one value for each column"),
        ({"weight": torch.ones(1, 8)}, "`weight` must be a floating-point tensor"),
        ({"bias": torch.ones(8, dtype=torch.int64)}, "`bias` must be a floating-point tensor"),
        ({"bias": torch.ones(8, device="meta")}, "`bias`.*on cpu like the other arguments"),
        ({"bias": 1.0}, "`bias` must be a tensor"),
        ({"prefix": -1}, "`prefix`"),
        ({"eps": -1e-6}, "`eps`"),
        ({"eps": None}, "`eps`"),
        ({"backend": "gpu"}, "Choose one of"),
        ({"rows": torch.zeros(4, 8, device="meta")}, "on meta like the other arguments"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"rows": torch.zeros(4, 8), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}
    with pytest.raises((ValueError, TypeError), match=f"layer_norm_segment_sum.*{message}"):
        fk.layer_norm_segment_sum(**(given | change))
