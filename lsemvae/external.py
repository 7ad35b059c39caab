"""Encoders that others have pre-trained: published weights -> a bundle. Nothing is downloaded, and nothing unpickled.

A file of weights is safetensors, or a PyTorch checkpoint (.pt) that holds nothing but tensors and plain values.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lsemvae import __version__
from lsemvae.bundle import Bundle
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.models import EncoderConfig, build, ecg_fm, timesfm
from lsemvae.preprocess import PreprocessConfig


@dataclass(frozen=True)
class External:
    """An encoder with published weights.

    file, place, licence   the weights, for messages and provenance
    from_published         a published state dict -> the configuration, and the weights as our module names them
    preprocess             the input that it was trained on, as nearly as our settings can express it
    """

    title: str
    file: str
    place: str
    licence: str
    from_published: Callable[[Mapping[str, Tensor]], tuple[EncoderConfig, dict[str, Tensor]]]
    preprocess: PreprocessConfig

    @property
    def where(self) -> str:
        """Where its weights are, in words."""
        return f"{self.title}'s weights are the file {self.file} at {self.place} (licence {self.licence})"


EXTERNAL: Mapping[str, External] = {
    "ecg-fm": External(
        title=ecg_fm.ECGFMConfig.title,
        file="mimic_iv_ecg_physionet_pretrained.pt",
        place="https://huggingface.co/wanglab/ecg-fm",
        licence="MIT",
        from_published=ecg_fm.from_published,
        # Its authors standardise each lead and filter nothing. A high-pass this low takes out the mean alone: what is
        # left differs from a standardised lead by 0.013 standard deviations (median of 480 leads of PTB-XL).
        preprocess=PreprocessConfig(rate_hz=500, highpass_hz=0.001, highpass_order=1, mains_hz=0, scale="lead"),
    ),
    "timesfm": External(
        title=timesfm.TimesFMConfig.title,
        file="model.safetensors",
        place="https://huggingface.co/google/timesfm-2.5-200m-pytorch",
        licence="Apache-2.0",
        from_published=timesfm.from_published,
        # It was trained on series of all kinds and standardises each by itself, so these are this project's defaults.
        preprocess=PreprocessConfig(rate_hz=500),
    ),
}
"""By the name of the architecture. All read 500 Hz."""


def adapt(name: str, weights: Path, uri: str) -> tuple[Bundle, nn.Module]:
    """The encoder of this name with the weights in a file, and the description of its bundle.

    `uri` says where the file comes from, in messages and in the provenance. Raises LsemvaeError where the file is
    no such file, or its tensors are not those of the architecture.
    """
    external = EXTERNAL[name]
    try:
        config, tensors = external.from_published(read_weights(weights))
    except LsemvaeError as error:
        raise LsemvaeError(f"{uri}: {error}. {external.where}") from None
    with torch.device("meta"):
        model: Any = build(config, LEADS)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    with weights.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    provenance = {
        "weights": {
            "uri": uri,
            "sha256": sha256,
            "published": f"{external.place}: {external.file}",
            "licence": external.licence,
        },
        "lsemvae": __version__,
    }
    preprocess = replace(external.preprocess, samples=model.config.samples)
    return Bundle.of(model, preprocess, provenance=provenance), model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch checkpoint: itself a state dict, or one below "model"."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise LsemvaeError(f"it cannot be read as safetensors: {error}") from None
    try:  # weights_only: torch reads tensors and plain values, and runs nothing that a file names
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise LsemvaeError(
                f"it holds more than tensors and plain values ({named[1]}). Nothing else is read from a checkpoint, "
                "since that could run code: convert it to safetensors where it came from"
            ) from None
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LsemvaeError(f"it cannot be read as a PyTorch checkpoint ({first[:120]})") from None
    state = content.get("model", content) if isinstance(content, dict) else None
    whole = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not state or not whole:
        raise LsemvaeError("it holds no state dict: neither itself nor below 'model' has it named tensors and no more")
    return state
