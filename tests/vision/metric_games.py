"""Games with known answers."""

import torch
from torch import nn

from fastshap_kernels import unpack_bits


class SetGame(nn.Module):
    """v_x(S) = `logits`(S), a function of bool (B, M, P) and images (B, 1, 1, P); records which it evaluated."""

    def __init__(self, players, logits):
        super().__init__()
        self.players, self.grid, self.logits = players, (1, players), logits
        self.asked = []

    def coalition_values(self, images, bits):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert bits.shape[0] == len(images)
        present = unpack_bits(bits, self.players)
        self.asked.append(present)
        return self.logits(present, images)


def linear_game(weights, null=0.0, dtype=torch.float64):
    """v_x(S) = null + Σ_{p∈S} x_p w_p (P, K); its exact attributions are x_p w_p."""
    weights = weights.to(dtype)

    def logits(present, images):
        return null + (present * images.flatten(1).unsqueeze(1).to(dtype)) @ weights

    return SetGame(len(weights), logits)


def two_class_game(probability):
    """A game of two classes in which class 0 has `probability`(S), of bool (B, M, P)."""

    def logits(present, images):
        p = probability(present).double()
        return torch.stack([p.log(), (1 - p).log()], 2)

    return logits
