"""The amortised explainers of the field: a frozen classifier, a surrogate of it that takes coalitions, and a network
that learns the surrogate's Shapley values. Two networks beside the classifier, where a self-explaining model has none.

    surrogate = fv.convert(copy.deepcopy(classifier), head_depth=0)
    fv.fit(surrogate, data, objective=fv.baselines.SurrogateObjective(classifier), ...)
    model = fv.baselines.FastSHAPExplainer(surrogate, copy.deepcopy(classifier))
    fv.fit(model, data, objective=fv.baselines.FastSHAPObjective(), ...)

Sources: Jethani et al., FastSHAP, ICLR 2022; Covert, Kim, Lee, ViT-Shapley, ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.nn import functional

from fastshap_kernels._checks import fail

from .._checks import check_choice
from .._modes import evaluation_mode
from ..explanations.explanation import Explanation, LogProbabilityExplanation, ProbabilityExplanation
from ..explanations.link import LINKS, log_distribution
from ..games.coalitions import Coalitions
from ..models.convert import convert
from ..models.input import chosen_classes
from ..models.self_explaining import SelfExplainingClassifier
from ..objectives.base import ObjectiveTerms, explained_share, variance_of
from ..objectives.sampling import SIZES, CoalitionObjective, values_of_step

_EXPLANATIONS: dict[str, type[Explanation]] = {
    "probability": ProbabilityExplanation,
    "logit": Explanation,
    "log_probability": LogProbabilityExplanation,
}


class SurrogateObjective(CoalitionObjective):
    """Trains a game to answer for absent patches as a frozen classifier would: KL(teacher(x) ‖ softmax v_x(S)).

    The mean over B and M is the loss. Where absent patches leave the class open, the least loss is the mean of what
    the teacher says of all images that look alike: v(S) is then the teacher's prediction with what is absent averaged
    out.

    Args:
        teacher: images (B, C, H, W) → logits (B, K). It is put in evaluation mode, moved to the images' device, and
            never trained. It must share no weights with the game (`convert` makes no copy).
        coalitions: M, coalitions per image and step; drawn anew each step, not in pairs.
        sizes: "uniform", 0 … P alike, so that v(∅) and v(N) are trained too; or "shapley", the Shapley kernel's.
        seed: of the sampler.

    Raises:
        ValueError: for arguments out of range, and when called: for a model without a game, or a teacher that
            shares its weights or has other classes.

    Deterministic: yes, for one seed and sequence of calls. `state_dict` holds the sampler's counter.

    Source: Jethani et al., FastSHAP, ICLR 2022; Covert, Kim, Lee, ViT-Shapley, ICLR 2023.

    Example:
        >>> teacher = timm.create_model("test_vit", num_classes=10, img_size=48)
        >>> terms = fv.baselines.SurrogateObjective(teacher)(model, images, labels)
        >>> torch.equal(terms.loss, terms.task), terms.regression
        (True, None)
    """

    def __init__(self, teacher: nn.Module, coalitions: int = 1, sizes: str = "uniform", seed: int = 0) -> None:
        check_choice("sizes", sizes, SIZES)
        if not isinstance(teacher, nn.Module):
            fail("SurrogateObjective", "teacher", "a module from images to logits (B, K)", teacher)
        super().__init__(coalitions, paired=False, sizes=sizes, seed=seed, with_ends=sizes == "uniform")
        self.teacher = teacher.eval()
        self._checked: nn.Module | None = None

    def __call__(
        self, model: SelfExplainingClassifier, images: Tensor, labels: Tensor, *, progress: float = 1.0
    ) -> ObjectiveTerms:
        """The loss of one batch: images (B, C, H, W); the labels have no part in it."""
        if model is not self._checked:
            self._check(model)
            self.teacher.to(images.device)
            self._checked = model
        return (self._compiled or self.terms)(model, images, self.draw(model, images))

    def terms(self, model: SelfExplainingClassifier, images: Tensor, coalitions: Coalitions) -> ObjectiveTerms:
        """The loss of one batch and given coalitions."""
        with torch.no_grad():
            logits = self.teacher(images)
        values = values_of_step(model, images, coalitions)
        if not isinstance(logits, Tensor) or logits.shape != values[:, 0].shape:
            expected = f"one that returns logits (B, K) = {tuple(values[:, 0].shape)}, as the surrogate does"
            fail("SurrogateObjective", "teacher", expected, logits, "Convert a model with as many classes.")
        wanted = log_distribution(logits)
        found = log_distribution(values)
        divergence = functional.kl_div(found, wanted.unsqueeze(1).expand_as(found), reduction="none", log_target=True)
        loss = divergence.sum(-1).mean()
        return ObjectiveTerms(loss, loss.detach(), spread=variance_of(values.detach()).sqrt())

    def _check(self, model: nn.Module) -> None:
        _check_kind("SurrogateObjective", model, SelfExplainingClassifier, "fv.convert(timm_model)")
        if _share_weights(self.teacher, model):
            raise ValueError(
                "SurrogateObjective: argument `teacher` must stay as it is, but it shares weights with the surrogate "
                "that is trained. Convert a copy: fv.convert(copy.deepcopy(teacher))."
            )


class FastSHAPExplainer(nn.Module):
    """A network that gives the Shapley values of a frozen game, trained with `FastSHAPObjective`.

    The game is v_x(S) = link(surrogate's logits with only S present). The network's patch features E go through one
    block of its own kind and a linear layer, δ = G(E) W_sᵀ, and are normalised additively:
    Φ_p = δ_p + (v(N) − v(∅) − Σ_q δ_q)/P, so that Σ_p Φ_p = v(N) − v(∅). Before training δ = 0, the even split.

    Saving: `state_dict` holds both networks; load it into an FastSHAPExplainer built in the same way.

    Args:
        surrogate: whose values are explained; trained with `SurrogateObjective`, or any SelfExplainingClassifier. It
            becomes part of this module, in evaluation mode for good and without gradients.
        explainer_backbone: a timm model, which becomes the network (no copy is made), or the name of one to create. It
            must have the surrogate's image size, grid and classes, and weights of its own. ViT-Shapley starts from a
            copy of the classifier.
        link: what is explained: "probability", the softmax (both papers; of one logit alone, the sigmoid); "logit";
            or "log_probability". The metrics read it to know what v(S) is.

    Attributes:
        grid, players: (h, w) and P = h·w of the game; players count row by row.
        num_classes: K.

    Raises:
        ValueError: for another kind of surrogate, an unknown link, or a backbone that does not fit the surrogate.
        UnsupportedModelError: for a backbone of a family without patch features.

    Source: Jethani et al., FastSHAP, ICLR 2022; Covert, Kim, Lee, ViT-Shapley, ICLR 2023, whose network ends in tanh
    and has a deeper head: neither is here.

    Example:
        >>> explainer = fv.baselines.FastSHAPExplainer(model, "test_vit")
        >>> explainer.players, explainer.num_classes, explainer(images).shape
        (9, 10, torch.Size([4, 10]))
    """

    def __init__(
        self, surrogate: SelfExplainingClassifier, explainer_backbone: nn.Module | str, link: str = "probability"
    ) -> None:
        super().__init__()
        check_choice("link", link, tuple(LINKS))
        _check_kind("FastSHAPExplainer", surrogate, SelfExplainingClassifier, "fv.convert(timm_model)")
        self.link = link
        self.network = _network(surrogate, explainer_backbone)
        self.surrogate = surrogate.requires_grad_(False)
        self.train(self.training)

    @property
    def grid(self) -> tuple[int, int]:
        return self.surrogate.grid

    @property
    def players(self) -> int:
        return self.surrogate.players

    @property
    def num_classes(self) -> int:
        return self.surrogate.num_classes

    def train(self, mode: bool = True) -> FastSHAPExplainer:
        """Sets the mode of the network; the surrogate stays in evaluation mode."""
        super().train(mode)
        self.surrogate.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """The network's parameters that timm's optimisers don't decay."""
        return {f"network.{name}" for name in self.network.no_weight_decay()}

    def forward(self, images: Tensor) -> Tensor:
        """The surrogate's logits (B, K) of the full images (B, C, H, W), whatever the link."""
        return self.surrogate(images)

    def coalition_values(self, images: Tensor, coalitions: Coalitions | Tensor, **options: Any) -> Tensor:
        """v(S) under the link, (B, M, K), float32 at least; arguments as `SelfExplainingClassifier`'s."""
        return LINKS[self.link](self.surrogate.coalition_values(images, coalitions, **options))

    def null_value(self) -> Tensor:
        """v(∅) under the link: (K,), float32 at least."""
        return LINKS[self.link](self.surrogate.null_value())

    def shapley_values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Shapley values (B, P, K) of every patch and class, and v(N) (B, K), both in the link's unit.

        They sum to v(N) − v(∅), in float32 at least whatever the networks compute in. Gradients flow to the network.
        """
        self.network._check_images(images)
        return self._explained(images)[:2]

    def _explained(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapley values (B, P, K), v(N) (B, K) and v(∅) (K,)."""
        null = self.null_value()
        if not len(images):  # which not every model takes
            return null.new_zeros(0, self.players, self.num_classes), null.new_zeros(0, self.num_classes), null
        grand = LINKS[self.link](self.surrogate(images))
        features, _ = self.network.game.features_and_logits(images)
        return self.network.head(features, grand, null), grand, null

    def preprocess(self, images: Any) -> Tensor:
        """The input (B, C, H, W) that `explain` makes of images of any kind; see `SelfExplainingClassifier`'s."""
        return self.surrogate.preprocess(images)

    @torch.no_grad()
    def explain(self, images: Any, target: int | Sequence[int] | Tensor | str | None = None) -> Explanation:
        """Explains images in one forward pass of each network, in evaluation mode.

        Args:
            images: of any kind that `SelfExplainingClassifier.explain` takes.
            target: the class to explain: None for the predicted one, a class, (B,) classes, or "all".

        Returns:
            Explanation with values (B, P), or (B, P, K) for "all". Its `values`, `logits` (which are v(N)) and `null`
            are in the link's unit, and add up in it.

        Raises:
            TypeError: for images of another type.
            ValueError: for images of the wrong shape or with NaN or infinite pixels, or a target out of range.

        Example:
            >>> explainer = fv.baselines.FastSHAPExplainer(model, "test_vit")
            >>> explainer.explain(images, target=3).unit
            'probabilities'
        """
        images = self.preprocess(images)
        with evaluation_mode(self):
            phi, grand, null = self._explained(images)
        chosen = chosen_classes("explain", target, grand)
        if chosen is not None:
            phi = phi.gather(2, chosen[:, None, None].expand(-1, self.players, 1))[..., 0]
        seen, untrained = self.surrogate.seen, self.network._warn_if_untrained()
        return _EXPLANATIONS[self.link](phi, grand, chosen, self.grid, null, seen=seen, untrained=untrained)


class FastSHAPObjective(CoalitionObjective):
    """Mean over B, M, K of (v(S) − v(∅) − Σ_{p∈S} Φ_p)², S from the Shapley kernel: least where Φ is Shapley's.

    v is the explainer's frozen game under its link. The papers multiply the mean by P, which changes no minimum. No
    (B, P, K) tensor exists.

    Args:
        coalitions: M, coalitions per image and step; drawn anew each step.
        sizes: "shapley" for the Shapley kernel, or "uniform", 1 … P − 1 alike.
        paired: coalitions come as complements, which lowers the variance and keeps shapes static.
        seed: of the sampler.

    Raises:
        ValueError: for arguments out of range, and when called: for a model that is no FastSHAPExplainer.

    Deterministic: yes, for one seed and sequence of calls. `state_dict` holds the sampler's counter.

    Source: Jethani et al., FastSHAP, ICLR 2022; Covert, Kim, Lee, ViT-Shapley, ICLR 2023 (32 coalitions in pairs).

    Example:
        >>> explainer = fv.baselines.FastSHAPExplainer(model, "test_vit")
        >>> terms = fv.baselines.FastSHAPObjective(coalitions=4)(explainer, images, labels)
        >>> torch.equal(terms.loss, terms.regression), terms.task
        (True, None)
    """

    def __init__(self, coalitions: int = 32, sizes: str = "shapley", paired: bool = True, seed: int = 0) -> None:
        check_choice("sizes", sizes, SIZES)
        super().__init__(coalitions, paired=paired, sizes=sizes, seed=seed)

    def __call__(
        self, model: FastSHAPExplainer, images: Tensor, labels: Tensor, *, progress: float = 1.0
    ) -> ObjectiveTerms:
        """The loss of one batch: images (B, C, H, W); the labels have no part in it."""
        _check_kind(
            "FastSHAPObjective", model, FastSHAPExplainer, "fv.baselines.FastSHAPExplainer(surrogate, backbone)"
        )
        return (self._compiled or self.terms)(model, images, self.draw(model.surrogate, images))

    def terms(self, model: FastSHAPExplainer, images: Tensor, coalitions: Coalitions) -> ObjectiveTerms:
        """The loss of one batch and given coalitions."""
        link = LINKS[model.link]
        with torch.no_grad():
            values = link(values_of_step(model.surrogate, images, coalitions))
            grand, null = link(model.surrogate(images)), model.null_value()
        features, _ = model.network.game.features_and_logits(images)
        loss = model.network.regression_loss(features, grand, coalitions, values, null)
        return ObjectiveTerms(loss, regression=loss.detach(), value_r2=explained_share(loss.detach(), values))


def _network(surrogate: SelfExplainingClassifier, backbone: nn.Module | str) -> SelfExplainingClassifier:
    """The backbone with the shares head, whose additive normalisation is the explainer's."""
    channels, *size = surrogate.game.input_size
    options: dict[str, Any] = {
        "img_size": (size[0], size[1]),
        "head": "shares",
        "base": "even",
        "backbone_gradient": 1.0,
    }
    if not isinstance(backbone, str | nn.Module):
        fail("FastSHAPExplainer", "explainer_backbone", "a timm model or the name of one", backbone)
    if isinstance(backbone, str):
        kwargs = {"in_chans": channels}
        network = SelfExplainingClassifier(backbone, surrogate.num_classes, model_kwargs=kwargs, **options)
    else:
        if _share_weights(backbone, surrogate):
            raise ValueError(
                "FastSHAPExplainer: argument `explainer_backbone` must have weights of its own, but it shares some "
                "with the surrogate, which is frozen. Pass a copy: copy.deepcopy(backbone)."
            )
        if get_model_input_config(backbone)["fixed_input_size"]:
            options["img_size"] = None  # its own, which is compared below
        network = convert(backbone, **options)
    for what, got, expected in (
        ("images (C, H, W)", network.game.input_size, surrogate.game.input_size),
        ("the grid (h, w)", network.grid, surrogate.grid),
        ("classes", network.num_classes, surrogate.num_classes),
    ):
        if got != expected:
            raise ValueError(
                f"FastSHAPExplainer: argument `explainer_backbone` must have {what} of the surrogate, {expected}, "
                f"but it has {got}. Create it with the surrogate's img_size, patch size, in_chans and num_classes."
            )
    return network


def _share_weights(first: nn.Module, second: nn.Module) -> bool:
    known = {id(parameter) for parameter in first.parameters()}
    return any(id(parameter) in known for parameter in second.parameters())


def _check_kind(op: str, model: object, kind: type, remedy: str) -> None:
    if not isinstance(model, kind):
        raise ValueError(
            f"{op} takes a model of type {kind.__name__}, but it is a {type(model).__name__}. Use {remedy}."
        )
