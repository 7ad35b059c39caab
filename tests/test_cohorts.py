"""Cohorts: which recordings, whose, and what is known; a mistake in a table is named in one line."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

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
        ("record_id,ph\n001,1\n003,0\n", [1, None, 0]),  # 001 is text, not 1
        ("study_id,ph\n003,0\n001,1\n999,1\n", [1, None, 0]),
        ("ecg_id,ph\n001,1\n002,\n003,0\n", [1, None, 0]),
        ("subject_id,ph\n7,1\n8,0\n", [1, 1, 0]),  # of the patient, so of all recordings
        ("path,record_id,ph\nC:/x/001.hea,001,1\n,003,0\n", [1, None, 0]),  # the key that matches is used
        ("record_id,ph\n001,True\n002,\n003,False\n", [1, None, 0]),
        ("record_id,label.ph\n001,1\n003,0\n", [1, None, 0]),
        ("record_id,ph\n001,1\n,0\n", [1, None, None]),
        ("record_id,ph\n001,1,\n003,0,\n", [1, None, 0]),  # a comma at the end shifts nothing
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
            "sex": ["f"],
            "subject_id": [12],
            "Unnamed: 0": [0],
        }
    )
    assert labels_of(join_labels(RECORDINGS, labels)) == {
        "label.ph": [1.0, None, None],
        "label.mpap_mmhg": [31.5, None, None],
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
    assert "no numeric column" in refusal(pd.DataFrame({"record_id": ["001"], "ph": ["yes"]}), RECORDINGS)
    assert "no key" in refusal(pd.DataFrame(), RECORDINGS)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\xff\xfe" * 50, b'a,b\n1,"2\n3,4\n', b"a,b\n1,2\n3\n4,5,6,7\n"])
def test_what_is_no_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(LsemvaeError, match=r"labels\.csv"):
        read_labels(str(path))
    for absent in (tmp_path / "no.csv", tmp_path):
        with pytest.raises(LsemvaeError, match="is no file"):
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


def test_numbers_that_mean_not_measurable(tmp_path: Path) -> None:
    names = [
        "rr_interval",
        "p_onset",
        "p_end",
        "qrs_onset",
        "qrs_end",
        "t_end",
        "p_axis",
        "qrs_axis",
        "t_axis",
    ]
    rows = [
        [65535, 29999, 29999, 180, 280, 600, 32767, -32768, 40],
        [800, 40, 150, 180, 280, 600, 51, -5, 40],
    ]
    csv = "\n".join(
        [",".join(["subject_id,study_id,cart_id,ecg_time,report_0,bandwidth", *names])]
        + [",".join(["1,2,3,2180-07-23 08:44:00,Sinus rhythm,0.005-150 Hz", *map(str, row)]) for row in rows]
    )
    table = mimic_iv_ecg.machine_measurements(write(tmp_path, {"machine_measurements.csv": csv}))
    assert table[names].notna().to_numpy().tolist()[0] == [
        False,
        False,
        False,
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    assert table.loc[1, names].tolist() == rows[1]
    assert "report_0" not in table.columns


# --- PTB-XL -------------------------------------------------------------------------------------------------

STATEMENTS = (
    ",description,diagnostic,form,rhythm,diagnostic_class\n"
    "NORM,normal ECG,1.0,,,NORM\nLVH,left ventricular hypertrophy,1.0,,,HYP\nLAFB,fascicular block,1.0,,,CD\n"
    "NST_,non-specific ST changes,1.0,1.0,,STTC\nSR,sinus rhythm,,,1.0,\nAFIB,atrial fibrillation,,,1.0,\n"
    "ABQRS,abnormal QRS,,1.0,,\n"
)


def ptb_xl_source(root: Path, codes: list[str], axes: list[str] | None = None, present: int | None = None) -> Storage:
    rows = ["ecg_id,patient_id,scp_codes,heart_axis,strat_fold,filename_lr,filename_hr"]
    files = {"scp_statements.csv": STATEMENTS}
    for number, cell in enumerate(codes, start=1):
        name = f"00000/{number:05d}"
        axis = axes[number - 1] if axes else ""
        rows.append(f'{number},{1000 + number // 2}.0,"{cell}",{axis},1,records100/{name}_lr,records500/{name}_hr')
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
    record = read_relative(table["path"][499], storage.read_bytes)
    assert (record.record_id, record.leads) == ("00500_hr", LEADS)
    assert ptb_xl.is_database(labels)


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
    for path in table["path"][:20]:
        record = read_relative(path, storage.read_bytes, uv_per_lsb=COHORTS["ludb"].uv_per_lsb)
        assert quality_flags(record) == ()
