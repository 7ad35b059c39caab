"""Baselines from reference recordings."""

import numpy as np
import pytest
from support.bundles import records

from lsemvae.errors import LsemvaeError
from lsemvae.explain import reference as references
from lsemvae.explain.reference import Reference
from lsemvae.explain.waves import WAVES, Delineation
from lsemvae.preprocess import PreprocessConfig
from lsemvae.record import Record

LEADS, RATE_HZ, SAMPLES = ("I", "II"), 100.0, 1000
BEFORE, AFTER = 25, 45


def beats_at(*r_N):
    """What `delineate` gives for beats at these samples."""
    edges_N3 = np.array([[r - 4, r, r + 4] for r in r_N], dtype=float).reshape(-1, 3)
    edges_N3 = np.append(edges_N3, [[np.nan] * 3], axis=0)  # a beat that was not found
    return Delineation(RATE_HZ, np.full(SAMPLES, WAVES.index("rest")), {"QRS": edges_N3})


@pytest.fixture
def reference(monkeypatch):
    """Two recordings with beats of height 1 and 3 in lead I, the second without lead II, and one without beats."""
    x_RLT, mask_RL = np.zeros((3, 2, SAMPLES), dtype=np.float32), np.ones((3, 2), dtype=bool)
    r_of = [[10, 200, 400], [300], []]  # the first beat does not fit into its window; the last recording has no beat
    for r, (height, at) in enumerate(zip((1, 3, 5), r_of, strict=True)):
        x_RLT[r, 0, at], x_RLT[r, 1, at] = height, -2
    mask_RL[1, 1], x_RLT[1, 1] = False, 0
    found = iter([beats_at(*at) for at in r_of])
    monkeypatch.setattr(references, "delineate", lambda *_: next(found))
    return Reference(x_RLT, mask_RL, LEADS, RATE_HZ)


def test_the_mean_beat_is_over_recordings_that_have_the_lead(reference):
    beat_LT = reference.mean_beat_LT
    assert beat_LT.shape == (2, BEFORE + AFTER)
    assert beat_LT[:, BEFORE].tolist() == [2, -2]
    assert not np.delete(beat_LT, BEFORE, axis=1).any()


def test_the_mean_beat_is_laid_at_each_beat_and_cut_where_beats_are_close(reference):
    object.__setattr__(reference, "mean_beat_LT", np.tile(np.arange(1, 71, dtype=np.float32), (2, 1)))
    x_LT = np.ones((2, SAMPLES), dtype=np.float32)
    found_LT = reference.beats_like(x_LT, beats_at(10, 300, 335, 990))
    expected_T = np.zeros(SAMPLES)
    expected_T[0:55] = np.arange(16, 71)
    border = 300 + int(35 * 45 / 70)
    expected_T[275:border] = np.arange(1, 71)[: border - 275]
    expected_T[border:380] = np.arange(1, 71)[border - 310 :]
    expected_T[965:] = np.arange(1, 36)
    np.testing.assert_array_equal(found_LT, [expected_T] * 2)
    assert not reference.beats_like(x_LT, Delineation(RATE_HZ, expected_T)).any()


def test_the_mean_beat_of_recordings_looks_like_a_beat():
    config = PreprocessConfig()
    reference = Reference.of(records(2), LEADS, config)
    beat_T = reference.mean_beat_LT[1]
    assert abs(int(np.abs(beat_T).argmax()) - 125) < 20
    assert abs(beat_T[0]) < 0.1 * np.abs(beat_T).max() > abs(beat_T[-1])


def test_a_seed_always_draws_the_same_references():
    x_RLT = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((1, 2, 4), dtype=np.float32)
    reference = Reference(x_RLT, np.ones((10, 2), dtype=bool), LEADS, RATE_HZ)
    first, again, other = (reference.drawn(4, seed)[:, 0, 0].tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 4
    assert len(reference.drawn(20, 0)) == 10


def test_refused_recordings_are_left_out_and_none_at_all_is_an_error():
    good, (short,) = records(1), [Record.from_leads({"I": np.zeros(100), "II": np.zeros(100)}, 500)]
    assert len(Reference.of([*good, short], LEADS, PreprocessConfig()).x_RLT) == 1
    with pytest.raises(LsemvaeError, match="no reference recording"):
        Reference.of([short], LEADS, PreprocessConfig())
