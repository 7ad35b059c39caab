"""The report of explanations: sentences follow from the numbers, pictures from recordings; no subject is named."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import bundles, explained
from support.browser import browsing
from support.parsed import Parsed

from lsemvae.explain.attribution import Settings
from lsemvae.explain.cohort import COLUMNS, DIFFERENCE
from lsemvae.explain.explainer import NOT_CONVERGED, Explainer, Explanation
from lsemvae.explain.truth import ATTRIBUTION_EFFECT, EFFECT_TRUTH
from lsemvae.leads import LIMB_LEADS
from lsemvae.reports.explanation import LIMITS, READING, Image, Shown, explanation_report, record_pictures
from lsemvae.reports.explanation_checks import checks_section, verdicts

ABOUT = {
    "model": "models:/ph-6L@champion",
    "version": 3,
    "task": "ph",
    "leads": LIMB_LEADS,
    "threshold": 0.5,
    "bound": 0.01,
    "data": "s3://user:secret@bucket/<b>",
}
Explained = list[tuple[str, Explanation]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Explained:
    """Two explanations, one of a recording without V leads or II, and a refusal."""
    folder = tmp_path_factory.mktemp("bundle")
    bundles.save(folder / "ph")
    first, second = (record.signal_for(LIMB_LEADS) for record in bundles.records(2))
    second = second.copy()
    second[1] = np.nan
    flat = np.zeros_like(first)
    explainer = Explainer(folder / "ph", Settings(steps=4, most_steps=8))
    return list(zip(["r-1", "<r>2", "r-3"], explainer.explain_signals([first, second, flat], [500] * 3), strict=True))


def drawn(of: Explained) -> list[Shown]:
    """What the page shows of them."""
    return [
        Shown(record_id, one, {name: Image.of(picture) for name, picture in record_pictures(one).items()})
        for record_id, one in of
    ]


@pytest.fixture(scope="module")
def html(shown: Explained) -> str:
    table = explained.summary(LIMB_LEADS, ["all", "label 0", "label 1", "women", DIFFERENCE])
    igar = pd.DataFrame(
        [("lead", "aVR", 0.274, 0.2, 0.3), ("wave", "P", 0.1, np.nan, np.nan)],
        columns=["kind", "name", "ratio", "low", "high"],
    )
    return explanation_report(ABOUT, explained.records(shown), table, explained.checks(), drawn(shown), igar)


def without_beats(explanation: Explanation) -> Explanation:
    (window,) = explanation.windows
    waves = replace(window.waves, edges={}, failures={}, reason="no beat was found")
    note = "Explained by lead only: no beat was found."
    return replace(explanation, windows=(replace(window, waves=waves),), notes=(note,))


# --- the pictures of a recording ------------------------------------------------------------------------------


def test_a_recording_has_all_pictures_and_they_name_its_leads(shown: Explained):
    pictures = record_pictures(shown[0][1])
    assert list(pictures) == ["paper", "beat", "leads", "waves", "cells"]
    for name in ("paper", "beat", "leads", "cells"):
        assert all(lead in pictures[name].words for lead in LIMB_LEADS), name
    texts = [text.get_text() for text in pictures["paper"].figure.axes[0].texts]
    assert {*LIMB_LEADS, "P", "QRS", "T"} <= set(texts)
    assert any("10 mm/mV" in text for text in texts)  # the scale of this bundle's preprocessing is known
    unknown = record_pictures(replace(shown[0][1], unit_mv=None))["paper"]
    assert "standard deviation" in unknown.words and "mV" not in unknown.words


def test_bars_are_the_shares_of_the_explanation_and_its_occlusion(shown: Explained):
    _, explanation = shown[0]
    signed, absolute, occlusion, *_ = record_pictures(explanation)["leads"].figure.axes
    assert explanation.shares is not None
    shares = explanation.shares
    np.testing.assert_allclose(
        [bar.get_width() for bar in signed.patches], 100 * shares.signed_LW.sum(axis=1), rtol=1e-6
    )
    np.testing.assert_allclose(
        [bar.get_width() for bar in absolute.patches], 100 * shares.absolute_LW.sum(axis=1), rtol=1e-6
    )
    drops = explanation.windows[0].lead_drop_L
    np.testing.assert_allclose([bar.get_width() for bar in occlusion.patches], drops, rtol=1e-6)


def test_a_lead_that_is_missing_has_no_bar_and_is_said_to_be_missing(shown: Explained):
    pictures = record_pictures(shown[1][1])
    assert "Missing: II." in pictures["paper"].words and "II –" in pictures["leads"].words


def test_without_a_beat_there_are_leads_only(shown: Explained):
    found = without_beats(shown[0][1])
    assert list(record_pictures(found)) == ["paper", "leads"]
    page = explanation_report(
        ABOUT, explained.records([("r", found)]), explained.summary(LIMB_LEADS, ["all"]), None, drawn([("r", found)])
    )
    assert "<li>Explained by lead only: no beat was found.</li>" in page
    assert '<tr><th scope="row">without a beat, so explained by lead only</th><td class=n>1</td>' in page


def test_of_several_windows_the_one_with_most_attribution_is_drawn(shown: Explained):
    (window,) = shown[0][1].windows
    quiet = replace(window, values_LT=window.values_LT / 10)
    paper = record_pictures(replace(shown[0][1], windows=(quiet, window, quiet)))["paper"]
    texts = [text.get_text() for text in paper.figure.axes[0].texts]
    assert "Window 2 of 3, the one with most attribution" in texts


def test_a_refused_recording_has_no_picture(shown: Explained):
    assert record_pictures(shown[2][1]) == {}


# --- what the checks say --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "which", "passes", "words"),
    [
        ({}, 0, True, "signed attributions are others, so they depend on what the model learned"),
        ({"correlation": (0.8, 0.7, 0.9)}, 0, False, "signed attributions are much the same"),
        ({"correlation": (0.5, 0.4, 0.6)}, 0, None, "is not clear"),
        ({"correlation": (np.nan, np.nan, np.nan)}, 0, None, "is not clear"),
        ({}, 1, False, "absolute attributions are much the same"),
        ({}, 2, True, "Deleting in the order of the attributions takes away the logit's difference"),
        ({"deletion": (0.2, 0.1, 0.3)}, 2, False, "does not take away the logit's difference from the baseline faster"),
        ({"deletion": (-0.1, -0.3, 0.1)}, 2, None, "does not clearly take away"),
        ({}, 3, True, "restores the logit's difference from the baseline faster than random order (area less that of"),
        ({"insertion": (-0.2, -0.3, -0.1)}, 3, False, "does not restore"),
        ({"insertion": (np.nan, np.nan, np.nan)}, 3, None, "does not clearly restore"),
        ({"truth": {"leads": (0.6, 0.4, 0.8)}}, 4, True, "leads: attributions correlate with"),
        ({"truth": {"leads": (0.1, -0.2, 0.4)}}, 4, False, "leads: attributions do not clearly correlate"),
        ({"truth": {"leads, shuffled labels": (0.1, -0.2, 0.4)}}, 4, True, "do not clearly correlate"),
        ({"truth": {"leads, shuffled labels": (0.6, 0.4, 0.8)}}, 4, False, "although the labels are random"),
        ({"truth": {ATTRIBUTION_EFFECT: (0.9, 0.8, 1.0)}}, 4, True, "with how the score changes where a wave is exch"),
        ({"evidence": (1.4, 1.1, 2.3)}, 4, True, "Attributions find evidence for the label in the waves (1.400 [1.100"),
        ({"evidence": (0.1, -0.3, 0.5)}, 4, None, "Attributions do not clearly find evidence"),
        ({"truth": {EFFECT_TRUTH: (0.1, -0.2, 0.4)}}, 4, None, "waves that change the score do not clearly correlate"),
    ],
)  # fmt: skip
def test_a_sentence_follows_from_the_numbers(changed: dict, which: int, passes: bool | None, words: str):
    found, text = verdicts(explained.checks(**changed))[which]
    assert found is passes and words in text


def test_the_page_shows_the_evidence_of_each_wave():
    page = checks_section(explained.checks(evidence=(1.4, 1.1, 2.3)))
    assert "how far the overload moves the logit" in page and "1.400 [1.100 to 2.300]" in page


# --- the page -------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_explained_and_how_to_read_it(html: str):
    text = Parsed(html).text
    assert "ph: 2 recordings explained" in text and "Explained: 2 of 3 recordings. Refused: 1." in text
    assert all(sentence in text for sentence in (*READING, *LIMITS))
    for value in ("models:/ph-6L@champion", "refused: ", "The bound is 0.01 of the difference", "Recordings by steps:"):
        assert value in text
    section = html.split("<h2>Are the explanations true?</h2>")[1].split("<h2>")[0]
    assert section.count("<b>Passes.</b>") == 3 and section.count("<b>Fails.</b>") == 1


def test_recordings_that_miss_the_bound_are_counted(shown: Explained):
    table = explained.records(shown)
    for notes, count in (([None, None, None], "none"), ([None, f"{NOT_CONVERGED} after 8 steps.", None], "1")):
        page = explanation_report(ABOUT, table.assign(notes=notes), explained.summary(LIMB_LEADS, ["all"]), None, [])
        assert f"Recordings that exceed it with the most steps: {count}." in page


def test_the_figures_are_those_of_the_tables(html: str):
    text = Parsed(html).text
    # By lead, aVF is the sixth: 6 * 15 / 1000 of all, thrice that of label 1; T is the fourth wave: 4 * 21 / 1000.
    assert "aVF (9.0 [8.9 to 9.1] %)" in text and "rest (10.5 [10.4 to 10.6] %), T (8.4 [8.3 to 8.5] %)" in text
    rows = [re.findall(r">([^<]+)</td>", row) for row in re.findall(r'<tr><th scope="row">aVF</th>(.*?)</tr>', html)]
    assert [cell.split()[0] for cell in rows[0]] == ["-9.0", "-27.0", "-18.0", "-45.0"]  # all, labels, difference
    assert [cell.split()[0] for cell in rows[1]] == ["9.0", "27.0", "18.0", "45.0"]
    assert rows[2] == ["-36.0 [-36.1 to -35.9]"]  # women
    assert re.search(r'<th scope="row">label 0</th><td class=n>11</td><td class=n>6</td>', html)
    maps = [image["alt"] for image in Parsed(html).images() if f"{DIFFERENCE}, %" in image["alt"]]
    assert len(maps) == 1 and "all, %" in maps[0] and "aVF rest −15.0 %*" in maps[0]


def test_the_published_ratio_is_beside_the_shares_with_its_weaknesses(html: str):
    section = Parsed(html.split("<h2>IGAR, as published</h2>")[1].split("<h2>")[0]).text
    assert "27.4 [20.0 to 30.0]" in section and "scaling takes away sign and size" in section
    assert "6.0 [5.9 to 6.1]" in section  # of aVR, the fourth lead


def test_recordings_are_named_and_drawn_and_subjects_are_not(html: str, shown: Explained):
    text = Parsed(html).text
    assert "Recording r-1" in text and "Recording <r>2" in text and "<r>" not in html
    assert "patient-" not in html
    assert "Refused, as for scoring" in html.split("Recording r-3")[1]
    assert "Missing or unusable: II." in html
    # The cohort's three, those of the checks, and five of each explained recording.
    assert len(Parsed(html).images()) == 3 + 2 + 2 * 5
    assert f"{shown[0][1].score.score:.3f}" in text


def test_the_page_needs_nothing_else_and_shows_no_password(html: str):
    Parsed(html).check_alone()
    assert not re.search(r"https?://", html)
    assert "secret" not in html and "<b>" not in Parsed(html).text.replace("bucket/<b>", "")


def test_a_run_without_checks_summary_or_pictures_has_a_page(shown: Explained):
    refused = explained.records(shown)[2:].astype({"score": float})
    empty = pd.DataFrame(columns=[*COLUMNS, "records", "subjects"])
    page = explanation_report({"task": "ph"}, refused, empty, None, [])
    text = Parsed(page).text
    assert "ph: 0 recordings explained" in text and "nothing here shows whether the explanations are true" in text
    assert "No recording is explained, so there is no summary." in text and "None is drawn." in text
    assert Parsed(page).images() == []


@pytest.mark.server
def test_the_page_does_not_scroll_sideways_on_a_phone(html: str, tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text(html)
    with browsing(tmp_path) as browser:
        for width in (390, 1200):
            browser.open_report(path, width)
        assert browser.run("[...document.querySelectorAll('img')].filter(image => !image.naturalWidth).length") == 0
        assert [url for url in browser.requested if not url.startswith(("data:", "file:", "about:"))] == []
        assert browser.logged == []
