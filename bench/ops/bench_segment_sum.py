import torch

import fastshap_kernels as fk


def test_segment_sum(compare):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 196, (8,), generator=generator)
    lengths = 1 + torch.stack([lengths, 196 - lengths], 1).flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rows = torch.randn(int(cu_seqlens[-1]), 384, generator=generator, requires_grad=True)
    cotangent = torch.randn(16, 384, generator=generator)
    sequence = torch.arange(16).repeat_interleave(lengths)
    sequence[cu_seqlens[:-1].long()] = 16  # the prefix rows go to a sum that is dropped

    def plain():
        sums = rows.new_zeros(17, 384).index_add(0, sequence, rows)[:16]
        return torch.autograd.grad(sums, rows, cotangent)

    compare(
        "segment_sum",
        "16 sequences of 196 players in pairs, Q 1, D 384, float32, forward + backward",
        lambda: torch.autograd.grad(fk.segment_sum(rows, cu_seqlens, 1), rows, cotangent),
        plain,
        against="index_add with ready indices",
        rounds=60,
    )
