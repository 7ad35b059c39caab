"""What the tests of the endpoint share: small models, a service that holds them, and a recording."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bundles import CONFIGS, records
from support.bundles import save as save_classifier
from support.serving import TOKEN

from lsemvae import bundle as bundles
from lsemvae.bundle import Bundle
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import build
from lsemvae.preprocess import PreprocessConfig
from lsemvae.record import Record
from serve.api import make_api
from serve.explaining import Explaining
from serve.observed import Metrics
from serve.reconstruct import Encoder
from serve.registry import Registry
from serve.security import Tokens
from serve.service import Service


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained: ph-6L and ph-12L, and the encoders `encoder` and `scaled-alone`."""
    folder = tmp_path_factory.mktemp("models")
    save_classifier(folder / "ph-6L", leads=LIMB_LEADS)
    save_classifier(folder / "ph-12L", leads=LEADS)
    for name, scale in (("encoder", "record"), ("scaled-alone", "lead")):
        model = build(CONFIGS[0], LEADS)
        bundles.save(Bundle.of(model, PreprocessConfig(scale=scale)), model, folder / name)
    return folder


@pytest.fixture(scope="session")
def explaining() -> Iterator[Explaining]:
    """One process that explains, for all tests: it takes seconds to start."""
    explaining = Explaining(waiting=4, limit_s=600, threads=1)
    yield explaining
    explaining.close()


@pytest.fixture(scope="module")
def service(models: Path, explaining: Explaining) -> Service:
    registry = Registry([str(models / "ph-6L"), str(models / "ph-12L")], models / "kept", 0)
    encoder = Encoder(str(models / "encoder"), models / "kept", 0)
    return Service(registry, Metrics(), encoder, explaining=explaining, tokens=Tokens({TOKEN}))


@pytest.fixture(scope="module")
def api(service: Service) -> object:
    return make_api(service)


@pytest.fixture(scope="module")
def record() -> Record:
    return records(2, seed=5)[1]
