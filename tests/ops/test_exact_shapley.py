from itertools import permutations
from math import factorial

import pytest
import torch
from accuracy import BACKEND, BACKENDS, DTYPES, KERNELS, assert_all_accurate, check_gradients, normal

import fastshap_kernels as fk


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Triton's interpreter takes as long for a program of a few coalitions as for one of many."""
    if BACKEND == "triton":
        monkeypatch.setattr("fastshap_kernels.triton.exact_shapley._PROGRAMS", 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("players", [1, 2, 3, 4, 5, 6])
def test_definition(generator, players, backend):
    """The average gain of joining, over every order in which the players can join."""
    values = normal(generator, 2**players, 2)
    phi = torch.zeros(players, 2, dtype=torch.float64)
    for order in permutations(range(players)):
        coalition = 0
        for player in order:
            phi[player] += values[coalition | 1 << player] - values[coalition]
            coalition |= 1 << player
    phi /= factorial(players)
    assert (fk.exact_shapley(values, backend=backend) - phi).abs().max() <= 1e-13


def assert_values_accurate(values, dtype):
    def run(backend, values):
        return [fk.exact_shapley(values, backend=backend)]

    # Every dtype is summed in float64.
    assert_all_accurate(run, [values], dtype, terms=values.shape[-2], working=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("players", "classes"), [(1, 1), (2, 3), (6, 5), (7, 64), (8, 65), (9, 130), (12, 7), (15, 1)])
def test_backends_agree(generator, players, classes, dtype):
    assert_values_accurate(normal(generator, 3, 2**players, classes), dtype)


@pytest.mark.parametrize(("images", "players", "classes"), [(128, 10, 33), (40, 11, 64), (300, 4, 3), (1, 13, 129)])
def test_slices_of_every_length(generator, images, players, classes):
    """Where games are many, a thread block or program reads more of the coalitions."""
    if BACKEND == "triton":
        images = -(-images // 32)
    assert_values_accurate(normal(generator, images, 2**players, classes), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_players(generator, backend):
    """A game whose Shapley values are known: the sum of the players' numbers, plus a prize for all twenty."""
    numbers = normal(generator, 20)
    values = torch.zeros(1, dtype=torch.float64)
    for number in numbers:
        values = torch.cat([values, values + number])
    values[-1] += 3.0
    phi = fk.exact_shapley(values.unsqueeze(1), backend=backend).squeeze(1)
    assert (phi - numbers - 3.0 / 20).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_summed_in_float64_and_rounded_once(generator, dtype, backend):
    values = normal(generator, 2, 2**10, 4, dtype=dtype)
    exact = fk.exact_shapley(values.double(), backend="reference")
    off = (fk.exact_shapley(values, backend=backend).double() - exact).abs()
    assert (off <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-13).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_constant_costs_no_digits(generator, backend):
    values = normal(generator, 2**8, 3).mul(2**20).round()  # whole numbers: adding 2^40 is exact
    phi = fk.exact_shapley(values, backend=backend)
    shifted = fk.exact_shapley(values + 2.0**40, backend=backend)
    assert torch.equal(phi, shifted)


def test_any_leading_shape_and_strides(generator):
    values = normal(generator, 2, 3, 4, 2**5, dtype=torch.float32).mT
    phi = fk.exact_shapley(values.reshape(2, 3, 2**5, 4))
    strided = fk.exact_shapley(values)
    assert strided.shape == (2, 3, 5, 4)
    assert torch.equal(strided, phi)
    assert torch.equal(fk.exact_shapley(values[0, 0]), phi[0, 0])
    expanded = values[:1, :1].expand(2, 3, -1, -1)
    assert torch.equal(fk.exact_shapley(expanded), phi[:1, :1].expand(2, 3, -1, -1))


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0), (2, 0, 8, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(shape, backend):
    phi = fk.exact_shapley(torch.zeros(shape, requires_grad=True), backend=backend)
    assert phi.shape == (*shape[:-2], 3, shape[-1])
    phi.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(generator, dtype):
    def run(backend, values, cotangent):
        x = values.detach().requires_grad_()
        return torch.autograd.grad(fk.exact_shapley(x, backend=backend), x, cotangent)

    inputs = normal(generator, 3, 2**6, 5), normal(generator, 3, 6, 5)
    assert_all_accurate(run, inputs, dtype, terms=6, working=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(generator, backend):
    shape = (1, 2**2, 1) if backend == "triton" else (2, 2**3, 2)  # the interpreter is slow
    values = normal(generator, *shape).requires_grad_()
    check_gradients(lambda x: fk.exact_shapley(x, backend=backend), values)


@pytest.mark.parametrize("shape", [(16, 3), (2, 3, 8, 2)])
def test_opcheck(generator, shape):
    values = normal(generator, *shape, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(KERNELS.exact_shapley.default, (values,))


def test_compiles_without_graph_breaks(generator):
    def loss(x):
        return fk.exact_shapley(x).square().sum()

    x = normal(generator, 2, 16, 3).requires_grad_()
    y = x.detach().clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_runs_and_thread_counts_give_the_same_bits(generator):
    values = normal(generator, 5, 2**9, 70, dtype=torch.float32)
    first = fk.exact_shapley(values, backend=BACKEND)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4, 1) if BACKEND == "cpu" else (1,):
            torch.set_num_threads(count)
            assert torch.equal(fk.exact_shapley(values, backend=BACKEND), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], r"`values` must be a tensor \(..., 2\^P, K\)"),
        (torch.zeros(8), "`values` must be a floating-point tensor"),
        (torch.zeros(8, 2, dtype=torch.int64), "`values` must be a floating-point tensor"),
        (torch.zeros(3, 6, 2), r"every coalition of 1 ≤ P ≤ 20 players.*\(3, 6, 2\).*use kernel_shap"),
        (torch.zeros(0, 2), "every coalition"),
        (torch.zeros(1, 2), "every coalition"),
        (torch.zeros(1, 1).expand(2**21, 1), "every coalition"),
    ],
)
def test_bad_input_is_named(values, message):
    with pytest.raises((ValueError, TypeError), match=f"exact_shapley.*{message}"):
        fk.exact_shapley(values)
