"""Pictures of attributions: bands are where the attribution is and on the side of its sign, and nothing is hidden."""

import io
import re
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from lsemvae.leads import LEADS
from lsemvae.plots.attribution import DPI, LOWERS, RAISES, Picture, Span, attribution_paper, smooth
from lsemvae.plots.median_beat import median_beat
from lsemvae.plots.shares import Cells, Panel, Values, bars, heat_maps, randomisation, removal_curves

RATE_HZ = 250
SPANS = [Span("P", 1.4, 1.5), Span("QRS", 1.55, 1.65), Span("T", 1.8, 2.0)]


def signal(leads: int, seconds: float = 10, height: float = 1.0) -> np.ndarray:
    """A spike at 0.6 s of each second."""
    time_s_T = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return np.tile(height * np.exp(-np.minimum(((time_s_T % 1 - 0.6) / 0.01) ** 2, 99)), (leads, 1))


def values(leads: int, seconds: float = 10) -> np.ndarray:
    """+2 in the last lead from 2 to 2.2 s, -1 in the first from 5 to 5.2 s."""
    values_LT = np.zeros((leads, round(seconds * RATE_HZ)))
    values_LT[-1, 2 * RATE_HZ : round(2.2 * RATE_HZ)] = 2
    values_LT[0, 5 * RATE_HZ : round(5.2 * RATE_HZ)] = -1
    return values_LT


def paper(count: int = 2, **changed: object) -> Picture:
    given = {"unit_mv": 1.0} | changed
    return attribution_paper(LEADS[:count], RATE_HZ, signal(count), values(count), **given)


def bands(axis: Axes) -> dict[str, list[np.ndarray]]:
    """The corners of each piece of a band by what it says."""
    found: dict[str, list[np.ndarray]] = {"raises": [], "lowers": []}
    for collection in axis.collections:
        if collection.get_gid() in found:
            found[collection.get_gid()] += [path.vertices for path in collection.get_paths()]
    return found


def traces(axis: Axes) -> list[np.ndarray]:
    return [line.get_xydata() for line in axis.lines if len(line.get_xdata()) > 6]


def texts(picture: Picture) -> list[str]:
    return [text.get_text() for axis in picture.figure.axes for text in axis.texts]


# --- ECG paper ------------------------------------------------------------------------------------------------


def test_a_band_is_where_the_attribution_is_and_on_the_side_of_its_sign():
    (axis,) = paper().figure.axes
    first, last = traces(axis)
    found = bands(axis)
    (lowers,), (raises,) = found["lowers"], found["raises"]
    # 20 mm of margin and 25 mm/s; smoothing adds 20 ms = 0.5 mm at each end.
    assert raises[:, 0].min() == pytest.approx(20 + 25 * 2, abs=0.6)
    assert raises[:, 0].max() == pytest.approx(20 + 25 * 2.2, abs=0.6)
    assert lowers[:, 0].min() == pytest.approx(20 + 25 * 5, abs=0.6)
    # y goes down. Twice the attribution is twice as high, and bands lie below their own trace.
    line_first, line_last = lowers[:, 1].min(), raises[:, 1].max()
    assert np.ptp(raises[:, 1]) == pytest.approx(8, abs=0.1) and np.ptp(lowers[:, 1]) == pytest.approx(4, abs=0.1)
    assert first[:, 1].max() < line_first < lowers[:, 1].max() < last[:, 1].min()
    assert last[:, 1].max() < raises[:, 1].min() < line_last


def test_a_millivolt_is_10_mm_and_the_axis_says_what_the_unit_is():
    picture = paper(unit_mv=0.15)
    (axis,) = picture.figure.axes
    assert [np.ptp(trace[:, 1]) for trace in traces(axis)] == pytest.approx([1.5, 1.5], abs=0.01)
    assert np.ptp(traces(axis)[0][:, 0]) == pytest.approx(250, abs=0.2)
    assert picture.figure.get_figwidth() * 25.4 == pytest.approx(275)
    assert any("25 mm/s   10 mm/mV" in text for text in texts(picture)) and "10 mm/mV" in picture.words
    unknown = " ".join(texts(paper(unit_mv=None)))
    assert "mm per standard deviation" in unknown and "mV" not in unknown
    tall = attribution_paper(["I"], RATE_HZ, signal(1, height=4), values(1), unit_mv=1.0)
    assert any("5 mm/mV" in text and "10 mm/mV" not in text for text in texts(tall))
    assert any(
        "cut off" in text
        for text in texts(attribution_paper(["I"], RATE_HZ, signal(1, height=30), values(1), unit_mv=1.0))
    )


@pytest.mark.parametrize("count", [1, 6, 12])
def test_every_lead_is_named_and_rows_do_not_meet(count: int):
    picture = paper(count, spans=SPANS)
    (axis,) = picture.figure.axes
    assert set(LEADS[:count]) <= set(texts(picture)) and all(lead in picture.words for lead in LEADS[:count])
    height_mm = picture.figure.get_figheight() * 25.4
    ends = [(trace[:, 1].min(), trace[:, 1].max()) for trace in traces(axis)]
    assert len(ends) == count
    for (_, bottom), (top, _) in zip(ends, [*ends[1:], (height_mm, 0)], strict=True):
        assert bottom + 2 < top
    assert f"{LEADS[count - 1]} (67 %, raises the score)" in picture.words or count == 1


def test_a_missing_lead_is_named_as_missing_and_has_no_trace():
    picture = paper(3, there_L=np.array([True, False, True]))
    (axis,) = picture.figure.axes
    assert len(traces(axis)) == 2
    assert "II is missing" in texts(picture) and "Missing: II." in picture.words


def test_waves_are_shaded_where_they_are_and_lettered():
    picture = paper(spans=SPANS)
    (axis,) = picture.figure.axes
    shades = [patch for patch in axis.patches if isinstance(patch, Rectangle) and patch.get_alpha()]
    assert [shade.get_x() for shade in shades] == pytest.approx([20 + 25 * span.onset_s for span in SPANS])
    assert [shade.get_width() for shade in shades] == pytest.approx([2.5, 2.5, 5])
    assert {"P", "QRS", "T"} <= set(texts(picture))
    assert "QRS" not in texts(paper())


def test_smoothing_takes_the_mean_over_40_ms_and_keeps_the_sum():
    impulse_LT = np.zeros((1, 100))
    impulse_LT[0, 50] = 1.0
    for rate_hz in (250, 275, 500):
        smoothed_T = smooth(impulse_LT, rate_hz)[0]
        assert smoothed_T.sum() == pytest.approx(1) and smoothed_T.shape == (100,)
        assert smoothed_T.max() == pytest.approx(1 / round(0.04 * rate_hz))
        assert (smoothed_T * np.arange(100)).sum() == pytest.approx(50)  # it moves nothing
    np.testing.assert_array_equal(smooth(impulse_LT, 10), impulse_LT)  # a sample is longer than that


def test_signs_can_be_told_apart_in_grey():
    dark, light = (0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(to_rgb, (RAISES, LOWERS)))
    assert light - dark > 0.3


# --- the median beat ------------------------------------------------------------------------------------------


def beat(count: int = 2, **changed: object) -> Picture | None:
    values_LT = np.zeros((count, 2500))
    for peak in PEAKS.astype(int):
        values_LT[0, peak - 5 : peak + 5] = 1
        values_LT[-1, peak + 50 : peak + 60] = -1
    given = {"unit_mv": 1.0, "spans": [Span("QRS", -0.05, 0.05), Span("T", 0.2, 0.36)]} | changed
    return median_beat(LEADS[:count], RATE_HZ, signal(count), values_LT, given.pop("peaks", PEAKS), **given)


PEAKS = np.arange(10) * 250.0 + 150


def test_the_median_beat_is_about_r_with_the_band_below_it():
    picture = beat()
    assert picture is not None and picture.words.startswith("Median of 9 beats about R, I, II")  # the last has no room
    trace, band, _, last = picture.figure.axes
    (median,) = [line.get_xydata() for line in trace.lines if len(line.get_xdata()) > 100]
    assert median[np.argmax(median[:, 1]), 0] == pytest.approx(0) and median[:, 1].max() == pytest.approx(1)
    (raises,) = bands(band)["raises"]
    assert raises[:, 1].min() == 0 and raises[:, 1].max() > 0.9 and np.abs(raises[:, 0]).max() < 40
    (lowers,) = bands(last)["lowers"]
    assert lowers[:, 1].max() == 0 and 180 < lowers[:, 0].min() < lowers[:, 0].max() < 260
    assert bands(last)["raises"] == [] and bands(band)["lowers"] == []
    assert "QRS -50 to 50 ms" in picture.words and {"I", "II", "QRS", "T"} <= set(texts(picture))


def test_without_a_whole_beat_there_is_no_median_beat():
    assert beat(peaks=np.array([20.0, 2480.0])) is None and beat(peaks=np.array([])) is None
    assert beat(peaks=np.array([1000.0])) is not None  # one is enough


# --- bars, cells, curves --------------------------------------------------------------------------------------


def test_bars_have_the_length_and_the_direction_of_their_values():
    found = Values(np.array([0.3, -0.1, np.nan]), np.array([0.2, -0.2, np.nan]), np.array([0.4, 0.0, np.nan]))
    picture = bars(
        ["I", "II", "V1"], [Panel("signed share", {"": found}), Panel("occlusion", {"": found}, percent=False)]
    )
    percent, logit = picture.figure.axes
    assert [bar.get_width() for bar in percent.patches] == pytest.approx([30, -10, 0])
    assert [bar.get_width() for bar in logit.patches] == pytest.approx([0.3, -0.1, 0])
    assert [bar.get_facecolor()[:3] for bar in percent.patches[:2]] == [to_rgb(RAISES), to_rgb(LOWERS)]
    assert texts(picture) == ["–", "–"]  # no value is not 0
    assert "signed share: I 30 %, II -10 %, V1 –." in picture.words
    groups = bars(["I"], [Panel("x", {"label 1": Values(np.array([1.0])), "label 0": Values(np.array([2.0]))})])
    assert len({bar.get_hatch() for bar in groups.figure.axes[0].patches}) == 2  # in grey, too


def test_cells_have_signed_numbers_and_sums():
    value_RC = np.array([[0.1, -0.2], [0.0, 0.3]])
    picture = heat_maps(["I", "II"], ["P", "T"], [Cells("shares", value_RC, marked_RC=value_RC > 0.2)])
    assert texts(picture) == ["+10.0", "−20.0", "0.0", "+30.0*", "−10.0", "+30.0", "+10.0", "+10.0", "+20.0"]
    assert "Largest: II T +30.0 %*, I T −20.0 %, I P +10.0 %." in picture.words
    drops = heat_maps(["I"], ["P", "T"], [Cells("logit", np.array([[1.5, np.nan]]), percent=False, sums=False)])
    assert texts(drops) == ["+1.50", "–"]


def test_curves_are_drawn_by_kind_and_order_with_different_lines():
    share_N = np.array([0.0, 0.5, 1.0])
    of = {
        kind: {
            order: (share_N, Values(share_N, share_N - 0.1, share_N + 0.1))
            for order in ("attribution", "occlusion", "random")
        }
        for kind in ("deletion", "insertion")
    }
    deletion, insertion = removal_curves(of, "share").figure.axes
    assert (deletion.get_title(), insertion.get_title()) == ("deletion", "insertion")
    for axis in (deletion, insertion):
        assert len({(line.get_linestyle(), line.get_marker()) for line in axis.lines}) == 3
        np.testing.assert_allclose(axis.lines[0].get_xydata(), np.column_stack([100 * share_N, share_N]))
        assert len(axis.collections) == 3  # the intervals


# --- all of them ----------------------------------------------------------------------------------------------

ONE = Values(np.array([0.5, -0.1]), np.array([0.4, -0.2]), np.array([0.6, 0.1]))
PICTURES: dict[str, Callable[[], Picture | None]] = {
    "paper": lambda: paper(spans=SPANS, title="Window 2 of 3"),
    "paper of nothing": lambda: attribution_paper(["I"], RATE_HZ, np.zeros((1, 900)), np.zeros((1, 900)), unit_mv=None),
    "paper of holes": lambda: attribution_paper(
        ["V1"], 100, np.full((1, 900), np.nan), np.full((1, 900), np.nan), unit_mv=1
    ),
    "beat": beat,
    "beat of one lead": lambda: beat(1, unit_mv=None, spans=()),
    "beat of a flat lead": lambda: median_beat(
        ["I"], RATE_HZ, np.zeros((1, 2500)), np.zeros((1, 2500)), PEAKS, unit_mv=1
    ),
    "bars": lambda: bars(
        ["I", "aVR"], [Panel("signed share", {"a": ONE, "b": ONE}), Panel("absolute share", {"a": ONE})]
    ),
    "bars of nothing": lambda: bars(["I"], [Panel("signed share of it", {"": Values(np.array([np.nan]))})]),
    "cells": lambda: heat_maps(["I"], ["P", "T"], [Cells("x", np.zeros((1, 2))), Cells("y", np.full((1, 2), np.nan))]),
    "randomisation": lambda: randomisation(["head", "head and encoder"], {"signed": ONE, "absolute": ONE}),
    "curves": lambda: removal_curves({"deletion": {"random": (np.array([0.0, 1.0]), ONE)}}, "logit"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_each_is_whole_as_png_and_as_svg(name: str):
    with np.errstate(all="raise"):
        picture = PICTURES[name]()
        assert picture is not None and len(picture.words) > 20
        png, svg = picture.png(), picture.svg()
    image = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    dark = image.min(axis=2) < 0.4
    assert dark.any() and min(image.shape[:2]) > 100
    for edge in (dark[0], dark[-1], dark[:, 0], dark[:, -1]):  # a text or line that goes beyond would be here
        assert not edge.any()
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") == picture.words
    assert not re.search(r"<script|<image|href=\"(?!#)|<metadata", svg)
    assert len(svg) < 400_000


def test_a_png_is_small_and_keeps_its_colours():
    """Also rare ones, such as a small band of a colour on a large paper."""
    picture, drawn = paper(), io.BytesIO()
    picture.figure.savefig(drawn, format="png", dpi=DPI)
    png = picture.png()
    assert len(png) < 0.5 * len(drawn.getvalue())
    before, after = (matplotlib.image.imread(io.BytesIO(content))[..., :3] for content in (drawn.getvalue(), png))
    assert np.abs(before - after).max() < 0.05


def test_the_same_values_give_the_same_bytes():
    assert paper().svg() == paper().svg() and paper().png() == paper().png()
