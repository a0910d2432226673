"""What holds for any input: round trips, complements, splits of a batch, Shapley's axioms, packed attention as masked.

HYPOTHESIS_PROFILE=long tries many more than a default run.
"""

from math import comb

import torch
from accuracy import BACKEND
from hypothesis import given
from hypothesis import strategies as st

import fastshap_kernels as fk

SEEDS = st.integers(0, 2**31)
PLAYERS = st.sampled_from((1, 2, 5, 31, 32, 33, 64, 70))
FEW = st.integers(1, 6)
#: In any order of sums.
CLOSE = {"rtol": 1e-9, "atol": 1e-9} if BACKEND != "triton" else {"rtol": 1e-4, "atol": 1e-4}
DTYPE = torch.float32 if BACKEND == "triton" else torch.float64


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def mask(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def assert_close(ours, wanted):
    torch.testing.assert_close(ours, wanted, **CLOSE)


@given(SEEDS, FEW, FEW, st.integers(1, 200))
def test_bits_round_trip_and_complements(seed, batch, coalitions, players):
    present = mask(seed, batch, coalitions, players)
    bits = fk.pack_bits(present)
    assert torch.equal(fk.unpack_bits(bits, players), present)
    assert torch.equal(fk.unpack_bits(~bits, players), ~present)
    assert torch.equal(fk.pack_bits(fk.unpack_bits(~bits, players)), fk.pack_bits(~present))


@given(
    st.integers(0, 2**64 - 1), st.integers(0, 2**62), FEW, FEW, st.integers(2, 100), st.booleans(), st.integers(0, 6)
)
def test_samples_do_not_depend_on_how_a_batch_is_split(seed, offset, batch, coalitions, players, paired, cut):
    cut = min(cut, batch)
    given_to_all = {"seed": seed, "paired": paired, "backend": BACKEND}
    whole = fk.sample_coalitions(batch, coalitions, players, offset=offset, **given_to_all)
    first = fk.sample_coalitions(cut, coalitions, players, offset=offset, **given_to_all)
    later = offset + cut * coalitions
    rest = fk.sample_coalitions(batch - cut, coalitions, players, offset=later, **given_to_all)
    assert torch.equal(whole, torch.cat([first, rest]))
    wanted = fk.sample_coalitions(
        batch, coalitions, players, offset=offset, seed=seed, paired=paired, backend="reference"
    )
    assert torch.equal(whole, wanted)
    present = fk.unpack_bits(whole, players)
    assert ((present.sum(-1) > 0) & (present.sum(-1) < players)).all()
    if paired:
        odd = present[:, 1::2]
        assert torch.equal(odd, ~present[:, 0::2][:, : odd.shape[1]])


@given(SEEDS, st.integers(2, 4), st.integers(2, 6), PLAYERS, st.integers(1, 40))
def test_sums_and_losses_know_one_image_and_one_coalition(seed, batch, coalitions, players, width):
    """Neither the batch nor the other coalitions of a call change a result."""
    features, values = normal(seed, batch, players, width), normal(seed + 1, batch, coalitions, 7)
    weight, bias, bits = (
        normal(seed + 2, 7, width),
        normal(seed + 3, 7),
        fk.pack_bits(mask(seed, batch, coalitions, players)),
    )
    phi = normal(seed + 4, batch, players, 7)

    def evaluate(images, some):
        game = (bits[images, some], values[images, some])
        return (
            fk.coalition_sum(features[images], game[0], backend=BACKEND),
            fk.shapley_regression_loss(phi[images], *game, reduction="none", backend=BACKEND),
            fk.linear_shapley_loss(features[images], weight, bias, *game, reduction="none", backend=BACKEND),
        )

    everything = slice(None)
    whole = evaluate(everything, everything)
    of_images = [evaluate(slice(b, b + 1), everything) for b in range(batch)]
    of_coalitions = [evaluate(everything, slice(m, m + 1)) for m in range(coalitions)]
    for i in range(3):
        assert_close(torch.cat([parts[i] for parts in of_images]), whole[i])
        assert_close(torch.cat([parts[i] for parts in of_coalitions], 1), whole[i])


@given(SEEDS, FEW, FEW, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_masked_images_know_one_image_and_one_coalition(seed, batch, coalitions, rows, columns, height, width):
    images = normal(seed, batch, 3, rows * height, columns * width)
    bits = fk.pack_bits(mask(seed, batch, coalitions, rows * columns))
    masked = fk.mask_patches(images, bits, (rows, columns), 0.5, backend=BACKEND).unflatten(0, (batch, coalitions))
    for b in range(batch):
        for m in range(coalitions):
            one = bits[b : b + 1, m : m + 1]
            alone = fk.mask_patches(images[b : b + 1], one, (rows, columns), 0.5, backend=BACKEND)[0]
            assert torch.equal(masked[b, m], alone)
            other = fk.mask_patches(torch.full_like(alone, 0.5)[None], one, (rows, columns), images[b], backend=BACKEND)
            # With image and baseline exchanged a coalition shows what its complement does.
            complement = fk.pack_bits(~fk.unpack_bits(one, rows * columns))
            wanted = fk.mask_patches(images[b : b + 1], complement, (rows, columns), 0.5, backend=BACKEND)
            assert torch.equal(other, wanted)


@given(SEEDS, FEW, FEW, PLAYERS, st.integers(0, 3), st.integers(1, 3))
def test_packed_attention_is_masked_attention(seed, batch, coalitions, players, prefix, heads):
    """And the sum of a sequence's rows is the sum over the tokens that are present."""
    width, present = heads * 8, mask(seed, batch, coalitions, players)
    tokens, bits = normal(seed, batch, prefix + players, 3 * width), fk.pack_bits(present)
    rows, cu_seqlens, longest = fk.pack_tokens(tokens, bits, prefix, backend=BACKEND)
    backend = BACKEND if BACKEND != "cuda" else "reference"
    packed = fk.packed_attention(rows.unflatten(1, (3, heads, 8)), cu_seqlens, longest, backend=backend)
    sums = fk.segment_sum(packed.flatten(1), cu_seqlens, prefix, backend=BACKEND)

    kept = torch.nn.functional.pad(present, (prefix, 0), value=True).flatten(0, 1)
    dense = tokens.repeat_interleave(coalitions, 0).unflatten(2, (3, heads, 8)).permute(2, 0, 3, 1, 4)
    scores = (dense[0] @ dense[1].mT) * 8**-0.5
    attended = scores.masked_fill(~kept[:, None, None], -torch.inf).softmax(-1).nan_to_num() @ dense[2]
    attended = attended.transpose(1, 2).flatten(2)
    assert_close(packed.flatten(1), attended[kept])
    kept[:, :prefix] = False
    assert_close(sums, torch.where(kept[..., None], attended, 0).sum(1))


@given(SEEDS, st.integers(1, 7), st.integers(1, 5), st.randoms(use_true_random=False))
def test_exact_values_are_efficient_linear_and_symmetric(seed, players, classes, random):
    values, other = normal(seed, 2**players, classes), normal(seed + 1, 2**players, classes)
    phi = fk.exact_shapley(values, backend=BACKEND)
    assert_close(phi.sum(0), values[-1] - values[0])
    both = fk.exact_shapley(2 * values - 3 * other, backend=BACKEND)
    assert_close(both, 2 * phi - 3 * fk.exact_shapley(other, backend=BACKEND))
    order = list(range(players))
    random.shuffle(order)
    # Player p of the new game is player order[p] of the old one.
    coalitions = torch.arange(2**players)
    renamed = sum(((coalitions >> p) & 1) << order[p] for p in range(players))
    assert_close(fk.exact_shapley(values[renamed], backend=BACKEND), phi[order])
    # A player who changes no value has none.
    dummy = values[coalitions & ~1]
    assert_close(fk.exact_shapley(dummy, backend=BACKEND)[0], torch.zeros(classes, dtype=DTYPE))


@given(SEEDS, st.integers(2, 7), st.integers(1, 4))
def test_all_coalitions_give_the_exact_values(seed, players, classes):
    values = normal(seed, 2**players, classes).double()
    present = (torch.arange(2**players)[1:-1, None] >> torch.arange(players) & 1).bool()
    weights = [[1 / (comb(players, s) * s * (players - s)) for s in present.sum(1).tolist()]]
    game = fk.pack_bits(present)[None], values[None, 1:-1], values[0], values[None, -1]
    kernel = torch.tensor(weights, dtype=torch.float64)
    estimate = fk.kernel_shap(*game, players=players, weights=kernel, backend="reference")
    exact = fk.exact_shapley(values, backend=BACKEND)
    torch.testing.assert_close(estimate.phi[0], exact, rtol=1e-7, atol=1e-7)
