"""Training in shards: weights, gradients and the optimiser's state lie in parts on the processes, by PyTorch's FSDP2.

accelerate's FSDP knows no CPUs, where it could be tested here, and gathers a block's weights for calls of the block
alone: `fully_shard` is called directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..baselines.viashap import ViaSHAPObjective
from ..games.drop_tokens import TokenDropping
from ..games.sharded import shard_block
from ..models.self_explaining import SelfExplainingClassifier
from ..objectives.explainer import ExplainerObjective
from ..objectives.joint import JointObjective
from ..objectives.task import TaskObjective

#: What has been found to give what DistributedDataParallel gives (tests/vision/test_processes.py).
OBJECTIVES = (JointObjective, ExplainerObjective, TaskObjective)
OPTIMIZERS = ("adamw", "sgd")
#: Arguments of `fit` with the values that they may have.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "mixed_precision": ("no", "bf16"),
    "compile": (False,),
    "channels_last": (False,),
    "sync_bn": (False,),
    "model_ema_decay": (None,),
    "opt": OPTIMIZERS,
}


def check_shardable(model: nn.Module, objective: Any, settings: Mapping[str, Any], processes: int) -> None:
    """Refuses by name what has not been found to train in shards as it does whole.

    Raises:
        ValueError: names it, and what can be had.
    """
    if processes == 1:
        raise ValueError(
            "fit: argument `fsdp` spreads a model over several processes, but there is one. Start them by `torchrun "
            "--nproc_per_node=N`, or leave it out."
        )
    game = model.game if isinstance(model, SelfExplainingClassifier) else None
    if not isinstance(game, TokenDropping) or not game.packs:
        raise ValueError(
            "fit: argument `fsdp` needs a transformer whose coalitions drop tokens (fv.convert of timm's "
            f"VisionTransformer or Eva), but this {type(model).__name__} does not. Leave it out: each process then "
            "holds the model whole."
        )
    if not isinstance(objective, OBJECTIVES) or isinstance(objective, ViaSHAPObjective):
        raise ValueError(
            f"fit: argument `fsdp` is for {', '.join(kind.__name__ for kind in OBJECTIVES)}, and not tested with "
            f"{type(objective).__name__}. Leave it out."
        )
    if getattr(objective, "target_precision", None) == "fp8":
        raise ValueError(
            "fit: argument `fsdp` has no target_precision='fp8', which takes all weights of the encoder at once. Leave "
            "`fsdp` out, or make the objective with target_precision='bf16'."
        )
    for name, allowed in OPTIONS.items():
        if settings[name] not in allowed:
            words = " or ".join(repr(value) for value in allowed)
            raise ValueError(
                f"fit: argument `fsdp` is not tested with {name}={settings[name]!r}. Leave `fsdp` out, or pass {name}="
                f"{words}."
            )


class Shards:
    """A model that trains in shards, and the whole one that users hold: it gets the weights whenever they are read.

    Each block of the encoder is gathered while it runs; all other parameters, the explainer's among them, for a step.

    Args:
        whole: the user's model.
        step: the training step of a copy of it, which is sharded in place.
        accelerator: of the run.
    """

    def __init__(self, whole: nn.Module, step: Any, accelerator: Accelerator) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self.whole, self.model, self.device = whole, step.model, accelerator.device
        mesh = init_device_mesh(self.device.type, (accelerator.num_processes,))
        whole.to(self.device)
        accelerator.prepare_model(step, evaluation_mode=True)  # places it, in accelerate's precision
        for block in self.model.backbone.blocks:
            shard_block(block, partial(fully_shard, mesh=mesh))
        fully_shard(step, mesh=mesh)
        if self.device.type == "cpu":  # not all versions of gloo compute means
            for module in step.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)

    def release(self) -> None:
        """The whole model takes no memory of a GPU from now on, while the shards train; `bring` takes it back."""
        self.whole.cpu()

    def bring(self) -> None:
        """The whole model with the weights of the shards, on their device."""
        self.gather()
        self.whole.to(self.device)

    @torch.no_grad()
    def gather(self) -> None:
        """The whole model gets the weights of the shards."""
        own = self.whole.state_dict()
        for name, tensor in self.model.state_dict().items():
            own[name].copy_(whole(tensor))

    @torch.no_grad()
    def scatter(self) -> None:
        """The shards get the weights of the whole model."""
        own = self.whole.state_dict()
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(_shard(own[name], tensor))

    def scattered(self, state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
        """The state of an optimiser as `gathered` gave it, in the shards of its parameters."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kept = {
            index: {name: _shard(value, parameters[index]) for name, value in of_one.items()}
            for index, of_one in state["state"].items()
        }
        return state | {"state": kept}


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser, whole; one tensor at a time is gathered, and process 0 keeps it, on the CPU."""
    is_main = torch.distributed.get_rank() == 0

    def kept(value: Any) -> Any:
        if not hasattr(value, "full_tensor"):
            return value
        found = value.full_tensor()
        return found.cpu() if is_main else None

    of_all = {index: {name: kept(value) for name, value in of_one.items()} for index, of_one in state["state"].items()}
    return state | {"state": of_all}


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, in every process; any other as it is."""
    found: Any = tensor
    return found.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _shard(value: Any, like: Tensor) -> Any:
    """This process's part of a tensor that all of them hold, where `like` is sharded and of its shape."""
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    parts: Any = like
    return distribute_tensor(value.to(like.device), parts.device_mesh, parts.placements, src_data_rank=None)
