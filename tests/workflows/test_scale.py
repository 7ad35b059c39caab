"""workflows/scale.py and docs/scale.md: the arithmetic, and whether the document shows the command's output."""

import re
import shlex
from dataclasses import replace
from math import ceil

import pytest
import scale
from hypothesis import given, settings
from hypothesis import strategies as st
from support.readme import parse_command
from support.session import ROOT

from lsemvae.errors import LsemvaeError

DOCUMENT = (ROOT / "docs" / "scale.md").read_text()
COMMANDS = re.findall(r"^```sh\n(python workflows/scale\.py.*)\n```", DOCUMENT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_document_shows_what_the_command_prints(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_command(shlex.split(command))
    scale.main(args)
    shown = DOCUMENT.split(f"{command}\n```\n\n")[1]
    assert shown.startswith(capsys.readouterr().out)


def test_document_works_through_the_three_runs() -> None:
    runs = [parse_command(shlex.split(command)) for command in COMMANDS]
    assert [(run.records, run.epochs, run.gpus) for run in runs] == [
        (800_035, 100, 1), (800_035, 100, 8), (10_000_000, 100, 64)
    ]  # fmt: skip


def test_document_says_what_is_not_measured() -> None:
    assert "**No A100 has been measured, one H100 has.**" in DOCUMENT
    assert not re.search(r"[$€]\s?\d|\d\s?(USD|EUR|dollars)", DOCUMENT)  # the document invents no price


def test_figures_beside_the_tables_follow_from_them() -> None:
    """Compute the numbers in the text again."""
    weights = scale.parameters()
    one, eight, many = (parse_command(shlex.split(command)) for command in COMMANDS)
    assert f"{weights:,} parameters" in DOCUMENT
    sent = scale.exchanged_bytes(8, 4)
    assert f"| gradients in bf16, torch's compression hook | {sent / 2e9:.2f} GB" in DOCUMENT
    largest = 12 * 64 * 5000 // 8 * 256  # the weight of the means' heads, or of the log-variances'
    assert f"({largest:,} numbers each)" in DOCUMENT and f"{2 * largest / weights:.0%}".replace("%", " %") in DOCUMENT
    assert f"| {(sent + 4 * weights) / 1e9:.2f} GB | {(12 * weights + 28 * largest) / 1e9:.2f} GB |" in DOCUMENT
    assert (
        f"needs {(8 * weights + 8 * largest) / 1e9:.2f} GB" in DOCUMENT
        and f"{4 * weights / 1e9:.2f} GB more" in DOCUMENT
    )
    assert f"| {1.5 * sent / 1e9:.2f} GB | {(12 + 28 / 8) * weights / 1e9:.2f} GB |" in DOCUMENT
    assert f"({16 * weights / 1e9:.2f} to {16 * weights / 8e9:.2f} GB)" in DOCUMENT
    steps = (eight.records * 100 / 1024, many.records * 100 / 8192)
    total = (steps[0] * sent / 1e12, steps[1] * scale.exchanged_bytes(64, 4) / 1e12)
    assert f"| {total[0]:.0f} TB | {total[1]:.0f} TB |" in DOCUMENT
    assert f"| {12 * weights * 100 / 1e9:.0f} GB | {12 * weights * 100 / 1e9:.0f} GB |" in DOCUMENT
    for batch in (128, 1024, 8192):
        rate = scale.plan(eight, batch, 0.3).records_per_s
        assert f"| batch {batch} | {rate:,.0f} | {ceil(rate / 96):,} |" in DOCUMENT
    hours = [scale.plan(run, batch, 0.3).hours for run, batch in ((one, 128), (eight, 1024), (many, 8192))]
    assert "| {:.2f} (batch 128) | {:.2f} (batch 1024) | {:.2f} (batch 8192) |".format(*hours) in DOCUMENT
    assert f"| {hours[0]:.2f} | {hours[1]:.2f} | {hours[2] * 8:.1f} |" in DOCUMENT
    slow = scale.plan(replace(many, node_link_gbit_s=100.0), 8192, 0.3)
    assert f"gives {slow.exchange_s * 1e3:.0f} ms" in DOCUMENT
    measured_per_s = float(re.search(r"([\d.]+) recordings/s in training", DOCUMENT)[1])
    assert re.search(rf"train step b64, rate +{measured_per_s}", (ROOT / "docs" / "performance.md").read_text())
    assert f"take {one.records * 100 / measured_per_s / 3600:.0f} hours" in DOCUMENT
    performance = (ROOT / "docs" / "performance.md").read_text()
    hours = []
    for batch, rate in ((128, "9393"), (1024, "1.868e+04")):
        assert f"train step b{batch}, rate" in performance
        assert re.search(rf"train step b{batch}, rate +{re.escape(rate)}", performance)
        hours.append(one.records * 100 / float(rate) / 3600)
        assert f"| H100, batch {batch}, measured | {float(rate):,.0f} | {ceil(float(rate) / 984)} |" in DOCUMENT
    assert "take it {:.2f} and {:.2f} hours".format(*hours) in DOCUMENT


def test_links_of_the_document_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", DOCUMENT)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link


def test_a_ring_sends_twice_the_gradients_but_for_one_share() -> None:
    size = 4 * scale.parameters()
    assert scale.exchanged_bytes(1, 4) == 0
    assert scale.exchanged_bytes(2, 4) == size
    assert scale.exchanged_bytes(8, 4) == pytest.approx(1.75 * size)
    assert scale.exchanged_bytes(8, 2) == pytest.approx(0.875 * size)


def test_a_slower_link_counts_only_between_nodes() -> None:
    slow = scale.Args(gpus=8, node_link_gbit_s=1.0)
    assert scale.plan(slow, 128, 0.5) == scale.plan(scale.Args(gpus=8), 128, 0.5)
    crossed = scale.plan(replace(slow, gpus=16), 128, 0.5)
    assert crossed.exchange_s == pytest.approx(scale.exchanged_bytes(16, 4) / 125e6)


@settings(max_examples=30, deadline=None)
@given(gpus=st.integers(1, 128), batch=st.integers(1, 20_000), share=st.floats(0.01, 0.99))
def test_no_row_beats_its_bounds(gpus: int, batch: int, share: float) -> None:
    args = scale.Args(gpus=gpus)
    if batch < gpus:
        with pytest.raises(LsemvaeError, match="give each GPU at least one recording"):
            scale.plan(args, batch, share)
        return
    row, bound = scale.plan(args, batch, share), scale.plan(args, batch, 1.0)
    assert row.records_per_s < bound.records_per_s
    # The arithmetic alone, and one reading of the weights, on all GPUs together.
    assert bound.records_per_s <= gpus * args.matrix_tflops * 1e12 / 2.0e9
    assert bound.gpu_s > 4 * scale.parameters() / 1.555e12
    assert row.hours * row.records_per_s * 3600 == pytest.approx(args.records * args.epochs)


def test_cores_appear_once_the_feed_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(scale.Args(batch=(128,), share=(1.0,)))
    assert "| not measured |" in capsys.readouterr().out
    scale.main(scale.Args(batch=(128,), share=(1.0,), feed_records_per_core_s=1000.0))
    rate = scale.plan(scale.Args(), 128, 1.0).records_per_s
    assert capsys.readouterr().out.strip().endswith(f"| {ceil(rate / 1000)} |")


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_beyond_the_peak_is_refused(share: float) -> None:
    with pytest.raises(LsemvaeError, match="0 < share <= 1"):
        scale.plan(scale.Args(), 128, share)
