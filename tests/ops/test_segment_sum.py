import pytest
import torch
from accuracy import BACKEND, BACKENDS, DTYPES, KERNELS, assert_all_accurate, check_gradients, normal

import fastshap_kernels as fk

LENGTHS = (3, 0, 1, 40, 0, 70, 7)


def rows_and_boundaries(generator, lengths=LENGTHS, width=5, dtype=torch.float32):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return normal(generator, sum(lengths), width, dtype=dtype), cu_seqlens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("width", [1, 5, 130])
def test_definition(generator, width, prefix, backend):
    rows, cu_seqlens = rows_and_boundaries(generator, width=width, dtype=torch.float64)
    sums = [sequence[prefix:].sum(0) for sequence in rows.split(LENGTHS)]
    torch.testing.assert_close(fk.segment_sum(rows, cu_seqlens, prefix, backend=backend), torch.stack(sums))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("width", [24, 64, 100])
def test_backends_agree(generator, width, prefix, dtype):
    lengths = (*LENGTHS, 1025)
    rows, cu_seqlens = rows_and_boundaries(generator, lengths, width, dtype)
    cotangent = normal(generator, len(lengths), width)

    def run(backend, rows):
        return [fk.segment_sum(rows, cu_seqlens, prefix, backend=backend)]

    def plain(rows):
        return [torch.stack([sequence[prefix:].sum(0) for sequence in rows.split(lengths)])]

    def gradient(function):
        x = rows.clone().requires_grad_()
        return torch.autograd.grad(function(x)[0], x, cotangent.to(dtype))[0]

    assert_all_accurate(run, [rows], dtype, terms=1025, plain=plain)
    for backend in BACKENDS:
        assert torch.equal(gradient(lambda x, backend=backend: run(backend, x)), gradient(plain))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_width_and_any_address(generator, dtype, width):
    rows, cu_seqlens = rows_and_boundaries(generator, width=width, dtype=dtype)
    flat = torch.cat([rows.new_zeros(1), rows.flatten()])
    shifted = flat[1:].view_as(rows)  # contiguous, and no multiple of 16 bytes in memory
    cotangent = normal(generator, len(LENGTHS) * width + 1)[1:].to(dtype)

    def gradient(x, backend):
        x = x.detach().requires_grad_()
        sums = fk.segment_sum(x, cu_seqlens, 1, backend=backend)
        return torch.autograd.grad(sums, x, cotangent.view_as(sums))[0]

    def run(backend, rows):
        return [fk.segment_sum(rows, cu_seqlens, 1, backend=backend)]

    assert_all_accurate(run, [shifted], dtype, terms=max(LENGTHS))
    assert torch.equal(gradient(shifted, BACKEND), gradient(rows, "reference"))


@pytest.mark.parametrize("prefix", [2**31 - 1, 2**31 - 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_longer_than_any_sequence(generator, prefix, backend):
    rows, cu_seqlens = rows_and_boundaries(generator)
    sums = fk.segment_sum(rows.requires_grad_(), cu_seqlens, prefix, backend=backend)
    assert torch.equal(sums, torch.zeros(len(LENGTHS), 5))
    sums.sum().backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_rows_are_left_out_not_multiplied(generator, backend, rubbish):
    rows, cu_seqlens = rows_and_boundaries(generator)
    spoiled = rows.clone()
    spoiled[cu_seqlens[:-1][cu_seqlens.diff() > 0].long()] = rubbish
    clean, same = (fk.segment_sum(x, cu_seqlens, 1, backend=backend) for x in (rows, spoiled))
    assert torch.equal(clean, same)


def test_strided_and_expanded_inputs(generator):
    rows, cu_seqlens = rows_and_boundaries(generator)
    strided = torch.stack([rows, rows], -1)[..., 0]
    assert torch.equal(fk.segment_sum(strided, cu_seqlens, 1), fk.segment_sum(rows, cu_seqlens, 1))
    x = rows.clone().requires_grad_()
    fk.segment_sum(x, cu_seqlens).sum().backward()  # an expanded gradient
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_empty(generator, lengths, backend):
    rows, cu_seqlens = rows_and_boundaries(generator, lengths)
    sums = fk.segment_sum(rows.requires_grad_(), cu_seqlens, 1, backend=backend)
    assert torch.equal(sums, torch.zeros(len(lengths), 5))
    sums.sum().backward()
    assert rows.grad.shape == (0, 5)


def test_gradcheck(generator):
    rows, cu_seqlens = rows_and_boundaries(generator, (2, 0, 3), 2, torch.float64)
    for backend in BACKENDS:

        def op(x, backend=backend):
            return fk.segment_sum(x, cu_seqlens, 1, backend=backend)

        check_gradients(op, rows.clone().requires_grad_())


def test_the_backward_operator_has_a_gradient(generator):
    rows, cu_seqlens = rows_and_boundaries(generator)
    grad = torch.randn(len(LENGTHS), 5, generator=generator).requires_grad_()
    spread = KERNELS.segment_sum_backward(grad, cu_seqlens, 1, len(rows))
    (gradient,) = torch.autograd.grad(spread, grad, rows)
    assert torch.equal(gradient, fk.segment_sum(rows, cu_seqlens, 1))
    torch.library.opcheck(KERNELS.segment_sum_backward.default, (grad, cu_seqlens, 1, len(rows)))


def test_opcheck(generator):
    rows, cu_seqlens = rows_and_boundaries(generator)
    torch.library.opcheck(KERNELS.segment_sum.default, (rows.requires_grad_(), cu_seqlens, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(generator, backend):
    rows, cu_seqlens = rows_and_boundaries(generator)

    def loss(x):
        return fk.segment_sum(x, cu_seqlens, 1, backend=backend).square().sum()

    x, y = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_five_runs_give_the_same_bits(generator):
    rows, cu_seqlens = rows_and_boundaries(generator, (300, 700) * (20 if BACKEND == "cpu" else 2), 70)
    first = fk.segment_sum(rows, cu_seqlens, 1)
    assert all(torch.equal(fk.segment_sum(rows, cu_seqlens, 1), first) for _ in range(4))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend in ("reference", "cpu")])
@pytest.mark.parametrize("boundaries", [[0, 3], [1, 4], [0, 3, 2, 4], [0, 5, 4], [0, -1, 4]])
def test_boundaries_are_checked(boundaries, backend):
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match=r"segment_sum: argument `cu_seqlens` must .*0 to T = 4"):
        fk.segment_sum(torch.zeros(4, 2), cu_seqlens, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4)}, "`rows` must be a floating-point tensor"),
        ({"cu_seqlens": torch.zeros(2)}, "`cu_seqlens` must be int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "`cu_seqlens`"),
        ({"cu_seqlens": [0, 4]}, "Take it from pack_tokens"),
        ({"prefix": -1}, "`prefix`"),
        ({"backend": "gpu"}, "Choose one of"),
        ({"rows": torch.zeros(4, 2, device="meta")}, "on meta like the other arguments"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"rows": torch.zeros(4, 2), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}
    with pytest.raises((ValueError, TypeError), match=f"segment_sum.*{message}"):
        fk.segment_sum(**(arguments | change))
