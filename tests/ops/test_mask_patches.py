import pytest
import torch
from accuracy import BACKEND, BACKENDS, DTYPES, KERNELS, assert_all_accurate, check_gradients, normal, random_bits

import fastshap_kernels as fk

FORMATS = (torch.contiguous_format, torch.channels_last)


def images_and_bits(generator, batch=3, coalitions=5, channels=3, grid=(4, 3), patch=(2, 5), dtype=torch.float32):
    shape = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    images = normal(generator, *shape, dtype=dtype)
    return images, random_bits(batch, coalitions, grid[0] * grid[1], generator)


def test_definition(generator):
    images, bits = images_and_bits(generator)
    out = fk.mask_patches(images, bits, (4, 3), 7.0)
    present = fk.unpack_bits(bits, 12)
    for b in range(3):
        for m in range(5):
            for player in range(12):
                y, x = player // 3 * 2, player % 3 * 5
                patch = out[b * 5 + m, :, y : y + 2, x : x + 5]
                if present[b, m, player]:
                    assert torch.equal(patch, images[b, :, y : y + 2, x : x + 5])
                else:
                    assert (patch == 7.0).all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree(generator, dtype, memory_format):
    images, bits = images_and_bits(generator, dtype=dtype)
    images = images.contiguous(memory_format=memory_format)
    baseline = normal(generator, *images.shape[1:], dtype=dtype)
    ours = fk.mask_patches(images, bits, (4, 3), baseline, backend=BACKEND)
    plain = fk.mask_patches(images, bits, (4, 3), baseline, backend="reference")
    assert torch.equal(ours, plain)
    assert ours.stride() == plain.stride()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["number", "channel", "image", "batch"])
def test_gradients(generator, dtype, memory_format, shape):
    images, bits = images_and_bits(generator)
    shapes = {"channel": (3,), "image": images.shape[1:], "batch": images.shape}
    baseline = torch.randn(shapes[shape], generator=generator) if shape != "number" else 0.5
    cotangent = normal(generator, 15, *images.shape[1:])

    def run(backend, images, baseline, cotangent):
        x = images.contiguous(memory_format=memory_format).detach().requires_grad_()
        fill = baseline if shape == "number" else baseline.detach().requires_grad_()
        out = fk.mask_patches(x, bits, (4, 3), fill, backend=backend)
        return torch.autograd.grad(out, [x] if shape == "number" else [x, fill], cotangent)

    # Each image's gradient has the dtype of the images before those of a shared baseline are added up.
    assert_all_accurate(run, (images, baseline, cotangent), dtype, terms=15 * 8 * 15, working=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast(generator, dtype):
    images, bits = images_and_bits(generator)
    images.requires_grad_()
    ours = fk.mask_patches(images, bits, (4, 3), dtype=dtype, backend=BACKEND)
    assert torch.equal(ours, fk.mask_patches(images, bits, (4, 3), dtype=dtype, backend="reference"))
    (gradient,) = torch.autograd.grad(ours.float().sum(), images)
    assert gradient.dtype == torch.float32


def test_absent_pixels_are_selected_not_multiplied(generator):
    images, bits = images_and_bits(generator)
    present = fk.mask_patches(torch.ones_like(images), bits, (4, 3)).bool()
    clean = fk.mask_patches(images, bits, (4, 3))
    for rubbish in (float("nan"), float("inf"), 1e30):
        spoiled = images.repeat_interleave(5, 0).masked_fill(~present, rubbish)
        assert torch.equal(fk.mask_patches(spoiled, bits.flatten(0, 1).unsqueeze(1), (4, 3)), clean)


def test_strided_and_expanded_inputs(generator):
    images, bits = images_and_bits(generator, batch=4)
    strided = torch.stack([images, images], -1)[..., 0]
    assert torch.equal(fk.mask_patches(strided, bits, (4, 3)), fk.mask_patches(images, bits, (4, 3)))
    one = images[:1].expand(4, -1, -1, -1)
    assert torch.equal(fk.mask_patches(one, bits, (4, 3)), fk.mask_patches(one.contiguous(), bits, (4, 3)))
    x = images.clone().requires_grad_()
    fk.mask_patches(x, bits, (4, 3)).sum().backward()  # an expanded gradient
    counts = fk.unpack_bits(bits, 12).sum(1).view(4, 1, 4, 1, 3, 1).expand(-1, 3, -1, 2, -1, 5)
    assert torch.equal(x.grad, counts.reshape(x.shape).float())


@pytest.mark.parametrize(("batch", "coalitions"), [(0, 3), (2, 0)])
def test_empty(generator, batch, coalitions):
    images, bits = images_and_bits(generator, batch=batch, coalitions=coalitions)
    x = images.requires_grad_()
    out = fk.mask_patches(x, bits, (4, 3))
    assert out.shape == (0, 3, 8, 15)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_gradcheck(generator):
    images, bits = images_and_bits(generator, batch=2, coalitions=2, grid=(2, 2), patch=(1, 2), dtype=torch.float64)
    baseline = normal(generator, *images.shape)
    for backend in BACKENDS:
        inputs = images.clone().requires_grad_(), baseline.clone().requires_grad_()

        def op(x, fill, backend=backend):
            return fk.mask_patches(x, bits, (2, 2), fill, backend=backend)

        check_gradients(op, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("present", [True, False])
def test_the_backward_operator_has_a_gradient(generator, present, memory_format, dtype):
    images, bits = images_and_bits(generator)
    grad = torch.randn(15, *images.shape[1:], generator=generator).to(dtype).contiguous(memory_format=memory_format)
    x, cotangent = grad.requires_grad_(), torch.randn(images.shape, generator=generator)
    out = KERNELS.mask_patches_backward(x, bits, 4, 3, present, torch.float32)
    (gradient,) = torch.autograd.grad(out, x, cotangent)
    kept = fk.mask_patches(torch.ones_like(images), bits, (4, 3)).bool() == present
    assert torch.equal(gradient, (cotangent.repeat_interleave(5, 0) * kept).to(dtype))


# torch copies a channels_last tensor as a non-leaf while it checks, and warns about itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(generator):
    images, bits = images_and_bits(generator)
    for memory_format in FORMATS:
        x = images.clone(memory_format=memory_format).requires_grad_()
        arguments = (x, bits, torch.zeros(1, 3, 8, 15), 4, 3, torch.float32)
        torch.library.opcheck(KERNELS.mask_patches.default, arguments)


def test_compiles_without_graph_breaks(generator):
    images, bits = images_and_bits(generator)

    def loss(x):
        return fk.mask_patches(x, bits, (4, 3), 0.5).square().sum()

    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_five_runs_give_the_same_bits(generator):
    images, bits = images_and_bits(generator, batch=4, coalitions=33)

    def gradient():
        x = images.clone().requires_grad_()
        fk.mask_patches(x, bits, (4, 3)).sin().sum().backward()
        return x.grad

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 15)}, "`images` must be a floating-point tensor"),
        ({"images": torch.zeros(3, 3, 8, 15, dtype=torch.int64)}, "`images`"),
        ({"bits": torch.zeros(3, 5, 2, dtype=torch.int32)}, "`bits` must be int32"),
        ({"bits": torch.zeros(3, 5, 1)}, "sample_coalitions or pack_bits"),
        ({"bits": torch.zeros(2, 5, 1, dtype=torch.int32)}, "B = 3"),
        ({"grid": (3, 3)}, r"divisor of the image size \(8, 15\)"),
        ({"grid": 4}, "two positive whole numbers"),
        ({"baseline": torch.zeros(2)}, "`baseline`"),
        ({"dtype": torch.int32}, "`dtype`"),
        ({"backend": "gpu"}, "Choose one of"),
        ({"images": torch.zeros(3, 3, 8, 15, device="meta")}, "on meta like the other arguments"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"images": torch.zeros(3, 3, 8, 15), "bits": torch.zeros(3, 5, 1, dtype=torch.int32), "grid": (4, 3)}
    with pytest.raises((ValueError, TypeError), match=f"mask_patches.*{message}"):
        fk.mask_patches(**(arguments | change))
