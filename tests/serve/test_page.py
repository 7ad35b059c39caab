"""The page at `/`: its files, and in a headless Chromium what a person sees of a recording and its score."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support import bundles as small_bundles
from support.browser import Browser, browsing
from support.serving import answering

from lsemvae.formats import read_record
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.quality import FLAGS, quality_flags
from serve import page as page_module
from serve.api import Service
from serve.explaining import Explaining
from serve.observed import Metrics
from serve.registry import Registry
from serve.security import Tokens

STATIC = {path.name: path.read_text() for path in page_module.FOLDER.iterdir()}
SCRIPTS = [name for name in STATIC if name.endswith(".js")]
SVG_NAMESPACE = "http://www.w3.org/2000/svg"
PX_PER_MM = 96 / 25.4
TOKEN = "a-token-that-nobody-guesses"


# --- the files ------------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Tags with their attributes, and the text of every element that has some."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts = ""
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._within = tag

    def handle_data(self, data):
        if self._within in ("script", "style"):
            self.scripts += data.strip()

    def values(self, *names: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags for name in names if attributes.get(name)]


@pytest.fixture(scope="module")
def files() -> TestClient:
    api = FastAPI()
    api.include_router(page_module.router)
    return TestClient(api)


HTML = Parsed(STATIC["index.html"])


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"), ("/page/page.css", "text/css"), ("/page/page.js", "text/javascript"),
        ("/page/paper.js", "text/javascript"), ("/page/explanation.js", "text/javascript"),
        ("/page/elements.js", "text/javascript"), ("/page/flags.json", "application/json"),
        ("/page/example.csv", "text/csv"),
    ],
)  # fmt: skip
def test_every_file_says_what_it_is_and_forbids_all_else(files: TestClient, path: str, kind: str):
    answer = files.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] == kind
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "/page" not in files.get("/openapi.json").json()["paths"]


def test_nothing_else_of_the_folder_is_given_out(files: TestClient):
    for path in ("/page/", "/page/../page.py", "/page/%2e%2e/page.py", "/page/index.html", "/page/page.py"):
        assert files.get(path).status_code == 404


def test_the_page_refers_to_nothing_elsewhere_and_runs_nothing_inline(files: TestClient):
    for name, text in STATIC.items():
        assert not re.findall(r"(?:https?:)?//[\w.]+\.\w", text.replace(SVG_NAMESPACE, "")), name
    for path in HTML.values("src", "href"):
        if path not in ("data:,", "openapi.json"):
            assert files.get(f"/{path}").status_code == 200, path
    for script in SCRIPTS:
        for path in re.findall(r'from "\./([^"]+)"', STATIC[script]):
            assert files.get(f"/page/{path}").status_code == 200
        for path in re.findall(r'"(page/[^"?]+)"', STATIC[script]):
            assert files.get(f"/{path}").status_code == 200
        forbidden = ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "Storage", "cookie", "document.write")
        assert not [word for word in forbidden if word in STATIC[script]]
    assert not HTML.scripts
    assert not [name for _, attributes in HTML.tags for name in attributes if name.startswith("on") or name == "style"]


def test_every_id_is_there_once_and_every_field_has_a_label():
    ids = HTML.values("id")
    assert len(ids) == len(set(ids))
    named = [name for value in HTML.values("aria-labelledby", "aria-describedby", "for") for name in value.split()]
    named += [name for script in SCRIPTS for name in re.findall(r'\bat\("([^"]+)"\)', STATIC[script])]
    assert set(named) <= set(ids)
    labelled = set(HTML.values("for"))
    within_label = set(re.findall(r'<label>[^<]*<\w+ id="(\w+)"', STATIC["index.html"]))
    fields = {attributes["id"] for tag, attributes in HTML.tags if tag in ("input", "select", "textarea")}
    assert fields <= labelled | within_label


def test_the_page_says_that_it_is_for_research_and_that_an_explanation_is_no_diagnosis():
    text = " ".join(re.sub(r"<[^>]+>", "", STATIC["index.html"]).split())
    assert text.count("Research use only: not a medical device") >= 2
    assert "what the model’s score depends on, not a diagnosis" in text


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_words_stand_out_from_what_they_stand_on():
    colours = dict(re.findall(r"--(\w+): (#\w{6})", STATIC["page.css"]))
    for ink in ("ink", "quiet", "accent"):
        for paper in ("#ffffff", colours["panel"], "#fdf0ee", "#f2effa"):
            assert (luminance(paper) + 0.05) / (luminance(colours[ink]) + 0.05) >= 4.5, (ink, paper)


def test_the_simulated_recording_can_be_read_and_says_what_it_is(files: TestClient):
    content = files.get("/page/example.csv").content
    assert content.startswith(b"# simulated")
    record = read_record("example.csv", {"example.csv": content}.__getitem__)
    assert (record.leads, record.rate_hz, record.signal_mv_LT.shape) == (LEADS, 500, (12, 5000))
    assert quality_flags(record) == ()
    page_module.example_csv.cache_clear()
    assert files.get("/page/example.csv").content == content


def test_the_page_knows_what_every_flag_means(files: TestClient):
    assert files.get("/page/flags.json").json() == FLAGS


# --- in a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, Metrics]:
    """A calibrated model of twelve leads and one of six, both untrained."""
    folder = tmp_path_factory.mktemp("models")
    for name, leads in (("ph-12L", LEADS), ("ph-6L", LIMB_LEADS)):
        small_bundles.save(folder / name, leads=leads)
    return Registry([str(folder / "ph-12L"), str(folder / "ph-6L")], folder / "kept", poll_s=0), Metrics()


@pytest.fixture(scope="module")
def url(loaded: tuple[Registry, Metrics], explaining: Explaining) -> Iterator[str]:
    with answering(Service(*loaded, explaining=explaining)) as address:
        yield address


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(running: Browser, url: str, tmp_path: Path) -> Iterator[Browser]:
    """The page, freshly loaded. Nothing may go wrong in it, and it may ask nobody else."""
    running.size(1280)
    running.logged.clear()
    running.requested.clear()
    enter(running, url)
    yield running
    running.screenshot(tmp_path / "page.png")
    assert running.logged == []
    assert {address.split("/")[2] for address in running.requested if address.startswith("http")} == {url.split("/")[2]}


def enter(browser: Browser, url: str) -> None:
    browser.open(url, "document.getElementById('served')?.textContent")


def choose(browser: Browser, *paths: Path) -> str:
    """Gives the files to the page and waits -> what it says of them."""
    browser.run("document.getElementById('status').textContent = ''")
    browser.choose("#files", *paths)
    return finished(browser)


def finished(browser: Browser) -> str:
    browser.wait("/scored/.test(document.getElementById('status').textContent)")
    return browser.text("#status")


def score(url: str, *paths: Path) -> list[dict]:
    """What the service says of the same files."""
    files = [("files", (path.name, path.read_bytes())) for path in paths]
    return httpx.post(f"{url}/v1/score/file", files=files).json()["results"]


def write_csv(path: Path, leads: tuple[str, ...], signal_mv_LT: np.ndarray, rate_hz: int = 500) -> Path:
    rows = "\n".join(",".join(f"{value:.3f}" for value in row) for row in signal_mv_LT.T)
    path.write_text(f"# rate_hz: {rate_hz}\n# unit: mV\n{','.join(leads)}\n{rows}\n")
    return path


@pytest.fixture(scope="module")
def signal_mv_LT() -> np.ndarray:
    record = read_record("example.csv", {"example.csv": page_module.example_csv().encode()}.__getitem__)
    return record.signal_mv_LT


def select(browser: Browser, field: str, value: str) -> None:
    browser.run(f"document.getElementById('{field}').value = '{value}'")
    browser.run(f"document.getElementById('{field}').dispatchEvent(new Event('change'))")


def drawn(browser: Browser) -> list[dict]:
    """The traces of leads on the paper: name, x and y of its points in millimetres."""
    paths = browser.run(
        "[...document.querySelectorAll('#paper path[data-lead]')].map(p => [p.dataset.lead, p.getAttribute('d')])"
    )
    return [
        {"lead": lead, "d": d, "mm_2N": np.array(re.findall(r"[\d.-]+", d), dtype=float).reshape(-1, 2).T}
        for lead, d in paths
    ]


def test_a_simulated_recording_is_drawn_to_scale_with_its_score(browser: Browser, url: str, signal_mv_LT: np.ndarray):
    browser.run("document.getElementById('example').click()")
    assert finished(browser) == "1 scored, 0 refused."
    answer = httpx.post(f"{url}/v1/score/file", files=[("files", ("a.csv", page_module.example_csv()))]).json()
    (expected,) = answer["results"]
    assert browser.text("#score") == f"{expected['score']:.3f}"
    assert browser.text("#probability") == f"{100 * expected['probability']:.1f}%"
    assert browser.text("#decision") == ("At or above the threshold" if expected["decision"] else "Below the threshold")
    assert browser.text("#reliability") == expected["reliability"]["level"].capitalize() == "Good"
    assert "Simulated" in browser.text("#simulated")
    assert "A score is not a probability" in browser.text("#answer")
    model = browser.text("#model")
    assert all(str(expected["model"][key]) in model for key in ("name", "digest", "preprocess_digest"))
    assert browser.text("#explain") == "Explain this score" and browser.text("#explained") == ""

    traces = drawn(browser)
    assert [trace["lead"] for trace in traces] == [
        "I", "aVR", "V1", "V4", "II", "aVL", "V2", "V5", "III", "aVF", "V3", "V6", "II",
    ]  # fmt: skip
    for position, trace in enumerate(traces):
        column, span = (position % 4, 1250) if position < 12 else (0, 5000)
        part_mv = signal_mv_LT[LEADS.index(trace["lead"])][column * span : (column + 1) * span + 1]
        x_mm, y_mm = trace["mm_2N"]
        np.testing.assert_allclose(np.diff(x_mm), 25 / 500, atol=0.011)
        assert x_mm[-1] - x_mm[0] == pytest.approx((len(part_mv) - 1) / 500 * 25, abs=0.02)
        np.testing.assert_allclose(y_mm - y_mm[0], -10 * (part_mv - part_mv[0]), atol=0.012)
        assert x_mm[0] == pytest.approx(15 + 62.5 * column, abs=0.01)
    width, height, across, down = browser.run(
        "(({width, height}, {viewBox}) => [width, height, viewBox.baseVal.width, viewBox.baseVal.height])"
        "(document.querySelector('#paper svg').getBoundingClientRect(), document.querySelector('#paper svg'))"
    )
    assert width / across == pytest.approx(PX_PER_MM, rel=1e-3)
    assert height / down == pytest.approx(PX_PER_MM, rel=1e-3)
    assert "25 mm/s   10 mm/mV   0–10 s of 10 s   500 Hz" in browser.run("document.querySelector('#paper').textContent")
    select(browser, "size", "2")
    larger = browser.run(
        "(({width, height}) => [width, height])(document.querySelector('#paper svg').getBoundingClientRect())"
    )
    assert larger == pytest.approx([2 * width, 2 * height], rel=1e-3)


def test_a_model_s_card_is_shown_as_text(browser: Browser, url: str, tmp_path: Path):
    card = "# Model card: ph\n\n- women: 0.81\n<img src=x onerror=\"document.title='owned'\">\n"
    small_bundles.save(tmp_path / "ph-6L", model_card=card)
    small_bundles.save(tmp_path / "no-card", leads=LEADS)
    assert browser.run("document.querySelectorAll('#cards details').length") == 0  # of models without a card
    registry = Registry([str(tmp_path / "ph-6L"), str(tmp_path / "no-card")], tmp_path / "kept", poll_s=0)
    with answering(Service(registry, Metrics())) as other:
        enter(browser, other)
        assert browser.run("[...document.querySelectorAll('#cards summary')].map(e => e.textContent)") == [
            "Model card of ph-6L"
        ]
        assert browser.text("#cards pre") == ""  # folded
        browser.run("document.querySelector('#cards summary').click()")
        assert browser.text("#cards pre").strip() == card.strip()
        assert browser.run("document.querySelectorAll('#cards img').length") == 0
        browser.size(390)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        browser.run("document.getElementById('example').click()")
        assert finished(browser) == "1 scored, 0 refused."
        assert browser.run("document.querySelector('#cards details').open")  # it stays open
        assert browser.run("document.title").startswith("Score an ECG")
    enter(browser, url)
    browser.requested[:] = [address for address in browser.requested if not address.startswith(other)]


def test_six_leads_from_two_are_marked_as_derived(browser: Browser, tmp_path: Path, signal_mv_LT: np.ndarray):
    gap_mv_LT = signal_mv_LT[:2].copy()
    gap_mv_LT[1, 700:760] = np.nan
    path = write_csv(tmp_path / "two.csv", ("I", "II"), gap_mv_LT)
    assert choose(browser, path) == "1 scored, 0 refused."
    assert [trace["lead"] for trace in drawn(browser)] == ["I", "aVR", "II", "aVL", "III", "aVF", "II"]
    pauses = {trace["lead"]: trace["d"].count("M") - 1 for trace in drawn(browser)[:5]}
    assert pauses == {"I": 0, "aVR": 0, "II": 1, "aVL": 0, "III": 1}  # where nothing was recorded nothing is drawn
    names = browser.run("[...document.querySelectorAll('#paper .lead')].map(name => name.textContent)")
    assert names == ["I", "aVR derived", "II", "aVL derived", "III derived", "aVF derived", "II"]
    assert browser.text("#leads-used") == ", ".join(LIMB_LEADS)
    assert browser.text("#leads-derived").startswith("III, aVR, aVL, aVF: computed from I and II")
    assert browser.text("#leads-missing") == "V1, V2, V3, V4, V5, V6: this model does not take them"
    assert browser.text("#reliability") == "Limited"
    assert FLAGS["nan"] in browser.text("#flags")
    browser.run("document.getElementById('leads-table').open = true")
    rows = browser.run("[...document.querySelectorAll('#leads-rows tr')].map(row => row.innerText.split('\\t'))")
    low_mv, high_mv = np.nanmin(gap_mv_LT[1]), np.nanmax(gap_mv_LT[1])
    assert rows[1] == ["II", "measured", f"{low_mv:.3f}", f"{high_mv:.3f}", "60", "yes"]
    assert [row[1] for row in rows] == ["measured"] * 2 + ["derived"] * 4 + ["missing"] * 6


def test_several_recordings_are_listed_and_one_is_shown_by_keyboard(
    browser: Browser, url: str, tmp_path: Path, signal_mv_LT: np.ndarray
):
    good = write_csv(tmp_path / "good.csv", LEADS, signal_mv_LT)
    flat = write_csv(tmp_path / "flat.csv", LIMB_LEADS, np.zeros((6, 5000)))
    hostile = tmp_path / "<img src=x onerror=document.title='owned'>.xml"
    hostile.write_text("<a/>")
    assert choose(browser, good, flat, hostile) == "1 scored, 2 refused."
    rows = browser.run("[...document.querySelectorAll('#recordings-rows tr')].map(row => row.innerText)")
    assert [row.split("\t")[0].strip() for row in rows] == [good.name, flat.name, hostile.name]
    refusals = [score(url, path)[0]["refused"]["reason"] for path in (flat, hostile)]
    assert refusals[0] in rows[1]
    assert refusals[1] in rows[2]
    assert browser.text("#result-heading") == good.name

    browser.run("document.getElementById('token').focus()")
    for _ in range(3):  # the table, the first, the second
        browser.press("Tab")
    assert browser.run("document.activeElement.innerText") == flat.name
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter")
    assert browser.run("document.activeElement.id") == "result-heading"
    assert browser.text("#result-heading") == flat.name
    assert refusals[0] in browser.text("#refused")
    assert browser.run("document.getElementById('answer').hidden")
    assert len(drawn(browser)) == 7  # what was refused can be looked at too
    browser.run("document.querySelectorAll('#recordings-rows button')[2].click()")
    assert refusals[1] in browser.text("#refused")
    assert browser.run("document.getElementById('details').hidden")  # nothing is said of what was not read
    assert browser.run("document.title").startswith("Score an ECG")


# --- the explanation ----------------------------------------------------------------------------------------------


def ask_for_explanation(browser: Browser) -> str:
    """Presses the button by keyboard and waits -> what the page says."""
    browser.run("document.getElementById('explain').focus()")
    browser.press("Enter")
    browser.wait("/explained/.test(document.getElementById('explain-status').textContent)")
    return browser.text("#explain-status")


def rows(browser: Browser, body: str) -> list[list[str]]:
    found = browser.run(
        f"[...document.querySelectorAll('#{body} tr')].map(row => [...row.children].map(cell => cell.textContent))"
    )
    assert isinstance(found, list)
    return found


def percent(share: float) -> str:
    size = f"{100 * abs(share):.1f}%"
    return size if size == "0.0%" else f"{'−' if share < 0 else '+'}{size}"


def bands(browser: Browser) -> dict[str, dict[str, str]]:
    """The bars below the traces: lead -> kind -> path."""
    found: dict[str, dict[str, str]] = {}
    for lead, kind, d in browser.run(
        "[...document.querySelectorAll('#paper [data-attribution]')].map(p => [p.dataset.attribution,"
        " p.getAttribute('class'), p.getAttribute('d')])"
    ):
        found.setdefault(lead, {}).setdefault(kind, d)
    return found


def test_a_score_is_explained_on_demand(browser: Browser, url: str):
    browser.run("document.getElementById('example').click()")
    finished(browser)
    assert ask_for_explanation(browser) == "The score is explained below."
    assert browser.run("document.activeElement.id") == "explanation-heading"
    files = [("files", ("simulated.csv", page_module.example_csv()))]
    answer = httpx.post(f"{url}/v1/explain/file", files=files, timeout=600).json()["results"][0]["explanation"]
    (window,) = answer["windows"]
    leads = rows(browser, "explained-leads")
    assert [row[0] for row in leads] == list(LEADS)
    assert [row[1] for row in leads] == [percent(answer["leads"][lead]["signed"]) for lead in LEADS]
    assert [row[2] for row in leads] == [f"{100 * answer['leads'][lead]['absolute']:.1f}%" for lead in LEADS]
    assert float(leads[0][3].replace("−", "-")) == pytest.approx(-answer["leads"]["I"]["drop"], abs=6e-4)
    waves = rows(browser, "explained-waves")
    assert [row[1] for row in waves] == [percent(share["signed"]) for share in answer["waves"].values()]
    assert waves[1][3] == f"{window['beats'] - window['failures'].get('QRS', 0)} of {window['beats']} beats"
    kinds = browser.run("[...document.querySelectorAll('#explained-leads .bar > span')].map(bar => bar.className)")
    assert kinds == ["lowers" if answer["leads"][lead]["signed"] < 0 else "raises" for lead in LEADS]
    assert len(rows(browser, "explained-cells")) == 12
    assert "not a diagnosis" in browser.text("#explained")
    assert browser.text("#explain") == browser.text("#stop") == ""

    select(browser, "layout", "full")
    sums_LN = {
        lead: np.array(drawn["attribution"]).reshape(-1, 20).sum(axis=1) for lead, drawn in window["leads"].items()
    }
    largest = max(np.abs(sums_N).max() for sums_N in sums_LN.values())
    for lead, paths in bands(browser).items():
        heights_N = np.zeros(250)
        for kind, sign in (("raises", 1), ("lowers", -1)):
            for x_mm, middle_mm, edge_mm in re.findall(r"M([\d.]+) ([\d.]+)V([\d.-]+)h1", paths[kind]):
                heights_N[int(x_mm) - 15] = (float(middle_mm) - float(edge_mm)) / 3.6
                assert np.sign(heights_N[int(x_mm) - 15]) == sign
        np.testing.assert_allclose(heights_N, sums_LN[lead] / largest, atol=0.01)
    assert list(bands(browser)) == list(LEADS)
    assert "up and filled: this part raises the score" in browser.text("#paper-caption")
    browser.run("document.getElementById('band').click()")
    assert bands(browser) == {} and "raises" not in browser.text("#paper-caption")
    browser.size(390)
    assert browser.run("document.documentElement.scrollWidth") <= 390


def test_what_cannot_be_explained_is_said(
    browser: Browser, loaded: tuple[Registry, Metrics], url: str, tmp_path: Path, signal_mv_LT: np.ndarray
):
    """No score; no beat; and a service that makes no explanations."""
    choose(browser, write_csv(tmp_path / "flat.csv", LIMB_LEADS, np.zeros((6, 5000))))
    assert browser.text("#explain") == "" and "There is no score to explain." in browser.text("#explanation")
    hum_mv_LT = np.tile(0.2 * np.sin(2 * np.pi * 40 * np.arange(5000) / 500), (6, 1))
    choose(browser, write_csv(tmp_path / "hum.csv", LIMB_LEADS, hum_mv_LT))
    ask_for_explanation(browser)
    assert len(rows(browser, "explained-leads")) == 6
    assert "by lead only" in browser.text("#explained-notes")
    assert browser.text("#explained-waves-table") == browser.text("#explained-cells-table") == ""
    with answering(Service(*loaded)) as other:
        enter(browser, other)
        browser.run("document.getElementById('example').click()")
        finished(browser)
        assert ask_for_explanation(browser) == "The score was not explained."
        assert "explanations are switched off" in browser.text("#explain-error")
        assert browser.run("document.activeElement.id") == "explain"
    browser.requested.clear()
    enter(browser, url)


def test_an_explanation_can_be_stopped_and_a_busy_service_says_so(browser: Browser, url: str, explaining: Explaining):
    def post(_: int) -> int:
        files = [("files", ("a.csv", page_module.example_csv()))]
        return httpx.post(f"{url}/v1/explain/file?signal=false", files=files, timeout=600).status_code

    def until_there_are(count: int) -> None:
        while explaining.there != count:
            time.sleep(0.01)

    assert post(0) == 200
    browser.run("document.getElementById('example').click()")
    finished(browser)
    with ThreadPoolExecutor() as others:
        os.kill(explaining.pid, signal.SIGSTOP)
        try:
            waiting = [others.submit(post, 1)]
            until_there_are(1)
            browser.run("document.getElementById('explain').click()")
            until_there_are(2)
            assert browser.run("document.activeElement.id") == "stop"
            assert "Explaining the score" in browser.text("#explain-status")
            browser.press("Enter")
            browser.wait("document.getElementById('explain-status').textContent === 'Stopped.'")
            until_there_are(1)  # the service has noticed
            browser.run("document.getElementById('explain').click()")
            until_there_are(2)
            browser.run("document.getElementById('status').textContent = ''")
            browser.run("document.getElementById('example').click()")  # another recording ends it, too
            assert finished(browser) == "1 scored, 0 refused."
            assert browser.text("#explain") == "Explain this score" and browser.text("#explain-status") == ""
            until_there_are(1)
            waiting += [others.submit(post, 1) for _ in range(4)]
            until_there_are(5)
            assert ask_for_explanation(browser) == "The score was not explained."
            said = browser.text("#explain-error")
            assert said.startswith("too many explanations at once: try again later (HTTP 503) Try again in ")
        finally:
            os.kill(explaining.pid, signal.SIGCONT)
        assert {one.result() for one in waiting} == {200}
    assert ask_for_explanation(browser) == "The score is explained below."
    assert browser.text("#explain-error") == ""


def test_what_is_dropped_anywhere_is_scored(browser: Browser):
    browser.run(
        "fetch('page/example.csv').then(answer => answer.blob()).then(content => {"
        "const dataTransfer = new DataTransfer(); dataTransfer.items.add(new File([content], 'dropped.csv'));"
        "const drop = new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true});"
        "document.querySelector('footer').dispatchEvent(drop); return drop.defaultPrevented})"
    )
    assert finished(browser) == "1 scored, 0 refused."
    assert browser.text("#result-heading") == "dropped.csv"
    assert browser.text("#simulated") == ""  # a person's file, as far as the page knows


def test_the_two_files_of_a_wfdb_recording_are_one(
    browser: Browser, url: str, tmp_path: Path, signal_mv_LT: np.ndarray
):
    counts_TL = np.round(signal_mv_LT.T * 1000).astype("<i2")
    for stem, signals in (("same", "same"), ("header", "other")):
        lines = [f"{signals}.dat 16 1000/mV 16 0 {counts_TL[0, k]} 0 0 {lead}" for k, lead in enumerate(LEADS)]
        lines = [line.replace(" 0 0 ", f" {counts_TL[:, k].sum(dtype=int) % 65536} 0 ") for k, line in enumerate(lines)]
        (tmp_path / f"{stem}.hea").write_text("\n".join([f"{stem} 12 500 5000", *lines]) + "\n")
        (tmp_path / f"{signals}.dat").write_bytes(counts_TL.tobytes())
    given = [tmp_path / name for name in ("same.dat", "header.hea", "same.hea", "other.dat")]
    assert choose(browser, *given) == "2 scored, 0 refused."
    rows = browser.run(
        "[...document.querySelectorAll('#recordings-rows tr')].map(row => row.innerText.split('\\t')[0].trim())"
    )
    assert sorted(rows) == ["header.hea", "same.hea"]
    assert choose(browser, tmp_path / "same.hea") == "0 scored, 1 refused."
    assert "same.dat" in browser.text("#refused")


def test_the_rest_of_a_longer_recording_is_a_button_away(browser: Browser, tmp_path: Path, signal_mv_LT: np.ndarray):
    longer_mv_LT = np.concatenate([signal_mv_LT[:, :5000], signal_mv_LT[:, ::-1], signal_mv_LT[:, :2500]], axis=1)
    choose(browser, write_csv(tmp_path / "longer.csv", LEADS, longer_mv_LT))
    seen = []
    for start in (0, 5000, 7500):  # the last page is full too
        seen.append(browser.text("#span"))
        rhythm_mv = longer_mv_LT[1, start : start + 5000]
        y_mm = drawn(browser)[-1]["mm_2N"][1][:5000]
        np.testing.assert_allclose(y_mm - y_mm[0], -10 * (rhythm_mv - rhythm_mv[0]), atol=0.012)
        browser.run("document.getElementById('later').click()")
    assert seen == ["0–10 s of 25 s", "10–20 s of 25 s", "15–25 s of 25 s"]
    assert browser.run("document.getElementById('later').disabled")
    select(browser, "layout", "full")
    assert [trace["lead"] for trace in drawn(browser)] == list(LEADS)


def test_what_leaves_the_paper_is_said(browser: Browser, tmp_path: Path, signal_mv_LT: np.ndarray):
    wild_mv_LT = signal_mv_LT.copy()
    wild_mv_LT[7, 2600:2610] = 6.0
    choose(browser, write_csv(tmp_path / "wild.csv", LEADS, wild_mv_LT))
    assert "V2: beyond the paper, cut off here at 4 mV." in browser.text("#paper-caption")
    tops = browser.run("[...document.querySelectorAll('#paper svg svg')].map(row => row.getAttribute('overflow'))")
    assert set(tops) == {"hidden"}


def test_a_token_is_asked_for_used_and_not_kept(browser: Browser, loaded: tuple[Registry, Metrics], url: str):
    with answering(Service(*loaded, tokens=Tokens({TOKEN}))) as guarded:
        enter(browser, guarded)
        browser.run("document.getElementById('example').click()")
        assert finished(browser) == "Nothing was scored."
        asks = "This service asks for an access token. Enter it in the field “Access token” above."
        assert browser.text("#error") == browser.text("#served") == asks
        browser.type("#token", f"{TOKEN}-mistyped")
        wrong = "This service does not accept that access token. Check it, and enter it again"
        browser.wait("document.getElementById('served').textContent.includes('does not accept')")
        assert browser.text("#served").startswith(wrong)
        browser.type("#token", TOKEN)
        browser.wait("document.getElementById('served').textContent.includes('ph-12L')")
        browser.run("document.getElementById('example').click()")
        assert finished(browser) == "1 scored, 0 refused."
        assert browser.text("#error") == ""
        kept = browser.run("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
        assert json.loads(kept) == [{}, {}, "", f"{guarded}/"]
        assert not [address for address in browser.requested if TOKEN in address]
        enter(browser, guarded)
        assert browser.run("document.getElementById('token').value") == ""
    browser.run("document.getElementById('example').click()")  # the service has gone
    browser.wait("document.getElementById('error').textContent")
    assert "The service does not answer" in browser.text("#error")
    browser.requested.clear()
    enter(browser, url)


def test_the_services_own_words_are_shown_where_it_takes_nothing(
    browser: Browser, loaded: tuple[Registry, Metrics], url: str, tmp_path: Path
):
    with answering(Service(*loaded, max_body=1000)) as small:
        enter(browser, small)
        (tmp_path / "large.csv").write_text("I\n" + "0\n" * 5000)
        assert choose(browser, tmp_path / "large.csv") == "Nothing was scored."
        assert browser.text("#error") == "large: the body has more than 1000 bytes: send fewer recordings (HTTP 413)"
    browser.requested.clear()
    enter(browser, url)


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_the_page_fits_a_window_of_this_width(browser: Browser, width: int, tmp_path: Path, signal_mv_LT: np.ndarray):
    browser.size(width)
    paths = [write_csv(tmp_path / f"{'long' * 15}{k}.csv", LEADS, signal_mv_LT) for k in range(2)]
    choose(browser, *paths)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelector('#paper svg').getBoundingClientRect().width") > 1000  # it scrolls within


@pytest.mark.shared_data
def test_a_real_recording_is_drawn_as_its_file_has_it(browser: Browser, url: str, shared_data: Path):
    header = min((shared_data / "ptbxl500" / "records500").rglob("*.hea"))
    files = (header, header.with_suffix(".dat"))
    assert choose(browser, *files) == "1 scored, 0 refused."
    assert browser.text("#score") == f"{score(url, *files)[0]['score']:.3f}"
    import wfdb

    signals_mv_TL, fields = wfdb.rdsamp(str(header.with_suffix("")))
    rows = dict(zip([name.upper() for name in fields["sig_name"]], signals_mv_TL.T, strict=True))
    strip = drawn(browser)[-1]
    assert strip["lead"] == "II"
    y_mm = strip["mm_2N"][1]
    np.testing.assert_allclose(y_mm - y_mm[0], -10 * (rows["II"] - rows["II"][0]), atol=0.012)
