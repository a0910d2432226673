"""The rule of accuracy: right results pass in whatever order they are added up, small mistakes do not."""

import pytest
import torch
from accuracy import DTYPES

from fastshap_kernels.testing import assert_accurate, spread

ROWS, TERMS = 64, 300


def numbers(generator, dtype, one_sign):
    values = torch.randn(ROWS, TERMS, generator=generator, dtype=torch.float64)
    return (values.abs() if one_sign else values).to(dtype)


def add(x, chunk):
    """The sums of rows, `chunk` numbers after one another at a time, in float32 or better; rounded at the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = torch.zeros(ROWS, dtype=wide.dtype)
    for part in wide.split(chunk, 1):
        partial = torch.zeros(ROWS, dtype=wide.dtype)
        for column in part.unbind(1):
            partial = partial + column
        total = total + partial
    return total.to(x.dtype)


def check(ours, x):
    exact = x.double().sum(1)
    moved = spread(lambda x: [x.sum(1)], [x.double()])[0]
    assert_accurate(ours, x.sum(1), exact, moved, TERMS)


@pytest.mark.parametrize("one_sign", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_order_of_a_sum_is_accurate(generator, dtype, one_sign):
    x = numbers(generator, dtype, one_sign)
    for chunk in (16, 32, 64):
        check(add(x, chunk), x)
        check(add(x.flip(1), chunk), x)
        check(add(x[:, torch.randperm(TERMS, generator=generator)], chunk), x)


@pytest.mark.parametrize("one_sign", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_term_is_found(generator, dtype, one_sign):
    x = numbers(generator, dtype, one_sign)
    with pytest.raises(AssertionError):
        check(add(x[:, 1:], TERMS), x)
    one_row = x.clone()
    one_row[7, 11] = 0
    if not (one_sign and dtype == torch.bfloat16):  # there the sum is rounded by as much
        with pytest.raises(AssertionError):
            check(add(one_row, TERMS), x)


@pytest.mark.parametrize("one_sign", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_scale_is_found(generator, dtype, one_sign):
    """P / (P - 1) where it should be 1."""
    x = numbers(generator, dtype, one_sign)
    players = 32 if dtype == torch.bfloat16 else TERMS  # a rounding to bfloat16 is as large as 1 / 256
    ours = (add(x.double(), TERMS) * players / (players - 1)).to(dtype)
    with pytest.raises(AssertionError):
        check(ours, x)


@pytest.mark.parametrize("one_sign", [True, False])
def test_bfloat16_where_float32_belongs_is_found(generator, one_sign):
    x = numbers(generator, torch.float32, one_sign)
    with pytest.raises(AssertionError):  # terms
        check(add(x.bfloat16().float(), TERMS), x)
    with pytest.raises(AssertionError):  # the result
        check(add(x, TERMS).bfloat16().float(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one_sign", [True, False])
def test_sums_in_half_precision_are_found(generator, dtype, one_sign):
    x = numbers(generator, dtype, one_sign)
    total = torch.zeros(ROWS, dtype=dtype)
    for column in x.unbind(1):
        total = total + column
    with pytest.raises(AssertionError):
        check(total, x)
    halves = x[:, ::2].float().sum(1).to(dtype) + x[:, 1::2].float().sum(1).to(dtype)  # rounded three times
    with pytest.raises(AssertionError):
        check(halves, x)


def test_float32_where_float64_belongs_is_found(generator):
    x = numbers(generator, torch.float64, False)
    with pytest.raises(AssertionError):
        check(add(x.float(), TERMS).double(), x)


def test_few_values_are_held_by_their_arithmetic_alone():
    """Plain PyTorch may be exact by luck: twice nothing is nothing."""
    x = torch.tensor([[1.0, 2.0**-24, 2.0**-24, 2.0**-24, 2.0**-24, 2.0**-24]])
    exact = x.double().sum(1)
    moved = spread(lambda x: [x.sum(1)], [x.double()])[0]
    sequential = torch.ones(1)
    assert_accurate(sequential, exact.float(), exact, moved, 6)
    with pytest.raises(AssertionError):
        assert_accurate(sequential.bfloat16().float() + 2**-10, exact.float(), exact, moved, 6)


def test_what_is_not_finite_or_of_another_dtype_is_found(generator):
    x = numbers(generator, torch.float32, False)
    spoiled = x.sum(1)
    spoiled[3] = torch.nan
    with pytest.raises(AssertionError):
        check(spoiled, x)
    with pytest.raises(AssertionError):
        check(x.sum(1).double(), x)


def test_what_the_dtype_cannot_hold_is_infinite():
    exact = torch.linspace(-6e4, 6e4, 64, dtype=torch.float64)
    exact[3], exact[5], exact[7] = 1e6, -1e7, 65519.9
    moved, right = exact.abs(), exact.half()
    assert right[3] == torch.inf
    assert right[5] == -torch.inf
    assert_accurate(right, right, exact, moved, 6)
    border = right.clone()
    border[7] = torch.inf  # what rounding makes of 65520
    assert_accurate(border, right, exact, moved, 6)
    for place, value in ((3, 65504), (3, -torch.inf), (3, torch.nan), (5, torch.inf), (40, torch.inf), (40, 0)):
        wrong = right.clone()
        wrong[place] = value
        with pytest.raises(AssertionError, match=r"error|NaN"):
            assert_accurate(wrong, right, exact, moved, 6)


def test_one_value_that_outweighs_the_others_may_be_nearer_by_luck():
    """The largest of 64 values is five roundings off, as many terms may leave it; plain PyTorch's is right by luck."""
    exact = torch.linspace(1, 2, 64, dtype=torch.float64)
    exact[9] = 2000
    plain = exact.float()
    ours = plain.clone()
    ours[9] += 6e-4
    assert_accurate(ours, plain, exact, exact.clone(), 4)
    ours[9] += 1e-2
    with pytest.raises(AssertionError, match="arithmetic"):
        assert_accurate(ours, plain, exact, exact.clone(), 4)


def test_values_beside_one_that_outweighs_them_are_held_by_both_rules():
    exact = torch.linspace(0.01, 0.2, 64, dtype=torch.float64)
    exact[9] = 1e6
    plain = exact.float()
    assert_accurate(plain, plain, exact, exact.clone(), 4)
    ours = torch.zeros_like(plain)
    ours[9] = plain[9]
    with pytest.raises(AssertionError, match="plain PyTorch's"):
        assert_accurate(ours, plain, exact, exact.clone(), 4)
