"""A classifier behind a purifier: what every purifying defense shares, whatever its purifier does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from assay.card import Card
from assay.chain import Chain
from assay.defense import Defense, Stages
from assay.defenses.purifier import ImagePurifier
from assay.errors import InputError
from assay.noise import Noise


class PurifiedClassifier(Defense):
    """Purifies, then classifies. A subclass implements `purify`.

    Args:
        classifier: images to logits.
        n_classes: k.
        card: the defense's.
    """

    def __init__(self, classifier: nn.Module, n_classes: int, card: Card) -> None:
        super().__init__()
        self.card = card
        self.n_classes = n_classes
        self.classifier = classifier

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        """Pixels `x (n, c, h, w)` in [0, 1] to pixels, about in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} must implement purify(x, noise).")

    def classify(self, x: Tensor, noise: Noise) -> Tensor:
        """The classifier's logits `(n, k)` of pixels about in [0, 1]."""
        logits: Tensor = self.classifier(x)
        return logits

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """Logits `(n, k)` of the purified image."""
        return self.classify(self.purify(x, noise), noise)

    def stages(self) -> Stages:
        """The purifier and the classifier."""
        return Stages(self.purify, self.classify)

    def components(self) -> dict[str, Callable[[Tensor, Noise], Tensor]]:
        """`classifier`: the network on the image as it is."""
        return {"classifier": self.classify}


class IteratedPurification(PurifiedClassifier):
    """A purifier of several steps before a classifier, differentiated one step at a time.

    Args:
        purifier: the process that cleans images.
        classifier, n_classes, card: see `PurifiedClassifier`.
    """

    def __init__(self, purifier: ImagePurifier, classifier: nn.Module, n_classes: int, card: Card) -> None:
        super().__init__(classifier, n_classes, card)
        self.purifier = purifier
        # A dataclass hides its modules from nn.Module; named here, they move and freeze with the defense.
        self.denoiser = purifier.denoiser

    def purify(self, x: Tensor, noise: Noise) -> Tensor:
        """One purification."""
        return self.purifier.chain()(x, noise)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        """Logits `(n, k)` of one purification: the chain itself."""
        return self.chain()(x, noise)

    def chain(self) -> Chain:
        """The whole defense, images to logits."""
        return self.before_classifier(self.purifier.chain())

    def before_classifier(self, process: Chain) -> Chain:
        """A purification followed by the classifier, images to logits."""
        return replace(process.then(self.classify), network_calls=process.network_calls + 1)

    def surrogate(self, steps: int) -> Chain:
        """The same noise in total, in at most `steps` steps of the purifier.

        Raises:
            InputError: for fewer than one step.
        """
        if steps < 1:
            raise InputError(f"a surrogate takes at least 1 step, got {steps}.")
        return self.before_classifier(self.purifier.shortened(steps).chain())
