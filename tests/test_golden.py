"""What was written before is read and made again: shards, bundles, checkpoints, orders and scores stay as they are.

tests/golden/make.py wrote the files. A test here fails when a change breaks what users have on their disks. If that is
meant, raise the version that says so, write it in CHANGELOG.md, and run the script again.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from golden import make

from lsemvae import bundle as bundles
from lsemvae.bundle import Scorer
from lsemvae.data.shards import unpack
from lsemvae.leads import LEADS
from lsemvae.models import build
from lsemvae.storage import Storage
from lsemvae.training.checkpoints import newest_whole

FACTS = json.loads((make.HERE / make.FACTS).read_text())


@pytest.fixture(scope="module")
def recordings() -> list:
    return make.records()


def test_a_shard_is_read_and_made_again(recordings: list):
    written = (make.HERE / make.SHARD).read_bytes()
    before, now = (pq.read_table(pa.BufferReader(content)) for content in (written, make.shard(recordings)))
    assert now.equals(before, check_metadata=True)
    file = pq.ParquetFile(pa.BufferReader(written))
    if file.metadata.created_by.endswith(pa.__version__):
        assert make.shard(recordings) == written
    for row, record in zip(before.to_pylist(), recordings, strict=True):
        again = unpack(row)
        assert (again.leads, again.rate_hz, again.subject_id) == (record.leads, record.rate_hz, record.subject_id)
        np.testing.assert_allclose(again.signal_mv_LT, record.signal_mv_LT, atol=1e-4)


def test_a_bundle_is_read_and_made_again(tmp_path: Path):
    folder = make.HERE / make.BUNDLE
    scorer = Scorer(folder)
    scorer.check_example()
    bundle, model = bundles.load(folder)
    again = bundles.save(make.described(model), model, tmp_path / "again")
    assert (tmp_path / "again" / bundles.WEIGHTS).read_bytes() == (folder / bundles.WEIGHTS).read_bytes()
    old, new = (json.loads((place / bundles.CONFIG).read_text()) for place in (folder, tmp_path / "again"))
    assert new.pop("example") == pytest.approx(old.pop("example"), abs=1e-6)
    # The bundle is of preprocessing version 1, which version 2 contains: it loads, and scores as it did.
    assert (old.pop("preprocess_version"), new.pop("preprocess_version")) == (1, 2)
    assert new == old
    assert again.preprocess == bundle.preprocess


def test_a_checkpoint_is_read_and_continued(tmp_path: Path, recordings: list):
    shutil.copytree(make.HERE / make.CHECKPOINT, tmp_path / "checkpoint_1")
    name, (progress, model, optimizer) = newest_whole(
        Storage(str(tmp_path)), make.RECIPE, make.ORDER, torch.device("cpu")
    )
    assert name == "checkpoint_1"
    assert (progress.epoch, progress.step, progress.sums) == (0, 2, {"records": 12.0})
    assert make.steps(model, optimizer, 1, recordings) == pytest.approx(FACTS["losses"][2:], rel=1e-5)


def test_training_from_a_seed_gives_the_same_losses(recordings: list):
    torch.manual_seed(1)
    model = build(make.RECIPE.model, LEADS)
    losses = make.steps(model, make.make_optimizer(model, make.RECIPE.optim), 3, recordings)
    assert losses == pytest.approx(FACTS["losses"], rel=1e-5)


def test_orders_recipes_preprocessing_flags_and_scores_stay_as_they_are(recordings: list):
    now = make.facts(recordings)
    assert now["recipes"].keys() >= FACTS["recipes"].keys()
    now["recipes"] = {name: now["recipes"][name] for name in FACTS["recipes"]}  # later ones may be added
    for name in ("preprocess_digests", "order", "recipes", "flags", "config_text_sha256"):
        assert now[name] == FACTS[name], name
    np.testing.assert_allclose(now["x_sample"], FACTS["x_sample"], atol=2e-5)
    assert now["scores"] == pytest.approx(FACTS["scores"], abs=1e-6)
