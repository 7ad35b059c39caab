"""The evaluation report: its figures are the comparison's, it names nobody, and it needs nothing but itself."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import scored
from support.browser import browsing
from support.parsed import Parsed

from lsemvae.evaluation import abstention
from lsemvae.evaluation.compare import Comparison, Scores, compare
from lsemvae.evaluation.published import CAUTION
from lsemvae.evaluation.tables import abstention_table, differences_table
from lsemvae.reports.evaluation import LIMITS, evaluation_report

PNG = b"\x89PNG\r\n\x1a\n"
SECRET = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def scores() -> Scores:
    whole = scored.scores(150, data=f"s3://user:secret@bucket/{SECRET}")
    few = whole.scores[whole.scores.method.isin(["LS-EMVAE", "xResNet1d", "untrained encoder", "naive"])]
    main = few[(few.analysis == "main") & (few.leads == "12L") & (few.method == "LS-EMVAE")]
    doubts = main[["leads", "method", "seed", "record_id"]].assign(doubt="distance", value=abs(main.score - 0.6))
    return replace(whole, scores=few, doubts=doubts)


@pytest.fixture(scope="module")
def comparison(scores: Scores) -> Comparison:
    return compare(scores, draws=20)


@pytest.fixture(scope="module")
def html(scores: Scores, comparison: Comparison) -> str:
    rng = np.random.default_rng(0)
    features = {record: rng.normal(size=6) for record in scores.people.record_id}
    return evaluation_report(scores, comparison, features=features, reconstructions=PNG)


@pytest.fixture(scope="module")
def small(scores: Scores) -> Scores:
    """Two methods on twelve leads: few pictures."""
    table = scores.scores[(scores.scores.analysis == "main") & (scores.scores.leads == "12L")]
    return replace(scores, scores=table[table.method.isin(["LS-EMVAE", "naive"])])


def test_the_figures_are_those_of_the_comparison(html: str, comparison: Comparison):
    text = Parsed(html).text
    for method in ("LS-EMVAE", "xResNet1d"):
        for leads in ("12L", "6L"):
            assert str(comparison.line(method, leads)["auroc"]) in text
            assert str(comparison.line(method, leads)["calibration_intercept"]) in text
    for row in differences_table(comparison).rows:
        assert row[2] in text
    assert "the highest AUROC is" in text and "After Holm's correction LS-EMVAE is better than" in text
    assert "150 recordings of 120 subjects" in text
    assert all(limit in text for limit in LIMITS)
    for analysis in ("fewer labels: AUROC", "noise: AUROC", "lead sets: AUROC"):
        assert analysis in text
    assert "failed: CUDA out of memory <at> fold 3" in text


def test_the_page_is_whole_alone_and_runs_nothing(html: str):
    parsed = Parsed(html)
    parsed.check_alone()
    pictures = parsed.images()
    # Methods; differences; a forest and five curves for each set of leads; fewer labels; the map; reconstructions.
    assert len(pictures) == 1 + 1 + 2 * (1 + 5) + 1 + 2
    assert not re.search(r"https?://", html)


def test_a_fact_is_text_and_shows_no_password(html: str):
    assert SECRET not in html and "&lt;script&gt;alert(1)" in html
    assert "secret" not in html


def test_the_page_names_no_recording_and_no_subject(html: str, scores: Scores):
    words = set(re.findall(r"\w+", Parsed(html).text))
    assert not words & (set(scores.people.record_id) | set(scores.people.subject_id))


def test_published_figures_stand_apart_and_only_for_the_paper_s_tasks(html: str, small: Scores):
    assert CAUTION in Parsed(html).text and "0.852" in html.split("What the paper printed")[1]
    other = evaluation_report(replace(small, facts={**small.facts, "task": "norm"}), compare(small, draws=3))
    assert "What the paper printed" not in other and "What the encoder does" not in other


def test_a_comparison_without_its_reference_or_with_nothing_but_failures_has_a_page(small: Scores):
    some = replace(small, scores=small.scores[small.scores.method == "naive"])
    found = evaluation_report(some, compare(some, draws=3))
    assert "LS-EMVAE has no scores here" in found and "the highest AUROC is 0.500" in found
    nothing = replace(small, scores=small.scores[:0])
    found = evaluation_report(nothing, compare(nothing, draws=3))
    assert "CUDA out of memory &lt;at&gt; fold 3" in found
    whole = replace(some, failed=small.failed[:0], people=some.people.assign(age_years=np.nan))
    assert "Every training finished" in evaluation_report(whole, compare(whole, draws=3))


def test_a_small_cohort_with_one_subject_each_and_one_fold_has_a_page(small: Scores):
    people = small.people[:12].assign(fold=0, label=[0, 1] * 6)
    table = small.scores[small.scores.record_id.isin(people.record_id)].assign(fold=0)
    tiny = Scores(small.facts, people, table, small.failed[:0])
    found = compare(tiny, draws=3)
    assert set(found.subgroups.note) == {"fewer than 20 recordings"}
    assert "Decision curve" not in evaluation_report(tiny, found)  # there is no other fold to calibrate on
    assert isinstance(found.metrics, pd.DataFrame)


@pytest.mark.server
def test_the_page_does_not_scroll_sideways_on_a_phone(html: str, tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text(html)
    with browsing(tmp_path) as browser:
        for width in (390, 1280):
            browser.open_report(path, width)
            widest = (
                "Math.max(...[...document.querySelectorAll('.wide')].map(box => box.getBoundingClientRect().right))"
            )
            assert browser.run(widest) <= width
        broken = "[...document.querySelectorAll('img')].filter(image => !image.naturalWidth).length"
        assert browser.run(broken) == 1  # the reconstructions of this test are no picture
        assert browser.logged == []


def test_the_page_says_what_setting_doubtful_recordings_aside_is_worth(html: str, comparison: Comparison):
    section = html.split("<h2>Setting aside the most doubtful tenth</h2>")[1].split("<h2>")[0]
    (row,) = abstention_table(comparison, "LS-EMVAE").rows
    assert all(f">{cell}<" in section for cell in row) and "HemoNet" in section
    assert f"<p>12L: {abstention.verdict(comparison.set_aside('LS-EMVAE', '12L'))}</p>" in section
    assert "<p>6L: not measured</p>" in section
