"""Cohorts: which recordings, whose, and what is known; a mistake in a table is named in one line."""

import logging
import shutil
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.cohorts import COHORTS, detect, mimic_iv_ecg, ptb_xl, read_labels
from lsemvae.cohorts.tables import join_labels
from lsemvae.errors import LsemvaeError
from lsemvae.formats import read_relative
from lsemvae.leads import LEADS
from lsemvae.quality import quality_flags
from lsemvae.storage import Storage


def write(root: Path, files: dict[str, str]) -> Storage:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Storage.open(root)


def labels_of(table: pd.DataFrame) -> dict[str, list[float | None]]:
    """Label columns as plain lists, None for NaN; each must be float64."""
    columns = [name for name in table.columns if name.startswith("label.")]
    assert all(table[name].dtype == np.float64 for name in columns)
    return {name: [None if np.isnan(v) else v for v in table[name]] for name in columns}


def refusal(labels: pd.DataFrame, recordings: pd.DataFrame) -> str:
    with pytest.raises(LsemvaeError) as caught:
        join_labels(recordings, labels)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- labels of the user -------------------------------------------------------------------------------------

RECORDINGS = pd.DataFrame(
    {
        "path": ["a/001.hea", "a/002.hea", "b/003.hea"],
        "record_id": ["001", "002", "003"],
        "subject_id": ["7", "7", "8"],
    }
)


@pytest.mark.parametrize(
    ("csv", "ph"),
    [
        ("path,ph\na/001.hea,1\nb/003.hea,0\n", [1, None, 0]),
        ("path,ph\n./a/001,1\nb/003.dat,0\n", [1, None, 0]),
        ("file,ph\n001.hea,1\n003,0\n", [1, None, 0]),
        ("file,ph\nelsewhere/001.hea,1\n003,0\n", [1, None, 0]),
        ("file,ph\na\\001.hea,1\nb/003.hea,0\n", [1, None, 0]),  # as Windows writes it
        ("record_id,ph\n001,1\n003,0\n", [1, None, 0]),  # 001 is text, not 1
        ("study_id,ph\n003,0\n001,1\n999,1\n", [1, None, 0]),
        ("ecg_id,ph\n001,1\n002,\n003,0\n", [1, None, 0]),
        ("subject_id,ph\n7,1\n8,0\n", [1, 1, 0]),  # of the patient, so of all recordings
        ("path,record_id,ph\nC:/x/001.hea,001,1\n,003,0\n", [1, None, 0]),  # the key that matches is used
        ("record_id,ph\n001,True\n002,\n003,False\n", [1, None, 0]),
        ("record_id,label.ph\n001,1\n003,0\n", [1, None, 0]),
        ("record_id,ph\n001,1\n,0\n", [1, None, None]),
        ("record_id,ph\n001,1,\n003,0,\n", [1, None, 0]),  # a comma at the end shifts nothing
        ("record_id,ph\n001,Yes\n002,\n003,no\n", [1, None, 0]),
        ("record_id,ph\n001,TRUE\n003,false\n", [1, None, 0]),
        ("record_id,ph\n001, yes \n002,0\n003,No\n", [1, 0, 0]),
        ("record_id;ph\n001;1\n003;0\n", [1, None, 0]),
        ("record_id\tph\n001\t1\n003\t0\n", [1, None, 0]),
        ("\ufeffrecord_id;ph;a\n001;1,0;x\n003;0,5;y\n", [1, None, 0.5]),  # with decimal commas
        (" record_id , ph \n001,1\n003,0\n", [1, None, 0]),
        ("Record ID,ph\n001,1\n003,0\n", [1, None, 0]),
    ],
)
def test_labels_join_by_any_key(tmp_path: Path, csv: str, ph: list[float | None]) -> None:
    labels = read_labels(str(write(tmp_path, {"labels.csv": csv}).path("labels.csv")))
    joined = join_labels(RECORDINGS, labels)
    assert labels_of(joined) == {"label.ph": ph}
    pd.testing.assert_frame_equal(joined[list(RECORDINGS.columns)], RECORDINGS)


def test_numeric_columns_are_labels_and_others_are_not() -> None:
    labels = pd.DataFrame(
        {
            "record_id": ["001"],
            "ph": [1],
            "mpap_mmhg": [31.5],
            "site": ["ward"],
            "subject_id": [12],
            "Unnamed: 0": [0],
        }
    )
    assert labels_of(join_labels(RECORDINGS, labels)) == {
        "label.ph": [1.0, None, None],
        "label.mpap_mmhg": [31.5, None, None],
    }


def test_a_column_that_is_no_label_is_named_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    labels = pd.DataFrame(
        {
            "record_id": ["001", "002", "003"],
            "ph": ["1", "?", "0"],
            "af": [1, 0, 1],
            "name": ["Ada Example", "Max Example", None],
        }
    )
    assert labels_of(join_labels(RECORDINGS, labels)) == {"label.af": [1, 0, 1]}
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "'ph' (1 of 3 values are no number, yes or no, such as '?', the first in row 3:" in said
    assert "'name' (mostly text)" in said and "Example" not in said and "af" not in said


def test_documented_labels_follow_from_documented_columns_in_any_cohort(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = write(tmp_path, dict.fromkeys(("a.dcm", "b.dcm", "c.dcm"), ""))
    csv = "file,Patient,mPAP (mmHg),pawp,ph,Note A\na.dcm,p1,43,11,1,5\nb.dcm,p1,12,,1,6\nc.dcm,p2,25,18,1,7\n"
    labels = read_labels(write(tmp_path / "labels", {"labels.csv": csv}).path("labels.csv"))
    table = COHORTS["folder"].recordings(storage, labels)
    assert table["subject_id"].tolist() == ["p1", "p1", "p2"]
    assert labels_of(table) == {
        "label.mpap_mmhg": [43, 12, 25],
        "label.pawp_mmhg": [11, None, 18],
        "label.ph": [1, 1, 1],
        "label.Note A": [5, 6, 7],
        "label.post_capillary": [0, None, 1],
    }
    assert "column ph: 1 values are not what docs/labels.md computes" in messages(caplog)
    write(tmp_path / "labels", {"labels.csv": csv.replace(",ph,", ",pH before,")})
    without = COHORTS["folder"].recordings(storage, read_labels(str(tmp_path / "labels" / "labels.csv")))
    assert labels_of(without)["label.ph"] == [1, 0, 1]
    write(tmp_path / "labels", {"labels.csv": csv.replace(",43,", ",5.7,").replace(",12,", ",1.6,")})
    with pytest.raises(LsemvaeError, match=r"row 3 .* mpap_mmhg is 1.6, no number from 5 to 150"):
        COHORTS["folder"].recordings(storage, read_labels(str(tmp_path / "labels" / "labels.csv")))


def test_sex_and_age_of_a_users_table() -> None:
    words = pd.DataFrame({"record_id": ["001", "002", "003"], "Sex": ["F ", "male", "x"], "Age": ["61", ">89", "old"]})
    assert labels_of(join_labels(RECORDINGS, words)) == {
        "label.female": [1, 0, None],
        "label.age_years": [61, 90, None],
    }
    # A number does not say which sex it means, and a column that says who is a woman needs no other.
    numbers = pd.DataFrame({"record_id": ["001", "003"], "sex": [0, 1], "age_years": [-3, 300]})
    assert labels_of(join_labels(RECORDINGS, numbers)) == {
        "label.sex": [0, None, 1],
        "label.age_years": [None, None, None],
    }
    both = pd.DataFrame({"record_id": ["001", "003"], "female": ["yes", "no"], "sex": ["m", "f"], "age": [150, 40.5]})
    assert labels_of(join_labels(RECORDINGS, both)) == {
        "label.female": [1, None, 0],
        "label.age_years": [None, None, 40.5],
    }


def test_labels_replace_those_of_the_same_name() -> None:
    known = RECORDINGS.assign(**{"label.ph": [0.0, 0.0, 0.0], "label.af": [1.0, 0.0, 1.0]})
    joined = join_labels(known, pd.DataFrame({"record_id": ["001"], "ph": [1]}))
    assert labels_of(joined) == {"label.af": [1.0, 0.0, 1.0], "label.ph": [1.0, None, None]}


def test_the_index_of_the_recordings_does_not_matter() -> None:
    joined = join_labels(RECORDINGS.iloc[::-1], pd.DataFrame({"record_id": ["001", "003"], "ph": [1, 0]}))
    assert joined.set_index("record_id")["label.ph"].to_dict() == pytest.approx(
        {"003": 0.0, "002": np.nan, "001": 1.0}, nan_ok=True
    )


def test_mistakes_in_labels_are_named() -> None:
    assert "no key" in (message := refusal(pd.DataFrame({"eid": ["1"], "ph": [1]}), RECORDINGS))
    assert "eid, ph" in message
    assert "record_id" in message
    repeated = pd.DataFrame({"record_id": ["001", "001"], "ph": [1, 0]})
    assert "repeat 1 values of their key 'record_id'" in refusal(repeated, RECORDINGS)
    strangers = pd.DataFrame({"record_id": ["x"], "path": ["y"], "ph": [1]})
    assert "none of the 1 labels matches one of the 3 recordings by path or record_id" in refusal(strangers, RECORDINGS)
    same_names = RECORDINGS.assign(path=["a/ecg.dcm", "b/ecg.dcm", "b/other.dcm"])
    by_name = pd.DataFrame({"file": ["ecg.dcm"], "ph": [1]})
    said = refusal(by_name, same_names)
    assert "1 file names of the labels belong to several recordings, the first to a/ecg.dcm and b/ecg.dcm" in said
    by_path = pd.DataFrame({"file": ["a/ecg.dcm", "b/ecg.dcm"], "ph": [1, 0]})
    assert labels_of(join_labels(same_names, by_path)) == {"label.ph": [1.0, 0.0, None]}
    assert "no numeric column" in refusal(pd.DataFrame({"record_id": ["001"], "ph": ["perhaps"]}), RECORDINGS)
    assert "no key" in refusal(pd.DataFrame(), RECORDINGS)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\xff\xfe" * 50, b'a,b\n1,"2\n3,4\n', b"a,b\n1,2\n3\n4,5,6,7\n"])
def test_what_is_no_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(LsemvaeError, match=r"labels\.csv"):
        read_labels(str(path))
    for absent in (tmp_path / "no.csv", tmp_path):
        with pytest.raises(LsemvaeError, match="is not a file"):
            read_labels(str(absent))


# --- a folder without a table -------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    storage = write(tmp_path, dict.fromkeys(("b/2.hea", "b/2.dat", "a/1.hea", "notes.txt"), ""))
    assert detect(storage) == "folder"
    table = COHORTS["folder"].recordings(storage, None)
    assert table.to_dict("list") == {
        "path": ["a/1.hea", "b/2.hea"],
        "record_id": ["1", "2"],
        "subject_id": ["1", "2"],
    }
    labels = pd.DataFrame({"file": ["1.hea"], "patient_id": ["p9"], "ph": [1]})
    labelled = COHORTS["folder"].recordings(storage, labels)
    assert labelled["subject_id"].tolist() == ["p9", "2"]
    assert labels_of(labelled) == {"label.ph": [1.0, None]}
    only_subjects = COHORTS["folder"].recordings(storage, labels.drop(columns="ph"))
    assert only_subjects["subject_id"].tolist() == ["p9", "2"]


def test_folder_with_equal_file_names_and_without_any(tmp_path: Path) -> None:
    storage = write(tmp_path / "equal", {"a/ecg.hea": "", "b/ecg.hea": ""})
    assert COHORTS["folder"].recordings(storage, None)["record_id"].tolist() == ["a/ecg", "b/ecg"]
    with pytest.raises(LsemvaeError, match="has no recordings"):
        COHORTS["folder"].recordings(write(tmp_path / "none", {"a.txt": ""}), None)


# --- MIMIC-IV-ECG -------------------------------------------------------------------------------------------

RECORD_LIST = (
    "subject_id,study_id,file_name,ecg_time,path\n"
    "10000032,40689238,40689238,2180-07-23 08:44:00,files/p1000/p10000032/s40689238/40689238\n"
    "10000032,44458630,44458630,2180-07-23 09:54:00,files/p1000/p10000032/s44458630/44458630\n"
    "10000117,49036311,49036311,2181-03-04 17:14:00,files/p1000/p10000117/s49036311/49036311\n"
)


class Unlistable(Storage):
    """800,035 recordings in 1.6 million files are not listed."""

    def list(self, prefix: str = "", suffix: str | None = None) -> None:
        raise AssertionError("listed")


def test_mimic_iv_ecg(tmp_path: Path) -> None:
    write(tmp_path, {"record_list.csv": RECORD_LIST})
    storage = Unlistable(str(tmp_path))
    assert detect(storage) == "mimic-iv-ecg"
    table = COHORTS["mimic-iv-ecg"].recordings(storage, None)
    assert list(table.columns) == ["path", "record_id", "subject_id"]
    assert table["record_id"].tolist() == ["40689238", "44458630", "49036311"]
    assert table["subject_id"].tolist() == ["10000032", "10000032", "10000117"]
    assert table["path"][0] == "files/p1000/p10000032/s40689238/40689238"


@pytest.mark.parametrize(
    "csv",
    [
        "subject_id,study_id,mpap_mmhg,ph\n10000032,40689238,34.5,1\n10000117,49036311,12,0\n",
        "path,mpap_mmhg,ph\nfiles/p1000/p10000032/s40689238/40689238,34.5,1\n"
        "files/p1000/p10000117/s49036311/49036311,12,0\n",
    ],
)
def test_mimic_iv_ecg_labels_in_the_source_or_given(tmp_path: Path, csv: str) -> None:
    storage = write(tmp_path, {"record_list.csv": RECORD_LIST, "labels.csv": csv})
    expected = {"label.mpap_mmhg": [34.5, None, 12.0], "label.ph": [1.0, None, 0.0]}
    assert labels_of(COHORTS["mimic-iv-ecg"].recordings(storage, None)) == expected
    given = pd.DataFrame({"subject_id": ["10000032"], "died": [1]})
    assert labels_of(COHORTS["mimic-iv-ecg"].recordings(storage, given)) == {"label.died": [1.0, 1.0, None]}


@pytest.mark.parametrize(
    ("record_list", "part"),
    [
        (RECORD_LIST.replace("study_id", "study"), "no column study_id"),
        (RECORD_LIST + RECORD_LIST.splitlines()[-1] + "\n", "a study twice"),
        (RECORD_LIST.replace("10000117,49036311", ",49036311"), "without path or ids"),
    ],
)
def test_mimic_iv_ecg_mistakes(tmp_path: Path, record_list: str, part: str) -> None:
    with pytest.raises(LsemvaeError, match=part):
        COHORTS["mimic-iv-ecg"].recordings(write(tmp_path, {"record_list.csv": record_list}), None)


MEASURED = ["rr_interval", "p_onset", "p_end", "qrs_onset", "qrs_end", "t_end", "p_axis", "qrs_axis", "t_axis"]


def test_mimic_iv_ecg_measurements_and_numbers_that_mean_not_measurable(tmp_path: Path) -> None:
    rows = {
        "40689238": [65535, 29999, 29999, 180, 280, 600, 32767, -32768, 40],
        "44458630": [800, 40, 150, 180, 280, 600, 51, -45, 40],
        "12345678": [800, 40, 150, 180, 280, 600, 51, 100, 40],  # not in the list
    }
    head = ["subject_id", "study_id", "cart_id", "ecg_time", "report_0", "bandwidth", *MEASURED]
    lines = [f"1,{study},3,2180-07-23 08:44:00,Sinus rhythm,0.005-150 Hz," for study in rows]
    lines = [line + ",".join(map(str, values)) for line, values in zip(lines, rows.values(), strict=True)]
    csv = "\n".join([",".join(head), *lines])
    write(tmp_path, {"record_list.csv": RECORD_LIST, "machine_measurements.csv": csv})
    storage = Unlistable(str(tmp_path))
    assert labels_of(COHORTS["mimic-iv-ecg"].recordings(storage, None)) == {
        "label.rr_interval_ms": [None, 800, None],
        "label.p_onset_ms": [None, 40, None],
        "label.p_end_ms": [None, 150, None],
        "label.qrs_onset_ms": [180, 180, None],
        "label.qrs_end_ms": [280, 280, None],
        "label.t_end_ms": [600, 600, None],
        "label.p_axis_deg": [None, 51, None],
        "label.qrs_axis_deg": [None, -45, None],
        "label.t_axis_deg": [40, 40, None],
        "label.left_axis": [None, 1, None],
        "label.right_axis": [None, 0, None],
    }
    with pytest.raises(LsemvaeError, match="no column t_axis"):
        mimic_iv_ecg.machine_measurements(write(tmp_path, {"machine_measurements.csv": csv.replace("t_axis", "t")}))


# --- PTB-XL -------------------------------------------------------------------------------------------------

STATEMENTS = (
    ",description,diagnostic,form,rhythm,diagnostic_class\n"
    "NORM,normal ECG,1.0,,,NORM\nLVH,left ventricular hypertrophy,1.0,,,HYP\nLAFB,fascicular block,1.0,,,CD\n"
    "NST_,non-specific ST changes,1.0,1.0,,STTC\nSR,sinus rhythm,,,1.0,\nAFIB,atrial fibrillation,,,1.0,\n"
    "ABQRS,abnormal QRS,,1.0,,\n"
)


def ptb_xl_source(root: Path, codes: list[str], axes: list[str] | None = None, present: int | None = None) -> Storage:
    rows = ["ecg_id,patient_id,age,sex,scp_codes,heart_axis,strat_fold,filename_lr,filename_hr"]
    files = {"scp_statements.csv": STATEMENTS}
    for number, cell in enumerate(codes, start=1):
        name = f"00000/{number:05d}"
        axis = axes[number - 1] if axes else ""
        about = ("56.0,1", "300.0,0", ",", "0.0,1")[(number - 1) % 4]
        fold = 1 + number % 10
        rows.append(
            f'{number},{1000 + number // 2}.0,{about},"{cell}",{axis},{fold},records100/{name}_lr,records500/{name}_hr'
        )
        if present is None or number <= present:
            files[f"records500/{name}_hr.hea"] = ""
    return write(root, files | {"ptbxl_database.csv": "\n".join(rows)})


def test_ptb_xl_labels(tmp_path: Path) -> None:
    codes = [
        "{'NORM': 100.0, 'SR': 0.0}",
        "{'LVH': 50.0, 'LAFB': 15.0, 'AFIB': 0.0}",
        "{'NST_': 0.0}",
        "{'SR': 0.0}",
        "",
    ]
    storage = ptb_xl_source(tmp_path, codes, ["", "", "LAD", "RAD", "MID"])
    assert detect(storage) == "ptb-xl"
    table = COHORTS["ptb-xl"].recordings(storage, None)
    assert table["path"][0] == "records500/00000/00001_hr"
    assert table["record_id"].tolist() == ["1", "2", "3", "4", "5"]
    assert table["subject_id"].tolist() == ["1000", "1001", "1001", "1002", "1002"]
    labels = labels_of(table)
    assert labels["label.norm"] == [1, 0, 0, None, None]  # unknown without any diagnostic statement
    assert labels["label.hyp"] == labels["label.lvh"] == [0, 1, 0, None, None]
    assert labels["label.cd"] == labels["label.lafb"] == [0, 1, 0, None, None]
    assert labels["label.sttc"] == [0, 0, 1, None, None]  # likelihood 0 means unknown, not absent
    assert labels["label.af"] == [0, 1, None, 0, None]
    assert labels["label.left_axis"] == [None, 1, 1, 0, 0]
    assert labels["label.right_axis"] == [None, None, 0, 1, 0]
    assert labels["label.female"] == [1, 0, None, 1, 1]
    assert labels["label.age_years"] == [56, 90, None, 0, 56]  # 300 means: older than 89
    assert labels["label.strat_fold"] == [2, 3, 4, 5, 6]


def test_ptb_xl_uses_what_is_there(tmp_path: Path) -> None:
    storage = ptb_xl_source(tmp_path, ["{'NORM': 100.0}"] * 9, present=4)
    assert len(COHORTS["ptb-xl"].recordings(storage, None)) == 4
    none = ptb_xl_source(tmp_path / "none", ["{'NORM': 100.0}"] * 9, present=0)
    with pytest.raises(LsemvaeError, match="none of the 9 recordings"):
        COHORTS["ptb-xl"].recordings(none, None)


def test_ptb_xl_database_as_labels_and_others_beside_it(tmp_path: Path) -> None:
    storage = ptb_xl_source(tmp_path, ["{'NORM': 100.0}", "{'LVH': 100.0}"])
    database = read_labels(storage.path("ptbxl_database.csv"))
    own = COHORTS["ptb-xl"].recordings(storage, None)
    pd.testing.assert_frame_equal(COHORTS["ptb-xl"].recordings(storage, database), own)
    assert len(COHORTS["ptb-xl"].recordings(storage, database.tail(1))) == 1
    added = COHORTS["ptb-xl"].recordings(storage, pd.DataFrame({"ecg_id": ["2"], "ph": [1]}))
    assert labels_of(added) == labels_of(own) | {"label.ph": [None, 1.0]}
    (tmp_path / "ptbxl_database.csv").unlink()
    assert detect(storage) == "folder"
    plain = COHORTS["folder"].recordings(storage, database)
    assert labels_of(plain)["label.lvh"] == [0, 1]
    assert plain["subject_id"].tolist() == own["subject_id"].tolist()
    (tmp_path / "scp_statements.csv").unlink()
    with pytest.raises(LsemvaeError, match=r"no scp_statements\.csv"):
        COHORTS["folder"].recordings(storage, database)


@pytest.mark.parametrize(
    "cell",
    [
        "__import__('os').system('true')",
        "['NORM']",
        "{'NORM': 'yes'}",
        "{1: 2}",
        "{[]: 1}",
        "{'NORM': 100.0",
        "(" * 1500,
        "{'A': " + "-" * 1900 + "1}",
        "{" + "'A': 1, " * 1000 + "}",
    ],
)
def test_scp_codes_are_data_not_code(tmp_path: Path, cell: str) -> None:
    storage = ptb_xl_source(tmp_path, [cell])
    with pytest.raises(LsemvaeError, match="ecg_id 1 "):
        COHORTS["ptb-xl"].recordings(storage, None)


@pytest.mark.shared_data
def test_ptb_xl_500(shared_data: Path) -> None:
    """Superclass counts as stated in the manifest of the data."""
    storage = Storage.open(shared_data / "ptbxl500")
    assert detect(storage) == "ptb-xl"
    labels = read_labels(str(shared_data / "ptbxl500/ptbxl_database.csv"))
    table = COHORTS["ptb-xl"].recordings(storage, labels)
    pd.testing.assert_frame_equal(table, COHORTS["ptb-xl"].recordings(storage, None))
    assert (len(table), table["subject_id"].nunique()) == (500, 466)
    counts = {name: int((table[f"label.{name}"] == 1).sum()) for name in ("norm", "sttc", "cd", "mi", "hyp")}
    assert counts == {"norm": 297, "sttc": 96, "cd": 78, "mi": 73, "hyp": 40}
    assert int((table["label.left_axis"] == 1).sum()) == 71
    assert table["label.norm"].isna().sum() == 12
    assert table["label.female"].sum() == 251 and not table["label.female"].isna().any()
    ages = table["label.age_years"]
    assert (ages.min(), ages.max(), ages.isna().sum()) == (17, 91, 4)
    assert set(table["label.strat_fold"]) == set(range(1, 11))
    record = read_relative(table["path"][499], storage.read_bytes)
    assert (record.record_id, record.leads) == ("00500_hr", LEADS)
    assert ptb_xl.is_database(labels)


# --- ASPIRE -------------------------------------------------------------------------------------------------

ASPIRE = "file,patient,mPAP,PAWP,sex\necg/1.dcm,00012,43,11,1\necg/2,A7,20,18,0\n3.dcm,00012,31.5,,1\n"


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.message for record in caplog.records)


def test_aspire(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    absent = "ecg/4.dcm,A9,50,20,0\n"
    files = dict.fromkeys(("ecg/1.dcm", "ecg/2", "3.dcm", "5.dcm", "README.txt", ".DS_Store"), "")
    storage = write(tmp_path, files | {"aspire.csv": ASPIRE + absent})
    assert detect(storage) == "aspire"
    table = COHORTS["aspire"].recordings(storage, None)
    assert table["path"].tolist() == ["3.dcm", "ecg/1.dcm", "ecg/2"]  # 5.dcm is not in the table
    assert table["subject_id"].tolist() == ["00012", "00012", "A7"]
    assert labels_of(table) == {
        "label.mpap_mmhg": [31.5, 43, 20],
        "label.pawp_mmhg": [None, 11, 18],
        "label.sex": [1, 1, 0],
        "label.ph": [1, 1, 0],
        "label.post_capillary": [None, 0, None],
    }
    assert "1 of 4 rows have no recording" in messages(caplog)
    assert "00012" not in messages(caplog) and "A9" not in messages(caplog)
    added = COHORTS["aspire"].recordings(storage, pd.DataFrame({"file": ["1.dcm"], "died": [1]}))
    assert labels_of(added)["label.died"] == [None, 1, None]

    (tmp_path / "aspire.csv").rename(tmp_path.parent / f"{tmp_path.name}.csv")
    assert detect(storage) == "folder"
    given = read_labels(f"{tmp_path}.csv")
    pd.testing.assert_frame_equal(COHORTS["aspire"].recordings(storage, given), table)
    with pytest.raises(LsemvaeError, match=r"has no aspire\.csv: put it there, or give the table with --labels"):
        COHORTS["aspire"].recordings(storage, None)


@pytest.mark.parametrize(
    ("csv", "says"),
    [
        (ASPIRE.replace("43", "2000"), "aspire.csv, row 2 (the header is row 1): mpap_mmhg is 2000, no number"),
        (ASPIRE.replace("31.5", "-3"), "row 4 (the header is row 1): mpap_mmhg is -3,"),
        (ASPIRE.replace(",20,18,", ",20,0,"), "row 3 (the header is row 1): pawp_mmhg is 0,"),
        (ASPIRE.replace("43", "5.7").replace(",20,", ",2.7,").replace("31.5", "4.2"), "mpap_mmhg is 2.7,"),  # kPa
        (ASPIRE.replace("31.5", '"31,5"'), "mpap_mmhg is '31,5', no number"),
        (ASPIRE.replace("43", "unclear"), "mpap_mmhg is 'unclear'"),
        (ASPIRE.replace("mPAP", "mPAP (kPa)"), "aspire.csv has no column mpap_mmhg"),
        (ASPIRE.replace("patient", "who"), "aspire.csv has no column patient_id"),
        (ASPIRE.replace("A7", ""), "aspire.csv, row 3 (the header is row 1): no file or no patient_id"),
        (ASPIRE.replace("A7", "12"), "1 values of patient_id are there with and without leading zeros"),
        (ASPIRE + "3.dcm,A8,31,,0\n", "repeat 1 values of their key 'file'"),
        (ASPIRE.replace("sex", "MPAP_mmHg"), "aspire.csv has mpap_mmhg more than once"),
        (ASPIRE.replace("ecg/", "x/").replace("3.dcm", "y.dcm").replace("1.dcm", "z.dcm").replace("x/2", "w"),
         "none of the 3 labels matches one of the 3 recordings"),
    ],
)  # fmt: skip
def test_aspire_mistakes_are_named_without_identifiers(tmp_path: Path, csv: str, says: str) -> None:
    files = dict.fromkeys(("ecg/1.dcm", "ecg/2", "3.dcm"), "")
    with pytest.raises(LsemvaeError) as caught:
        COHORTS["aspire"].recordings(write(tmp_path, files | {"aspire.csv": csv}), None)
    assert says in str(caught.value)
    assert not any(name in str(caught.value) for name in ("00012", "A7", "A8"))


# --- UK Biobank ---------------------------------------------------------------------------------------------


def ukb_files(*recordings: str) -> dict[str, str]:
    return {f"{name[:2]}/{name.replace(' ', '_20205_')}.xml": "" for name in recordings}


UKB = ukb_files("1000012 3_0", "1000012 2_1", "1000012 2_0", "1000027 3_0", "1000031 2_0", "1000049 2_0")


def test_ukb_without_a_table_gives_one_recording_a_participant(tmp_path: Path) -> None:
    storage = write(tmp_path, UKB | {"10/notes.xml": "", "10/1000012_6025_0_0.xml": ""})
    assert detect(storage) == "ukb-20205"
    table = COHORTS["ukb-20205"].recordings(storage, None)
    assert list(table.columns) == ["path", "record_id", "subject_id"]
    assert table["record_id"].tolist() == [
        "1000012_20205_2_0", "1000027_20205_3_0", "1000031_20205_2_0", "1000049_20205_2_0"
    ]  # fmt: skip
    assert table["subject_id"].tolist() == ["1000012", "1000027", "1000031", "1000049"]
    with pytest.raises(LsemvaeError, match=r"none of its files is named like 1000012_20205_2_0\.xml"):
        COHORTS["ukb-20205"].recordings(write(tmp_path / "other", {"1.xml": ""}), None)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(2, 3), st.integers(0, 2)), min_size=1, max_size=12, unique=True)
)
@settings(max_examples=25, deadline=None)
def test_ukb_takes_each_participant_once_and_the_first_visit(files: list[tuple[int, int, int]]) -> None:
    class Listed(Storage):
        def list(self, prefix: str = "", suffix: str | None = None) -> list[str]:
            return [f"{eid}_20205_{instance}_{array}.xml" for eid, instance, array in files]

        def exists(self, relative: str = "") -> bool:
            return False

        def read_bytes(self, relative: str) -> bytes:
            raise FileNotFoundError

    table = COHORTS["ukb-20205"].recordings(Listed("/nowhere"), None)
    first = {eid: min(file for file in files if file[0] == eid) for eid, _, _ in files}
    assert table["path"].tolist() == ["{}_20205_{}_{}.xml".format(*first[eid]) for eid in sorted(first)]


def test_ukb_withdrawn_participants_are_dropped_whatever_lists_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    csv = "f.eid,lv_mass_g,la_volume_ml\n1000012,90,70\n1000031,100,92\n1000049,100,\n1000058,90,70\n"
    withdrawn = '\ufeff"1000012"\r\n\r\n01000027\r\n1000099.0\r\n'
    storage = write(tmp_path, UKB | {"ukb-20205.csv": csv, "withdrawn.csv": withdrawn})
    assert detect(storage) == "ukb-20205"
    table = COHORTS["ukb-20205"].recordings(storage, None)
    assert table["subject_id"].tolist() == ["1000031", "1000049"]
    assert labels_of(table) == {
        "label.lv_mass_g": [100, 100],
        "label.la_volume_ml": [92, None],
        "label.cmr_pawp_mmhg": [15.02, None],
        "label.elevated_pawp": [1, None],
    }
    said = messages(caplog)
    assert "4 recordings of 2 participants who have withdrawn" in said
    assert "2 of its 4 rows have no recording that may be used" in said  # one has withdrawn, one was never recorded
    assert "10000" not in said
    (tmp_path / "ukb-20205.csv").unlink()
    assert detect(storage) == "ukb-20205"
    assert COHORTS["ukb-20205"].recordings(storage, None)["subject_id"].tolist() == ["1000031", "1000049"]
    write(tmp_path, {"withdrawn.csv": "eid\n1000012\n1000027\n1000031\n1000049\n"})
    with pytest.raises(LsemvaeError, match=r"all participants with recordings in .* have withdrawn"):
        COHORTS["ukb-20205"].recordings(storage, None)


def test_ukb_the_table_decides_who_belongs_to_it_and_which_visit(tmp_path: Path) -> None:
    """With a column `instance`, MRI and ECG are of the same day."""
    csv = "eid,instance,lv_mass_g,la_volume_ml,22421-2.0,f.31.0.0,p22420_i2,Sex\n"
    csv += "1000012.0,3,90,70,1,1,1,1\n01000031,3,90,70,1,1,1,0\n1000049,2,90,120,1,1,1,\n1000049,3,90,70,1,1,1,0\n"
    storage = write(tmp_path, UKB | {"ukb-20205.csv": csv})
    table = COHORTS["ukb-20205"].recordings(storage, None)
    assert table["record_id"].tolist() == ["1000012_20205_3_0", "1000049_20205_2_0"]
    labels = labels_of(table)
    assert labels["label.elevated_pawp"] == [0, 1]
    assert sorted(labels) == [
        "label.cmr_pawp_mmhg", "label.elevated_pawp", "label.la_volume_ml", "label.lv_mass_g", "label.sex"
    ]  # fmt: skip
    given = write(tmp_path / "labels", {"a.csv": "eid,age\n01000049,61\n", "b.csv": "file,age\n1000012_20205_3_0,70\n"})
    for name, ages in (("a.csv", [None, 61]), ("b.csv", [70, None])):
        added = COHORTS["ukb-20205"].recordings(storage, read_labels(given.path(name)))
        assert labels_of(added) == labels | {"label.age_years": ages}
    (tmp_path / "ukb-20205.csv").unlink()
    alone = COHORTS["ukb-20205"].recordings(storage, read_labels(given.path("a.csv")))
    assert (alone["subject_id"].tolist(), labels_of(alone)) == (["1000049"], {"label.age_years": [61]})
    beside = COHORTS["ukb-20205"].recordings(storage, pd.DataFrame({"subject_id": ["1000049"], "age": [61]}))
    assert labels_of(beside) == {"label.age_years": [None, None, None, 61]}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"withdrawn.csv": "1000012\nJohn\n"}, "withdrawn.csv, line 2, is no eid"),
        ({"withdrawn.csv": "1000012\n1000012,1000027\n"}, "withdrawn.csv, line 2, is no eid"),
        ({"ukb-20205.csv": "id,x\n1,2\n"}, "ukb-20205.csv has no column eid: it has id, x"),
        ({"ukb-20205.csv": "eid,x\n1000012,2\n1000012,3\n"}, "row 3 (the header is row 1): a participant who is in it"),
        ({"ukb-20205.csv": "eid,x\n1000012,2\n,3\n"}, "row 3 (the header is row 1): its eid is no number"),
        ({"ukb-20205.csv": "eid,instance\n1000012,2\n1000012,\n"}, "row 3 (the header is row 1): its instance"),
        ({"ukb-20205.csv": "eid,x\n77,3\n"}, "no participant of ukb-20205.csv has a recording"),
        ({"ukb-20205.csv": "eid,la_volume_ml\n1000012,0.07\n"}, "row 2 (the header is row 1): la_volume_ml is 0.07,"),
    ],
)
def test_ukb_mistakes_are_named_without_identifiers(tmp_path: Path, files: dict[str, str], says: str) -> None:
    with pytest.raises(LsemvaeError) as caught:
        COHORTS["ukb-20205"].recordings(write(tmp_path, UKB | files), None)
    assert says in str(caught.value)
    assert "1000012" not in str(caught.value) and "John" not in str(caught.value)


# --- Kardia -------------------------------------------------------------------------------------------------

KARDIA_JSON = '{"data": {"raw": {"frequency": 300, "amplitudeResolution": 500, "samples": {}}}}'


def test_kardia(tmp_path: Path) -> None:
    files = {"a/1.atc": "", "a/2.ATC": "", "a/2.json": KARDIA_JSON, "b.pdf": ""}
    storage = write(tmp_path, files)
    assert detect(storage) == "kardia"
    table = COHORTS["kardia"].recordings(storage, None)
    assert table.to_dict("list") == {
        "path": ["a/1.atc", "a/2.ATC"], "record_id": ["1", "2"], "subject_id": ["1", "2"]
    }  # fmt: skip
    write(tmp_path, {"kardia.csv": "file,patient,mpap_mmhg\n1.atc,007,25\n9.atc,008,30\n"})
    labelled = COHORTS["kardia"].recordings(storage, None)
    assert labelled["subject_id"].tolist() == ["007", "2"]
    assert labels_of(labelled) == {"label.mpap_mmhg": [25, None], "label.ph": [1, None]}
    with pytest.raises(LsemvaeError, match=r"none of its files is \.atc or Kardia JSON"):
        COHORTS["kardia"].recordings(write(tmp_path / "none", {"x.hea": ""}), None)


@pytest.mark.shared_data
def test_real_files_of_every_named_source_can_be_read(shared_data: Path, tmp_path: Path) -> None:
    """One real recording each of the formats of UK Biobank, ASPIRE and Kardia, laid out as these are."""
    copies = {
        "ukb-20205/1000012_20205_2_0.xml": "cardiosoft/resting_12lead.xml",
        "aspire/ecg/IM01": "dicom/resting_12lead_500hz.dcm",
        "kardia/a.atc": "alivecor/6_lead.atc",
    }
    for copy, original in copies.items():
        (tmp_path / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shared_data / "formats" / original, tmp_path / copy)
    write(tmp_path / "aspire", {"aspire.csv": "file,patient,mpap_mmhg,pawp_mmhg\nIM01,A1,43,11\n"})
    for name, leads in (("ukb-20205", 12), ("aspire", 12), ("kardia", 6)):
        storage = Storage.open(tmp_path / name)
        assert detect(storage) == name
        (path,) = COHORTS[name].recordings(storage, None)["path"]
        record = read_relative(path, storage.read_bytes)
        assert len(record.leads) == leads
        assert 0.5 < np.nanmax(np.abs(record.signal_mv_LT)) < 5


# --- which cohort it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"kardia.csv": "", "x.hea": ""}, "kardia"),
        ({"deep/1000012_20205_2_0.xml": "", "deep/other.xml": ""}, "ukb-20205"),
        ({"1.atc": "", "2.hea": ""}, "folder"),  # as kardia it would lose the second
        ({"1.xml": "", "deep/1000012_20205_2_0.xml": ""}, "ukb-20205"),
        ({"1.atc": "", "2.json": KARDIA_JSON}, "kardia"),
        ({"withdrawn.csv": "12\n", "x.hea": ""}, "folder"),  # any cohort may have such a list
        ({"readme.txt": ""}, "folder"),
        ({"a/b/c/d/e/f/g/1.atc": ""}, "kardia"),
    ],
)
def test_detect(tmp_path: Path, files: dict[str, str], name: str) -> None:
    storage = write(tmp_path, files)
    assert detect(storage) == name
    assert detect(Storage.open(tmp_path / "nothing")) == "folder"


def test_in_an_object_store(s3: str) -> None:
    client = boto3.client("s3")
    files = UKB | {"withdrawn.csv": "1000012\n", "ukb-20205.csv": "eid,lv_mass_g,la_volume_ml\n1000031,100,92\n"}
    for name, text in files.items():
        client.put_object(Bucket="ecg", Key=f"cohorts/all/{name}", Body=text.encode())
        if name in UKB:
            client.put_object(Bucket="ecg", Key=f"cohorts/plain/resting/{name}", Body=b"")
    plain, whole = Storage.open("s3://ecg/cohorts/plain"), Storage.open("s3://ecg/cohorts/all")
    assert detect(plain) == detect(whole) == "ukb-20205"
    assert len(COHORTS["ukb-20205"].recordings(plain, None)) == 4
    table = COHORTS["ukb-20205"].recordings(whole, None)
    assert (table["subject_id"].tolist(), labels_of(table)["label.elevated_pawp"]) == (["1000031"], [1])
    assert detect(Storage.open("s3://ecg/cohorts/none")) == "folder"


# --- LUDB ---------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
def test_ludb(shared_data: Path) -> None:
    storage = Storage.open(shared_data / "ludb")
    assert detect(storage) == "ludb"
    table = COHORTS["ludb"].recordings(storage, None)
    assert (len(table), table["subject_id"].nunique()) == (200, 200)
    counts = {name: int((table[f"label.{name}"] == 1).sum()) for name in ("lvh", "left_axis", "rbbb", "lbbb", "af")}
    assert counts == {"lvh": 108, "left_axis": 66, "rbbb": 33, "lbbb": 10, "af": 15}
    assert table["label.left_axis"].isna().sum() == 10
    assert not table["label.lvh"].isna().any()
    assert table["label.female"].sum() == 85 and (table["label.female"] == 0).sum() == 115
    assert (table["label.age_years"].min(), table["label.age_years"].max()) == (11, 90)  # ">89"
    assert not table["label.age_years"].isna().any()
    for path in table["path"][:20]:
        record = read_relative(path, storage.read_bytes, uv_per_lsb=COHORTS["ludb"].uv_per_lsb)
        # Read at the gain of their headers, they would break Einthoven's law.
        assert {flag.split(":")[0] for flag in quality_flags(record)} <= {"wander", "mains"}
