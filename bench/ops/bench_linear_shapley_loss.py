import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastshap_kernels as fk

SHAPE = "B 32, M 4, P 196, L 384, K 1000, float32, forward + backward"
AGAINST = "Shapley values made by linear, einsum with ready float masks"


def make_sides():
    """The two sides, each from the same inputs to the gradients of features, weight and bias; and the inputs."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(32, 196, 384, generator=generator, requires_grad=True)
    weight = torch.randn(1000, 384, generator=generator, requires_grad=True)
    bias = torch.randn(1000, generator=generator, requires_grad=True)
    present = torch.rand(32, 4, 196, generator=generator) < 0.5
    bits, masks = fk.pack_bits(present), present.float()
    values = torch.randn(32, 4, 1000, generator=generator)
    head = features, weight, bias

    def ours():
        return torch.autograd.grad(fk.linear_shapley_loss(*head, bits, values), head)

    def plain():
        predicted = torch.einsum("bmp,bpk->bmk", masks, torch.nn.functional.linear(*head))
        return torch.autograd.grad((values - predicted).square().mean(), head)

    return ours, plain, [*head, bits, masks, values]


class LiveMemory(TorchDispatchMode):
    """The storages that are alive after each operator, other than the inputs'.

    What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self, inputs):
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.alive = {}  # storage → (weak reference, bytes)
        self.history = []  # {storage: bytes} after each operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.inputs:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.history.append({key: size for key, (_, size) in self.alive.items()})
        return out

    def peak(self, without=()):
        """Largest sum of bytes; `without` are tensors that don't count."""
        excluded = {x.untyped_storage()._cdata for x in without}
        return max(sum(size for key, size in moment.items() if key not in excluded) for moment in self.history)


def measure_memory(run, inputs):
    """MB at the peak: (beyond inputs and returned gradients, beyond inputs)."""
    with LiveMemory(inputs) as memory:
        gradients = run()
    return memory.peak(without=gradients) / 1e6, memory.peak() / 1e6


def test_linear_shapley_loss(compare):
    ours, plain, _ = make_sides()
    compare("linear_shapley_loss", SHAPE, ours, plain, against=AGAINST, bar=3.0)


def test_allocator(record):
    ours, plain, inputs = make_sides()
    ours_temporary, ours_total = measure_memory(ours, inputs)
    plain_temporary, plain_total = measure_memory(plain, inputs)
    ratio = plain_temporary / ours_temporary
    record(
        {
            "op": "linear_shapley_loss",
            "shape": SHAPE,
            "against": f"{AGAINST}: peak memory",
            "method": "bytes of tensors alive after any operator, at the peak, beyond inputs and returned gradients",
            "ours_mb": ours_temporary,
            "plain_mb": plain_temporary,
            "memory_ratio": ratio,
            "ours_mb_with_gradients": ours_total,
            "plain_mb_with_gradients": plain_total,
            "memory_ratio_with_gradients": plain_total / ours_total,
            "bar": 10.0,
            "met": ratio >= 10.0,
        }
    )
    assert ratio >= 10.0
