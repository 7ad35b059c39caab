"""A registered version is an MLflow model: whatever loads it through MLflow gets the endpoint's scores."""

import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
import servers
import torch
import yaml
from support import bundles, serving
from support.readme import blocks
from support.session import end_group, wait_for

from lsemvae import __version__, mlmodel
from lsemvae.bundle import CONFIG, WEIGHTS, Scorer, load
from lsemvae.cohorts.simulated import CohortConfig, simulate_cohort
from lsemvae.formats import read
from lsemvae.leads import LIMB_LEADS
from lsemvae.mlmodel import CODE, PACKAGES
from lsemvae.preprocess import preprocess
from lsemvae.tracking import CHAMPION, Run
from serve.api import make_api
from serve.observed import Metrics
from serve.registry import Registry
from serve.security import Tokens
from serve.service import Service

NAME = "mlflow-6L"
URI = f"models:/{NAME}@{CHAMPION}"
MLFLOW = [sys.executable, "-m", "mlflow", "models"]


@pytest.fixture(scope="module")
def registered(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The champion's bundle, and beside it the encoder's, which is registered as `mlflow-encoder`."""
    folder = tmp_path_factory.mktemp("registered")
    bundles.save(folder / "model")
    bundles.save(folder / "encoder", bundles.SMALL)
    for name, of in ((NAME, "model"), ("mlflow-encoder", "encoder")):
        run = Run.start("models", name, {})
        run.bundle(folder / of)
        run.register(name, {}, CHAMPION)
        run.end()
    mlflow.set_tracking_uri(mlflow_server)
    return folder / "model"


@pytest.fixture(scope="module")
def asked() -> list[dict]:
    """Whole recordings, one without a lead, one with a gap, and two that are refused."""
    asked = [serving.as_json(record, LIMB_LEADS) for record in bundles.records(6, seed=7)]
    del asked[1]["leads"]["III"], asked[1]["leads"]["aVF"]
    asked[2]["leads"]["II"][300:400] = [None] * 100
    asked[3]["rate_hz"] = 250.0
    asked[4]["rate_hz"] = 50.0
    asked[5]["leads"]["I"].pop()
    return asked


@pytest.fixture(scope="module")
def expected(registered: Path, asked: list[dict], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The endpoint's answers: it serves the champion."""
    registry = Registry([URI], tmp_path_factory.mktemp("kept"), 0)
    assert registry.problems == {}
    api = make_api(Service(registry, Metrics(), tokens=Tokens({serving.TOKEN})))
    return [serving.only(serving.score(api, one)) for one in asked]


def as_rows(asked: list[dict]) -> list[dict]:
    """A lead that was not recorded is null: of an absent name pandas makes NaN, which MLflow takes for no array."""
    return [{**dict.fromkeys(LIMB_LEADS), **one["leads"], "rate_hz": one["rate_hz"]} for one in asked]


def as_request(asked: list[dict]) -> str:
    return json.dumps({"dataframe_records": as_rows(asked)})


def require_equal(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    assert [bool(answer["refused"]) for answer in expected] == [False] * 4 + [True] * 2
    for one, answer in zip(found, expected, strict=True):
        if answer["refused"]:
            assert one["refused"] == answer["refused"]["code"] and one["reason"] == answer["refused"]["reason"]
            assert pd.isna(one["score"]) and pd.isna(one["probability"])
        else:
            assert one["refused"] == one["reason"] == ""
            assert one["score"] == pytest.approx(answer["score"], abs=1e-5)
            assert one["probability"] == pytest.approx(answer["probability"], abs=1e-5)
            assert (one["score"] >= one["threshold"]) == answer["decision"]


def test_load_model_gives_the_scores_of_the_endpoint(registered: Path, asked: list[dict], expected: list[dict]):
    model = mlflow.pyfunc.load_model(URI)
    frame = pd.DataFrame(as_rows(asked))
    require_equal(model.predict(frame).to_dict("records"), expected)
    in_arrays = frame.map(lambda cell: np.array(cell, dtype=np.float32) if isinstance(cell, list) else cell)
    require_equal(model.predict(in_arrays).to_dict("records"), expected)
    without = model.predict(frame[1:2].drop(columns=["III", "aVF"]))
    assert without["score"].tolist() == pytest.approx([expected[1]["score"]], abs=1e-5)
    refused = model.predict(frame[4:])
    assert [refused[name].dtype for name in ("score", "probability")] == ["float64", "float64"]
    assert model.metadata.get_input_schema().input_names() == [*LIMB_LEADS, "rate_hz"]
    (example,) = model.predict(model.input_example).to_dict("records")
    assert 0 < example["score"] < 1 and not example["refused"]


def test_the_readmes_lines_score_a_recording(registered: Path, tmp_path: Path):
    simulate_cohort(CohortConfig(subjects=1, seed=0, mean_studies=1.0), tmp_path)
    header = next(tmp_path.rglob("*.hea"))
    (code,) = (block for block in blocks("python") if "load_model" in block)
    code = code.replace("models:/ph-6L@champion", URI).replace("recording.hea", str(header))
    found: dict = {}
    exec(code, found)
    assert found["answers"]["score"].tolist() == pytest.approx([Scorer(registered).score([read(header)])[0].score])


def test_the_encoder_is_a_model_that_embeds(registered: Path, asked: list[dict]):
    embeddings = mlflow.pyfunc.load_model(f"models:/mlflow-encoder@{CHAMPION}").predict(pd.DataFrame(as_rows(asked)))
    assert embeddings["refused"].tolist() == ["", "", "", "", "rate", "record"]
    assert embeddings["embedding"][4:].isna().all()
    bundle, encoder = load(registered.with_name("encoder"))
    prepared = preprocess(bundles.records(6, seed=7)[:1], bundle.leads, bundle.preprocess)
    with torch.inference_mode():
        h_BF = encoder.embed(torch.from_numpy(prepared.x_BLT), torch.from_numpy(prepared.lead_mask_BL))
    np.testing.assert_allclose(embeddings["embedding"][0], h_BF[0].numpy(), atol=1e-5)


def test_the_mlflow_commands_give_the_scores_of_the_endpoint(
    registered: Path, asked: list[dict], expected: list[dict], tmp_path: Path
):
    (tmp_path / "asked.json").write_text(as_request(asked))
    port, log = servers.free_port(), tmp_path / "serve.log"
    model = ["--model-uri", URI, "--env-manager", "local"]
    with log.open("w") as stream:
        server = subprocess.Popen(
            [*MLFLOW, "serve", *model, "--port", str(port), "--workers", "1"],
            stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    try:
        files = ["--input-path", str(tmp_path / "asked.json"), "--output-path", str(tmp_path / "found.json")]
        done = subprocess.run([*MLFLOW, "predict", *model, *files], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        require_equal(json.loads((tmp_path / "found.json").read_text())["predictions"], expected)
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/ping", server, log)
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{url}/invocations", content=as_request(asked), headers=headers, timeout=60)
        require_equal(json.loads(answer.text)["predictions"], expected)
    finally:
        end_group(server)


def test_a_spark_udf_gives_the_scores_of_the_endpoint(
    registered: Path, asked: list[dict], expected: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("pyspark", reason="pyspark is not here: install the extra `spark`, and Java 17")
    from pyspark.sql import SparkSession
    from pyspark.sql import types as of
    from pyspark.sql.functions import struct

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    columns = [*LIMB_LEADS, "rate_hz"]
    kinds = [of.ArrayType(of.DoubleType())] * len(LIMB_LEADS) + [of.DoubleType()]
    schema = of.StructType([of.StructField(name, kind) for name, kind in zip(columns, kinds, strict=True)])
    settings = {"spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1", "spark.sql.warehouse.dir": str(tmp_path)}
    spark = SparkSession.builder.master("local[1]").config(map=settings).getOrCreate()
    try:
        rows = [tuple(row.get(name) for name in columns) for row in as_rows(asked)]
        score = mlflow.pyfunc.spark_udf(spark, URI, env_manager="local")
        answers = spark.createDataFrame(rows, schema).select(score(struct(*columns)).alias("found")).select("found.*")
        require_equal([row.asDict() for row in answers.collect()], expected)
    finally:
        spark.stop()


def test_a_version_holds_named_files_and_no_pickle(registered: Path, tmp_path: Path):
    folder = Path(mlflow.artifacts.download_artifacts(URI, dst_path=str(tmp_path)))
    found = {path.name for path in folder.rglob("*")}
    assert found == mlmodel.FILES
    assert {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)} == {
        name: (registered / name).read_bytes() for name in (CONFIG, WEIGHTS)
    }
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert list(described["flavors"]) == ["python_function"]
    assert "pickle" not in json.dumps(described) and described["flavors"]["python_function"]["model_code_path"] == CODE
    assert described["metadata"]["lsemvae"] == __version__


LOADED = f"""
import runpy, sys
try:
    runpy.run_path({str(Path(mlmodel.__file__).with_name(CODE))!r})
except Exception as error:
    assert "is no bundle" in str(error), error  # there is none beside it
print(*[module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "lsemvae"], sep="\\n")
"""


def test_the_requirements_pin_what_the_models_code_imports(tmp_path: Path):
    mlmodel.write_model(bundles.save(tmp_path / "bundle"), tmp_path)
    first, *pins = (tmp_path / "requirements.txt").read_text().splitlines()
    assert pins == [f"{name}=={metadata.version(name).partition('+')[0]}" for name in PACKAGES]
    assert first.startswith("#") and __version__ in first and "://" not in first
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set()
    for path in map(Path, [*done.stdout.split(), Path(mlmodel.__file__).with_name(CODE)]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                imported |= {name.split(".")[0] for name in names}
    assert imported - set(sys.stdlib_module_names) - {"lsemvae"} <= set(PACKAGES)
