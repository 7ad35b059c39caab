"""EchoNext and MIMIC-IV-ECHO: labels of what was measured, null where nothing was, and every oddity said in words."""

import gzip
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pytest
from support.echo_files import (
    MEASUREMENT_COLUMNS,
    SIZES,
    echonext_csv,
    measurements_csv,
    record_list,
    rows,
    write_echonext,
    write_sparse,
)

from lsemvae.cohorts import COHORTS, detect, mimic_iv_echo, select
from lsemvae.cohorts.mimic_iv_echo import EchoOptions, right_atrial_pressure_mmhg
from lsemvae.data.ingest import Job, make_plan, make_shard
from lsemvae.data.reading import read_or_reason
from lsemvae.data.shards import MANIFEST, SCHEMA, Manifest, Shard, ShardedDataset, unpack
from lsemvae.errors import LsemvaeError
from lsemvae.formats.echonext import NOMINAL_MV
from lsemvae.storage import Storage


def labels_of(table: pd.DataFrame) -> dict[str, list[float | None]]:
    columns = [name for name in table.columns if name.startswith("label.")]
    assert all(table[name].dtype == np.float64 for name in columns)
    return {name.removeprefix("label."): [None if np.isnan(v) else v for v in table[name]] for name in columns}


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.message for record in caplog.records)


def mistake(root: Path, name: str = "auto") -> str:
    with pytest.raises(LsemvaeError) as caught:
        select(Storage.open(root), name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- EchoNext -----------------------------------------------------------------------------------------------

PASP, FLAG = "pasp_value", "pasp_gte_45_flag"
TR, TR_FLAG = "tr_max_velocity_value", "tr_max_gte_32_flag"
RV, RV_FLAG = "rv_systolic_function_value", "rv_systolic_dysfunction_moderate_or_greater_flag"


@pytest.mark.parametrize("table", ["echonext_metadata_100k.csv", "EchoNext_metadata_100k.csv"])
def test_an_ecg_is_the_row_that_is_its_place_in_its_split(tmp_path: Path, table: str):
    listed = rows()
    listed = [listed[i] for i in np.random.default_rng(0).permutation(len(listed))]  # the splits are mixed
    arrays = write_echonext(tmp_path, listed, table=table)
    storage = Storage.open(tmp_path)
    assert detect(storage) == "echonext"
    chosen = select(storage)
    assert (chosen.name, chosen.left_out) == ("echonext", [])
    assert chosen.table["record_id"].tolist() == [row["ecg_key"] for row in listed]  # text, with its zeros
    assert chosen.table["subject_id"].tolist() == [row["patient_key"] for row in listed]
    numbers = {"train": 0, "val": 1, "test": 2, "no_split": None}
    assert labels_of(chosen.table)["split"] == [numbers[str(row["split"])] for row in listed]
    seen = dict.fromkeys(SIZES, 0)
    for path, row in zip(chosen.table["path"], listed, strict=True):
        record = read_or_reason(storage, path, lambda record: record)
        expected = arrays[str(row["split"])][seen[str(row["split"])], 0].T * NOMINAL_MV
        np.testing.assert_allclose(record.signal_mv_LT, expected, rtol=1e-6, atol=1e-7)
        seen[str(row["split"])] += 1
    assert seen == SIZES


def test_a_flag_is_no_label_where_nothing_was_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    measured = {
        1: {PASP: 45, FLAG: 1, TR: 3.2, TR_FLAG: 1, RV: "moderately reduced", RV_FLAG: 1},
        2: {PASP: 36.5, FLAG: 0, TR: 2.1, TR_FLAG: 0, RV: "normal", RV_FLAG: 0},
        3: {PASP: "30", FLAG: 0, RV: "mildly reduced", RV_FLAG: 0},
        4: {FLAG: 1, TR_FLAG: 1, RV: "presumed none", RV_FLAG: 0},  # no value: no label, whatever the flag
        5: {PASP: 60, FLAG: 0, TR: 2.0, TR_FLAG: 1, RV: "severely reduced", RV_FLAG: 0},  # contradictions
        6: {PASP: -1, FLAG: 0, TR: "unknown", TR_FLAG: 0, RV: "grade 4", RV_FLAG: 1},  # another word for a grade
        7: {PASP: 0, TR: 320, RV: "not well seen", RV_FLAG: 0},
        8: {RV: "3", RV_FLAG: 1},
    }
    write_echonext(tmp_path, rows(measured=measured))
    labels = labels_of(select(Storage.open(tmp_path)).table)
    none = [None] * 3
    assert labels["pasp_ge_45"] == [None, 1, 0, 0, None, 1, None, None, None, *none]
    assert labels["elevated_pasp_35"] == [None, 1, 1, 0, None, 1, None, None, None, *none]
    assert labels["pasp_mmhg"] == [None, 45, 36.5, 30, None, 60, None, None, None, *none]
    assert labels["tr_velocity_ge_3_2"] == [None, 1, 0, None, None, 0, None, None, None, *none]
    assert labels["rv_dysfunction"] == [None, 1, 0, 0, None, 1, 1, None, 1, *none]
    said = messages(caplog)
    for flag, value in ((FLAG, PASP), (TR_FLAG, TR), (RV_FLAG, RV)):
        assert f"{flag} contradicts {value} in 1 rows; the value is used" in said
        assert f"{flag} has no measured {value} in " in said
    assert "2 values for pasp_mmhg are no number from 5 to 200, such as '-1.0'" in said
    assert "2 values for tr_velocity_m_s are no number from 0.5 to 7, such as 'unknown'" in said
    assert "00001" not in said  # no identifier


def test_sex_and_age_of_echonext(tmp_path: Path):
    measured = {0: {"sex": "Male", "age_at_ecg": 90}, 1: {"sex": "f", "age_at_ecg": ""}, 2: {"sex": "unknown"}}
    write_echonext(tmp_path, rows(measured=measured))
    labels = labels_of(select(Storage.open(tmp_path)).table)
    assert labels["female"][:4] == [0, 1, None, 1]
    assert labels["age_years"][:4] == [90, None, 61, 61]
    (tmp_path / "echonext_metadata_100k.csv").write_text(
        echonext_csv(rows(measured={n: {"sex": n % 2} for n in range(12)}))
    )
    assert labels_of(select(Storage.open(tmp_path)).table)["female"] == [1, 0] * 6  # 0 is a woman in this release


def test_a_part_of_echonext_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    write_echonext(tmp_path, splits=["val", "test"])
    table = select(Storage.open(tmp_path)).table
    assert len(table) == SIZES["val"] + SIZES["test"]
    assert table["path"][0] == "EchoNext_val_waveforms.npy#0"
    assert "7 of its 12 ECGs are in files that are not in the source" in messages(caplog)
    for file in tmp_path.glob("*.npy"):
        file.unlink()
    assert "has none of the files" in (said := mistake(tmp_path)) and "EchoNext_val_waveforms.npy" in said


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-n_bytes])


@pytest.mark.parametrize(
    ("file", "damage", "parts"),
    [
        ("EchoNext_val_waveforms.npy", lambda path: cut(path, 8), ["480120 bytes, its header declares 480128"]),
        ("EchoNext_val_waveforms.npy", lambda path: cut(path, 480_100), ["NPY header cannot be read"]),
        ("EchoNext_val_waveforms.npy", lambda path: np.save(path, np.zeros((3, 1, 2500, 12))),
         ["val_waveforms.npy has 3 rows", "lists 2 ECGs of the split val", "from the same release"]),
        ("EchoNext_val_waveforms.npy", lambda path: np.save(path, np.zeros((2, 1, 2500, 12), dtype="<i2")), ["int16"]),
        ("EchoNext_val_waveforms.npy", lambda path: np.save(path, np.zeros((2, 2500, 12))), ["shape (2, 2500, 12)"]),
        ("EchoNext_val_waveforms.npy", lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
         ["its numbers are object"]),
        ("echonext_metadata_100k.csv", lambda path: path.write_text(path.read_text().replace(FLAG, "flag")),
         ["echonext_metadata_100k.csv has no column pasp_gte_45_flag"]),
        ("echonext_metadata_100k.csv", lambda path: path.write_text(path.read_text().replace(",val,", ",valid,")),
         ["a split that is none of train, val, test, no_split"]),
        ("echonext_metadata_100k.csv", lambda path: path.write_text(path.read_text().replace("000003,", ",")),
         ["rows without ecg_key, patient_key, split"]),
        ("echonext_metadata_100k.csv", lambda path: path.write_text(path.read_text().replace("000003", "000004")),
         ["1 recordings have the id of another"]),
    ],
)  # fmt: skip
def test_mistakes_of_echonext_are_named(tmp_path: Path, file: str, damage: Callable[[Path], object], parts: list[str]):
    write_echonext(tmp_path)
    damage(tmp_path / file)
    said = mistake(tmp_path)
    assert all(part in said for part in parts), said


def test_choosing_from_files_of_many_gigabytes_loads_no_signal(tmp_path: Path):
    """Published sizes, as files whose zeros take no disk. (All 100,000 rows would only take longer.)"""
    sizes = {"val": 4_626, "test": 5_442}
    for split, count in sizes.items():
        write_sparse(tmp_path / f"EchoNext_{split}_waveforms.npy", count)
    (tmp_path / "echonext_metadata_100k.csv").write_text(echonext_csv(rows(sizes)))
    tracemalloc.start()
    try:
        table = select(Storage.open(tmp_path)).table
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(table) == 10_068 and table["path"].iloc[-1] == "EchoNext_test_waveforms.npy#5441"
    assert sum(path.stat().st_size for path in tmp_path.glob("*.npy")) > 2.4e9
    assert peak < 50e6


def test_echonext_becomes_shards_with_its_labels_and_its_mark(tmp_path: Path):
    arrays = write_echonext(tmp_path / "source", rows(measured={0: {PASP: 50, FLAG: 1}}))
    source, output = Storage.open(tmp_path / "source"), Storage.open(tmp_path / "shards")
    chosen = select(source)
    options = {"shard_records": 100, "val_share": 0.0, "seed": 0}
    table, (task,), plan = make_plan(chosen.table, chosen.name, source.uri, **options)
    names = [name.removeprefix("label.") for name in table.columns if name.startswith("label.")]
    summary = make_shard(task, table.to_dict("records"), Job(plan, source, output, names, None, threads=2))
    assert (summary["unreadable"], summary["flagged"]["no_millivolts"]) == ([], 12)
    shards = [Shard(**summary["shard"])]
    manifest = Manifest(source.uri, "echonext", plan, 12, 6, 0, {}, shards)
    output.write_bytes(MANIFEST, manifest.to_json().encode())
    stored = ShardedDataset.open(output.uri).read([*SCHEMA.names, "label.pasp_ge_45"]).to_pylist()
    found = {row["record_id"]: row for row in stored}
    assert found["000000"]["label.pasp_ge_45"] == 1 and found["000001"]["label.pasp_ge_45"] is None
    record = unpack(found["000006"])
    assert record.flags[0] == "no_millivolts" and record.subject_id == "00003"
    expected = arrays["val"][1, 0].T * NOMINAL_MV
    np.testing.assert_allclose(record.signal_mv_LT, expected, atol=np.abs(expected).max() / 32767)


@pytest.mark.server
def test_echonext_in_an_object_store(s3: str, tmp_path: Path):
    write_echonext(tmp_path, splits=["val"])
    for path in tmp_path.iterdir():
        boto3.client("s3").put_object(Bucket="ecg", Key=f"echo/{path.name}", Body=path.read_bytes())
    storage = Storage.open("s3://ecg/echo")
    chosen = select(storage)
    assert (chosen.name, len(chosen.table)) == ("echonext", 2)
    record = read_or_reason(storage, chosen.table["path"][1], lambda record: record)
    assert record.signal_mv_LT.shape == (12, 2500)


# --- MIMIC-IV-ECHO ------------------------------------------------------------------------------------------

ECGS = [
    ("10000032", "40000001", "2180-07-23 08:44:00"),
    ("10000032", "40000002", "2181-07-23 08:44:00"),
    ("10000117", "40000003", "2150-01-10 12:00:00"),
    ("10000999", "40000004", "2150-01-10 12:00:00"),
]


def mimic(root: Path, measured: str, name: str = "structured_measurement.csv") -> Storage:
    root.mkdir(parents=True, exist_ok=True)
    (root / "record_list.csv").write_text(record_list(ECGS))
    (root / name).write_bytes(gzip.compress(measured.encode()) if name.endswith(".gz") else measured.encode())
    return Storage.open(root)


MEASURED = [
    ("10000032", "2180-07-20 10:00:00", "tr_velocity", "3.4", "m/s"),
    ("10000032", "2180-07-20 10:00:00", "tr_velocity", "3.1", "m/s"),  # measured twice: the peak counts
    ("10000032", "2180-07-20 10:00:00", "ivc", ">2.1cm, >50% (10-15mmHg)", ""),
    ("10000032", "2180-07-20 10:00:00", "rv_function", "Moderate global RV hypo", ""),
    ("10000032", "2180-08-30 10:00:00", "tr_velocity", "2.0", "m/s"),  # farther away
    ("10000032", "2181-05-01 10:00:00", "tr_mmhg", "25", "mmHg"),
    ("10000117", "2150-01-11 12:00:00", "rv_function", "RV not well seen", ""),  # nothing of use is measured
    ("10000117", "2150-01-12 12:00:00", "tr_velocity", "9", "m/s"),  # impossible
    ("10000117", "2150-01-13 12:00:00", "TR_Velocity ", "250", "cm/s"),
    ("10000117", "2150-01-10 12:00:00", "tr_velocity", "4.5", "m/s", "stress"),  # not at rest
    ("10000117", "unclear", "tr_velocity", "4.5", "m/s"),
    ("10000117", "2150-01-10 12:00:00", "lvef", "55", "%"),
    ("10009999", "2150-01-10 12:00:00", "tr_velocity", "4.5", "m/s"),
]


@pytest.mark.parametrize("name", mimic_iv_echo.MEASUREMENTS)
def test_an_ecg_gets_the_nearest_echocardiogram(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str):
    caplog.set_level(logging.INFO)
    storage = mimic(tmp_path, measurements_csv(MEASURED), name)
    assert detect(storage) == "mimic-iv-echo"  # not ambiguous, though it has the table of mimic-iv-ecg, too
    chosen = select(storage)
    assert chosen.table["record_id"].tolist() == [study for _, study, _ in ECGS]
    assert labels_of(chosen.table) == {
        # 4 x 3.4^2 + 12.5; 25 mmHg of gradient + 3, 4 x 2.5^2 + 3
        "pasp_mmhg": [58.7, 28, 28, None],
        "tr_velocity_m_s": [3.4, 2.5, 2.5, None],
        "pasp_ge_45": [1, 0, 0, None],
        "elevated_pasp_35": [1, 0, 0, None],
        "tr_velocity_ge_3_2": [1, 0, 0, None],
        "rv_dysfunction": [1, None, None, None],
    }
    said = messages(caplog)
    assert "3 of 4 ECGs have an echocardiogram within 90 days" in said
    assert "1 values for tr_velocity_m_s are no number from 0.5 to 7, such as '9'" in said
    assert "1 measurements have no time" in said and "10000" not in said
    assert labels_of(select(storage, "mimic-iv-ecg").table) == {}


def test_the_days_are_an_option_and_count_before_and_after(tmp_path: Path):
    storage = mimic(tmp_path, measurements_csv(MEASURED))
    near = select(storage, echo=EchoOptions.of(2.9, []))
    assert labels_of(near.table)["tr_velocity_m_s"] == [None, None, None, None]  # 2.95 days before, 3 days after
    near = select(storage, echo=EchoOptions.of(3, []))
    assert labels_of(near.table)["tr_velocity_m_s"] == [3.4, None, 2.5, None]
    far = select(storage, echo=EchoOptions.of(365, []))
    assert labels_of(far.table)["tr_velocity_m_s"] == [3.4, 2.5, 2.5, None]
    assert labels_of(select(storage, echo=EchoOptions.of(0, [])).table)["tr_velocity_m_s"] == [None] * 4


def test_other_names_and_a_pressure_of_its_own(tmp_path: Path):
    columns = ["Patient", "no", "When", "kind", "What", "text", "Result", "Unit"]
    measured = [
        ("10000032", "2180-07-23", "RVSP", "52", "mm Hg", "TTE"),
        ("10000032", "2180-07-23", "tr_velocity", "2", "m/s", "TTE"),
        ("10000117", "2150-01-10", "RVSP", "7", "kPa", "TTE"),
        ("10000117", "2150-01-10", "tr_velocity", "2", "", "TTE"),
    ]
    storage = mimic(tmp_path, measurements_csv(measured, columns))
    names = ["subject=Patient", "time=When", "name=What", "value=Result", "unit=Unit", "type=kind", "pasp=RVSP"]
    table = select(storage, echo=EchoOptions.of(None, names)).table
    # The stated pressure comes first; one in an unknown unit is not used.
    assert labels_of(table)["pasp_mmhg"] == [52, None, 19, None]
    few = measurements_csv([("10000032", "2180-07-23", "tr_velocity", "2", "")], columns)
    storage = mimic(tmp_path, few.replace("Unit", "x").replace("kind", "y"))  # unit and kind may be absent
    assert labels_of(select(storage, echo=EchoOptions.of(None, names)).table)["tr_velocity_m_s"][0] == 2


def test_labels_of_the_user_come_before_those_of_the_echocardiogram(tmp_path: Path):
    storage = mimic(tmp_path, measurements_csv(MEASURED))
    labels = pd.DataFrame({"study_id": ["40000003"], "pasp_ge_45": [1], "sex": ["F"], "age": [70]})
    found = labels_of(COHORTS["mimic-iv-echo"].recordings(storage, labels))
    assert found["pasp_ge_45"] == [None, None, 1, None] and found["tr_velocity_ge_3_2"] == [1, 0, 0, None]
    assert (found["female"], found["age_years"]) == ([None, None, 1, None], [None, None, 70, None])


@pytest.mark.parametrize(
    ("ivc", "pressure"),
    [
        ("<2.2cm, >50% (0-5mmHg)", 2.5),
        ("IVC<=2.1cm, <50% collapse (5-10mmHg)", 7.5),
        (">2.1cm, >50% (10-15 mm Hg)", 12.5),
        (">2.1cm, <50% (>15mmHg)", 15),
        ("IVC dilated (>2.5cm)", 15),
        ("NL IVC <2.2 cm", 3),
        ("Intubated, IVC<1.5cm, RA <10mmHg", 3),
        ("IVC not visualized", 3),
    ],
)
def test_right_atrial_pressure(ivc: str, pressure: float):
    assert right_atrial_pressure_mmhg(ivc) == pressure


@pytest.mark.parametrize(
    ("measured", "parts"),
    [
        (measurements_csv(MEASURED).replace("measurement_datetime", "when"),
         ["has no column measurement_datetime", "--echo-columns time=COLUMN", "--cohort mimic-iv-ecg"]),
        (measurements_csv([MEASURED[11]]), ["no measurement named pasp, tr_velocity, tr_mmhg, rv_function, ivc",
         "among its names are lvef", "--echo-columns tr_velocity=NAME"]),
        (measurements_csv([]), ["among its names are none"]),
        ("", ["structured_measurement.csv is not a CSV"]),
        ("subject_id,result\n1,\"2\n3,4\n", ["structured_measurement.csv"]),
    ],
)  # fmt: skip
def test_mistakes_of_the_measurements_are_named(tmp_path: Path, measured: str, parts: list[str]):
    mimic(tmp_path, measured)
    said = mistake(tmp_path)
    assert all(part in said for part in parts), said


def test_mistakes_of_the_options_are_named(tmp_path: Path):
    for days, names in ((-1, []), (4000, []), (None, ["value"]), (None, ["x=y"]), (None, ["value=a", "value=b"])):
        with pytest.raises(LsemvaeError, match=r"--echo-(days is -?[0-9]+|columns is )"):
            EchoOptions.of(days, names)
    storage = mimic(tmp_path / "a", measurements_csv(MEASURED))
    with pytest.raises(LsemvaeError, match="are for mimic-iv-echo only"):
        select(storage, "mimic-iv-ecg", echo=EchoOptions())
    broken = mimic(tmp_path / "b", measurements_csv(MEASURED), "structured_measurement.csv.gz")
    whole = (tmp_path / "b" / "structured_measurement.csv.gz").read_bytes()
    (tmp_path / "b" / "structured_measurement.csv.gz").write_bytes(whole[: len(whole) // 2])
    assert "structured_measurement.csv.gz" in mistake(tmp_path / "b")
    (tmp_path / "b" / "structured_measurement.csv.gz").write_text("no gzip")
    assert "structured_measurement.csv.gz" in mistake(tmp_path / "b")
    (tmp_path / "b" / "structured_measurement.csv.gz").unlink()
    assert detect(broken) == "mimic-iv-ecg"
    assert "lacks a table of the cohort mimic-iv-echo" in mistake(tmp_path / "b", "mimic-iv-echo")
    (tmp_path / "a" / "record_list.csv").unlink()
    assert detect(storage) == "folder"
    assert "record_list.csv" in mistake(tmp_path / "a", "mimic-iv-echo")


def test_a_large_table_of_measurements_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    filler = "10000032,1,2180-07-20 10:00:00,tte,lvef,about lvef,55,%\n" * 20_000
    header, _, rest = measurements_csv(MEASURED).partition("\n")
    storage = mimic(tmp_path, f"{header}\n{filler}{rest}")
    longest = 0

    def watched(*arguments: object) -> Iterator[pd.DataFrame]:
        nonlocal longest
        for chunk in in_chunks(*arguments):
            longest = max(longest, len(chunk))
            yield chunk

    in_chunks = mimic_iv_echo._chunks
    monkeypatch.setattr(mimic_iv_echo, "_chunks", watched)
    monkeypatch.setattr(mimic_iv_echo, "_CHUNK_ROWS", 500)
    assert labels_of(select(storage).table)["tr_velocity_m_s"] == [3.4, 2.5, 2.5, None]
    assert longest == 500


@pytest.mark.server
def test_measurements_in_an_object_store(s3: str):
    client = boto3.client("s3")
    text = measurements_csv(MEASURED)
    for prefix, name, body in (
        ("plain", "structured_measurement.csv", text.encode()),
        ("packed", "structured-measurement.csv.gz", gzip.compress(text.encode())),
    ):
        client.put_object(Bucket="ecg", Key=f"mimic-{prefix}/record_list.csv", Body=record_list(ECGS).encode())
        client.put_object(Bucket="ecg", Key=f"mimic-{prefix}/{name}", Body=body)
        chosen = select(Storage.open(f"s3://ecg/mimic-{prefix}"))
        assert chosen.name == "mimic-iv-echo"
        assert labels_of(chosen.table)["tr_velocity_m_s"] == [3.4, 2.5, 2.5, None]


def test_the_columns_are_those_of_the_defaults():
    assert set(mimic_iv_echo.COLUMNS.values()) <= set(MEASUREMENT_COLUMNS)
