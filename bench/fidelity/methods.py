"""The post-hoc methods that self-explaining models are compared with, under one signature.

`METHODS[key](subject, images, target)` attributes the logit of class `target` to the patches of the game's grid:
float32 (B, P), larger = more important. Hand over all images at once: seeds count images from the first one, and each
method cuts the images into parts that memory holds.

captum does what it does well (gradients, occlusion, its own KernelShap, Grad-CAM on feature maps); what evaluates
coalitions is here, what reads attention in attention.py.
"""

from __future__ import annotations

from functools import partial

import torch
from captum.attr import InputXGradient, IntegratedGradients, KernelShap, NoiseTunnel, Occlusion, Saliency
from torch import Tensor

import fastshap_kernels as fk
import fastshap_vision as fv
from bench.fidelity.attention import attention_rollout, chefer, grad_cam
from bench.fidelity.subject import AT_ONCE, Game, Method, Subject, in_parts, of_target, patch_size, seeded, to_patches

__all__ = ["METHODS", "Method", "Subject", "to_patches"]


def random(subject: Subject, images: Tensor, target: Tensor, seed: int = 0) -> Tensor:
    """Uniform numbers: the floor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(images), subject.players, generator=generator).to(images.device)


def gradient_input(subject: Subject, images: Tensor, target: Tensor) -> Tensor:
    """Σ x · ∂f/∂x over a patch.

    Source: Shrikumar et al., Not just a black box (2016).
    """
    method = InputXGradient(subject.model)

    def call(part: Tensor, of: Tensor) -> Tensor:
        return to_patches(method.attribute(part.detach().requires_grad_(), target=of), subject.grid)

    return in_parts(call, images, target, 1)


def integrated_gradients(subject: Subject, images: Tensor, target: Tensor, steps: int = 50) -> Tensor:
    """Σ x · mean of ∂f/∂x on the way from 0 (the mean colour) to x.

    Source: Sundararajan et al., Axiomatic attribution for deep networks (2017).
    """
    method = IntegratedGradients(subject.model)

    def call(part: Tensor, of: Tensor) -> Tensor:
        return to_patches(method.attribute(part, baselines=0.0, target=of, n_steps=steps), subject.grid)

    return in_parts(call, images, target, steps)


def smoothgrad(
    subject: Subject,
    images: Tensor,
    target: Tensor,
    times_input: bool = False,
    samples: int = 50,
    noise: float = 0.15,
    seed: int = 0,
) -> Tensor:
    """Mean gradient ḡ of noisy copies: Σ |ḡ| over a patch, or Σ x · ḡ, which knows for and against.

    Noise deviates by 0.15 of each image's range, as in the source.

    Source: Smilkov et al., SmoothGrad: removing noise by adding noise (2017).
    """
    # captum adds the same noise to all inputs: images of range 1 take it, and get their range back before the model.
    method = NoiseTunnel(Saliency(lambda unit, ranges: subject.model(unit * ranges)))

    def call(part: Tensor, of: Tensor) -> Tensor:
        ranges = (part.amax((1, 2, 3), keepdim=True) - part.amin((1, 2, 3), keepdim=True)).clamp_min(1e-6)
        options = {"nt_samples": samples, "stdevs": noise, "abs": False, "additional_forward_args": (ranges,)}
        gradient = method.attribute(part / ranges, target=of, **options) / ranges
        return to_patches(part * gradient if times_input else gradient.abs(), subject.grid)

    with seeded(seed, images.device):
        return in_parts(call, images, target, samples)


# -- patches removed -------------------------------------------------------------------------------------------------


def occlusion(subject: Subject, images: Tensor, target: Tensor) -> Tensor:
    """f(x) − f(x with the patch's pixels at 0, the mean colour).

    Source: Zeiler and Fergus, Visualizing and understanding convolutional networks (2014).
    """
    method = Occlusion(subject.model)
    height, width = patch_size(images, subject.grid)
    window = (images.shape[1], height, width)

    def call(part: Tensor, of: Tensor) -> Tensor:
        at_once = min(subject.players, AT_ONCE)
        pixels = method.attribute(part, window, window, baselines=0.0, target=of, perturbations_per_eval=at_once)
        return pixels[:, 0, ::height, ::width].flatten(1)  # each pixel has its patch's value

    return in_parts(call, images, target, subject.players)


def captum_kernel_shap(subject: Subject, images: Tensor, target: Tensor, samples: int, seed: int = 0) -> Tensor:
    """captum's KernelShap: unpaired coalitions, pixels at 0, both ends as two heavy samples.

    Source: Lundberg and Lee, A unified approach to interpreting model predictions (2017).
    """
    method = KernelShap(subject.model)
    height, width = patch_size(images, subject.grid)
    patches = torch.arange(subject.players, device=images.device).view(1, 1, *subject.grid)
    mask = patches.repeat_interleave(height, 2).repeat_interleave(width, 3)
    options = {"n_samples": samples, "perturbations_per_eval": AT_ONCE, "return_input_shape": False}

    def call(image: Tensor, of: Tensor) -> Tensor:
        return method.attribute(image, baselines=0.0, target=of, feature_mask=mask, **options).view(1, -1)

    with seeded(seed, images.device):
        return in_parts(call, images, target, AT_ONCE).to(images.device)  # captum solves on the CPU


@torch.no_grad()
def leave_one_out(subject: Subject, images: Tensor, target: Tensor) -> Tensor:
    """v(N) − v(N∖p), in the game."""
    players = subject.players
    present = torch.ones(players + 1, players, dtype=torch.bool, device=images.device)
    present[1:].fill_diagonal_(False)
    bits = fk.pack_bits(present).repeat(len(images), 1, 1)
    values = of_target(subject.game.coalition_values(images, bits), target)
    return values[:, :1] - values[:, 1:]


def kernel_shap(subject: Subject, images: Tensor, target: Tensor, evaluations: int, seed: int = 0) -> Tensor:
    """This package's KernelSHAP, in the game: v(∅), v(N) and evaluations − 2 paired coalitions.

    Fewer pairs than players do not determine the values. Where pairs are scarce, the values are those of least
    variance over the players among all that fit best, as in the other libraries: the even split as far as the
    coalitions say nothing else.

    Source: Covert and Lee, Improving KernelSHAP (2021).
    """
    coalitions, game = evaluations - 2, subject.game
    if coalitions >= 4 * subject.players:
        phi = fv.kernel_shap_values(game, images, coalitions, seed).phi
        return of_target(phi, target)
    return _scarce_kernel_shap(game, images, target, coalitions, seed)


@torch.no_grad()
def _scarce_kernel_shap(game: Game, images: Tensor, target: Tensor, coalitions: int, seed: int) -> Tensor:
    players = game.players
    ends = fk.pack_bits(torch.tensor([False, True], device=images.device).view(1, 2, 1).expand(1, 2, players))
    drawn = fk.sample_coalitions(len(images), coalitions, players, seed=seed, device=images.device)
    bits = torch.cat([ends.expand(len(images), -1, -1), drawn], 1)
    values = of_target(game.coalition_values(images, bits), target).double()
    null, grand, values = values[:, :1], values[:, 1:2], values[:, 2:]
    present = fk.unpack_bits(drawn, players).double()
    share = present.mean(2)
    rest = values - null - share * (grand - null)
    psi = torch.linalg.pinv(present - share.unsqueeze(2)) @ rest.unsqueeze(2)
    return (grand - null) / players + psi[..., 0]


BOTH = ("vit", "cnn")

#: Every method by its key, the floor first.
METHODS: dict[str, Method] = {
    "random": Method("random", BOTH, lambda players: 0, random),
    "gradient_input": Method("gradient × input", BOTH, lambda players: 3, gradient_input),
    "integrated_gradients": Method("integrated gradients", BOTH, lambda players: 3 * 50, integrated_gradients),
    "smoothgrad": Method("SmoothGrad", BOTH, lambda players: 3 * 50, smoothgrad),
    "smoothgrad_input": Method(
        "SmoothGrad × input", BOTH, lambda players: 3 * 50, partial(smoothgrad, times_input=True)
    ),
    "grad_cam": Method("Grad-CAM", BOTH, lambda players: 3, grad_cam),
    "attention_rollout": Method("attention rollout", ("vit",), lambda players: 1, attention_rollout),
    "chefer": Method("Chefer et al.", ("vit",), lambda players: 3, chefer),
    "occlusion": Method("occlusion", BOTH, lambda players: players + 1, occlusion),
    "leave_one_out": Method("leave-one-out", BOTH, lambda players: players + 1, leave_one_out),
    "captum_kernel_shap_512": Method(
        "KernelShap (captum), 512", BOTH, lambda players: 512, partial(captum_kernel_shap, samples=512)
    ),
    "kernel_shap_64": Method("KernelSHAP, 64", BOTH, lambda players: 64, partial(kernel_shap, evaluations=64)),
    "kernel_shap_512": Method("KernelSHAP, 512", BOTH, lambda players: 512, partial(kernel_shap, evaluations=512)),
    "kernel_shap_4096": Method("KernelSHAP, 4096", BOTH, lambda players: 4096, partial(kernel_shap, evaluations=4096)),
}
