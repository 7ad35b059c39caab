"""The benchmarks that need servers run to the end and give the rows of docs/performance.md. Speed is not tested."""

import json
import math

import pytest
import torch
from benchmarks.model import SIZES, model_work
from benchmarks.parts import parts_of, show_parts
from support.session import workflow

from lsemvae.models.lsemvae import LSEMVAE


def test_the_parts_of_a_step_are_the_whole_step(capsys):
    config = SIZES["smoke"]
    model, x_BLT = LSEMVAE(config), torch.randn(2, 12, config.samples)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    parts = parts_of(model, optimizer, x_BLT, torch.float32)
    assert sum(part.flops for part in parts) == model_work(config, 2, 1, True, 4)[0]
    show_parts(parts, 1.0, 2, flops_s=1e3, bytes_s=1e30, device="cpu")
    show_parts(parts[3:], 1.0, 2, flops_s=1e30, bytes_s=1e3, device="cpu")
    shown = [line.rsplit("%", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("part of")]
    assert [line.split("  ")[0] for line, _ in shown] == [part.name for part in (*parts, parts[3])]
    assert [bound.strip() for _, bound in shown[:3]] == ["matrix products"] * 3
    assert shown[4][1].strip() == "memory"
    assert all(parameter.grad is not None for parameter in model.parameters())  # the parts are all of the model


def test_shifts_are_measured_against_explicit_ones(tmp_path):
    path = tmp_path / "rows.json"
    done = workflow("bench", "features", "--size", "smoke", "--batch", 2, "--rounds", 1, "--json", path, alone=True)
    rows = json.loads(path.read_text())["rows"]
    cases = [f"all shifts by FFT, against {count}" for count in (8, 16)]
    assert [row["case"] for row in rows] == [*cases, *(f"{count} shifts, against one" for count in (2, 4, 8))]
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 and row["case"] in done.stdout for row in rows)


def test_finetune_is_measured_against_the_encoder_in_every_epoch(tmp_path):
    """It checks that both ways give the same scores."""
    path = tmp_path / "rows.json"
    done = workflow(
        "bench", "finetune", "--size", "smoke", "--records", 40, "--epochs", 2, "--measured", 1, "--rounds", 1,
        "--threads", 1, "--json", path, alone=True,
    )  # fmt: skip
    rows = json.loads(path.read_text())["rows"]
    case, how = "five folds x 2 epochs, 40 recordings", " (measured 1 of 2 epochs, x 2/1)"
    assert [row["case"] for row in rows] == [f"{case}, {way}{how}" for way in ("the paper's modules", "our encoder")]
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 and row["case"] in done.stdout for row in rows)
    assert done.stdout.count("the scores differ by") == 2


def test_truth_is_measured_against_shuffled_labels(tmp_path):
    path = tmp_path / "rows.json"
    done = workflow(
        "bench", "truth", "--size", "smoke", "--overload", "T", "--subjects", 24, "--tested", 24, "--hearts", 2,
        "--truth-hearts", 4, "--shuffles", 2, "--threads", 1, "--json", path, alone=True,
    )  # fmt: skip
    rows = json.loads(path.read_text())["rows"]
    evidence = [f"T: evidence in {part}" for part in ("P", "QRS", "ST", "T", "all")]
    assert [row["case"] for row in rows][:7] == ["T: AUROC above 0.5", *evidence, "T: attribution and truth"]
    assert all(math.isfinite(row["ours"]) and row["case"] in done.stdout for row in rows)
    assert done.stdout.count("shuffled labels, mean over seeds") == len(rows)


def test_explain_is_measured_against_captums_loop(tmp_path):
    """It checks that both give the same attributions."""
    path = tmp_path / "rows.json"
    done = workflow(
        "bench", "explain", "--size", "smoke", "--batch", 2, "--looped", 1, "--rounds", 1, "--json", path, alone=True
    )
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == ["explain smoke b2, 50 points", "explain smoke b2, default settings"]
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 and row["case"] in done.stdout for row in rows)
    assert done.stdout.count("points a recording") == 2


@pytest.mark.ray
def test_serve_is_measured_against_each_baseline(tmp_path):
    path = tmp_path / "rows.json"
    done = workflow(
        "bench", "serve", "--size", "smoke", "--leads", "6", "--clients", 1, 4, "--shares", 0.05, "--rounds", 1,
        "--seconds", 0.5, "--json", path, alone=True,
        RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="0",  # nobody waits for an answer when it ends
    )  # fmt: skip
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    for clients in (1, 4):
        for form in ("", " json"):
            assert f"bare c{clients}{form}" in rows
            for baseline in ("fastapi", "mlflow"):
                for quantile in ("", " p50", " p95", " p99"):
                    assert f"{baseline} c{clients}{form}{quantile}" in rows
    assert len({case for case in rows if case.startswith("fastapi r")}) == 4  # the open loop
    for case, row in rows.items():
        pair = (row["ours"], row["baseline"])
        assert all(math.isfinite(value) and value > 0 for value in pair), case
        assert row["ratio"] == pytest.approx(pair[1] / pair[0] if row["unit"] == "ms" else pair[0] / pair[1])
        assert case in done.stdout


@pytest.mark.ray
def test_checks_are_measured_against_a_random_order(shards, tmp_path):
    path = tmp_path / "rows.json"
    done = workflow(
        "bench", "checks", "--size", "smoke", "--data", shards, "--task", "ph", "--checked", 2, "--cell-s", 5,
        "--shuffle", 0, "--threads", 1, "--plot", tmp_path / "curves.png", "--json", path, alone=True,
    )  # fmt: skip
    rows = json.loads(path.read_text())["rows"]
    orders = ("attribution", "occlusion")
    assert [row["case"] for row in rows] == [f"ph: {kind}, {of}" for kind in ("deletion", "insertion") for of in orders]
    assert all(math.isfinite(row["ratio"]) and row["case"] in done.stdout for row in rows)
    assert "head.fc2" in done.stdout and (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.ray
def test_score_is_measured_against_the_bare_loop(ray_cluster, tmp_path):
    path = tmp_path / "rows.json"
    workflow("bench", "score", "--records", 48, "--actors", 1, "--json", path, alone=True)
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == [
        case
        for kind in ("shards", "xml")
        for case in (
            f"score {kind}, warm", f"score {kind}, 4 x, warm", f"score {kind}, with start-up",
            f"score {kind}, 4 x, with start-up", f"peak memory {kind}, 4 x and 1 x",
        )
    ]  # fmt: skip
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in rows)


@pytest.mark.ray
def test_the_cache_is_measured_at_the_pace_of_a_device(shards, tmp_path):
    path = tmp_path / "rows.json"
    rates = (200.0, 1e9)
    done = workflow(
        "bench", "pace", "--data", shards, "--recipe", "smoke", "--records-per-s", *rates, "--rounds", 1,
        "--json", path, alone=True,
    )  # fmt: skip
    slow, fast = json.loads(path.read_text())["rows"]
    assert (slow["baseline"], fast["baseline"]) == rates
    assert 0 < slow["ours"] <= 200
    assert slow["ratio"] > fast["ratio"] > 0  # no feed is as fast as the second device
    assert "an epoch begins after" in done.stdout


@pytest.mark.shared_data
def test_waves_are_measured_against_the_experts(shared_data, tmp_path):
    path = tmp_path / "rows.json"
    done = workflow("bench", "waves", "--data", shared_data / "ludb", "--limit", 1, "--json", path, alone=True)
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    for leads in ("12 leads", "6 limb leads", "lead I"):
        assert f"{leads}, time of a recording" in rows
        for wave in ("P", "QRS", "T"):
            assert 0 < rows[f"{leads}, {wave} sensitivity"]["ours"] <= 1
            assert all(f"{leads}, {wave} {edge}, SD of the error" in rows for edge in ("onset", "peak", "offset"))
        for side in ("ours", "NeuroKit2 prominence"):
            assert f"{leads}, {side}: no beat in 0 of 1 recordings" in done.stdout


def test_a_folder_that_is_not_ludb_is_named(tmp_path):
    done = workflow("bench", "waves", "--data", tmp_path, check=False)
    assert done.returncode == 2 and f"{tmp_path}/data has no 2.hea" in done.stderr
