"""The methods of a comparison, by name and size.

Every method that pre-trains has the same schedule (`lsemvae.recipes.SIZES`); every supervised one is trained from
random weights with the same recipe (`SUPERVISED`). So no method wins by its training. External ones
(`lsemvae.external`) take part where their encoder is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lsemvae.config import FinetuneRecipe, PretrainRecipe
from lsemvae.errors import LsemvaeError
from lsemvae.external import EXTERNAL
from lsemvae.models import ARCHITECTURES, PRESETS, EncoderConfig
from lsemvae.recipes import ABLATIONS, COMPARED, FINETUNE, PRETRAIN, SIZES

REFERENCE = "lsemvae"
MULTIMODAL_CNN = "multimodal-cnn"
_TITLES = {
    "lsemvae-no-alignment": "LS-EMVAE without alignment",
    "lsemvae-product": "LS-EMVAE, product only",
    "lsemvae-mixture": "LS-EMVAE, mixture only",
    "lsemvae-released": "LS-EMVAE as released",
    MULTIMODAL_CNN: "Multimodal-CNN",
}

SUPERVISED: dict[str, FinetuneRecipe] = {
    "full": FINETUNE["full"],
    "cpu": FINETUNE["cpu"],
    "smoke": replace(FINETUNE["smoke"], trains="all", shifts=2, scratch_epochs=2),
}
"""How supervised methods are trained at each size: all weights under circular shifts, scores averaged over shifts."""


@dataclass(frozen=True)
class Method:
    """config   what a supervised method trains from random weights; None for the others
    recipe   how it is pre-trained here, if it is
    """

    name: str
    title: str
    config: EncoderConfig | None = None
    recipe: PretrainRecipe | None = None

    @property
    def takes_encoder(self) -> bool:
        """Whether it stands on a pre-trained encoder."""
        return self.config is None


def methods(size: str) -> dict[str, Method]:
    """Every method at this size, LS-EMVAE first, then those that pre-train, then supervised ones."""
    reference = PRETRAIN[SIZES[size]]
    found = {REFERENCE: Method(REFERENCE, reference.model.title, recipe=reference)}
    for word, recipe in COMPARED.items():
        name, _, of_size = word.rpartition("-")
        if of_size == size:
            found[name] = Method(name, _TITLES.get(name, recipe.model.title), recipe=recipe)
    found[MULTIMODAL_CNN] = Method(MULTIMODAL_CNN, _TITLES[MULTIMODAL_CNN], reference.model)
    for name, presets in PRESETS.items():
        if name != REFERENCE and name not in found:
            config = presets[size]
            assert not hasattr(ARCHITECTURES[type(config)], "validation")
            found[name] = Method(name, config.title, config)
    return found | {name: Method(name, external.title) for name, external in EXTERNAL.items()}


def chosen(words: Sequence[str], size: str, *, ablations: bool) -> list[Method]:
    """The methods of these names; `all` are all but the external ones, the ablations where they are asked for.

    LS-EMVAE comes first and is always there. Raises LsemvaeError naming what is unknown.
    """
    known = methods(size)
    names = [REFERENCE]
    for word in words:
        if word == "all":
            names += [name for name in known if name not in ABLATIONS and name not in EXTERNAL]
        elif word in known:
            names.append(word)
        else:
            raise LsemvaeError(f"there is no method {word!r}: choose all, or some of {', '.join(known)}")
    if ablations:
        names += ABLATIONS
    return [known[name] for name in dict.fromkeys(names)]
