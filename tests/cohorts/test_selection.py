"""Which cohort a source is, and what is left out: nothing is dropped without a word."""

import logging
import shutil
from pathlib import Path

import pytest

from lsemvae.cohorts import describe_left_out, detect, select
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

KARDIA_JSON = '{"data": {"raw": {"frequency": 300, "amplitudeResolution": 500, "samples": {}}}}'


def write(root: Path, files: dict[str, str]) -> Storage:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Storage.open(root)


def used_and_left_out(storage: Storage, **asked: str) -> tuple[str, list[str], dict[str, str]]:
    chosen = select(storage, **asked)
    return chosen.name, chosen.table["path"].tolist(), {file.path: file.code for file in chosen.left_out}


def test_one_kardia_recording_among_others_drops_none_of_them(tmp_path: Path):
    files = dict.fromkeys(("1.atc", "a/2.hea", "a/2.dat", "a/3.hea", "b/4.dcm"), "")
    name, used, left_out = used_and_left_out(write(tmp_path, files))
    assert (name, used, left_out) == ("folder", ["1.atc", "a/2.hea", "a/3.hea", "b/4.dcm"], {})


def test_a_recording_that_is_there_as_atc_and_json_is_taken_once(tmp_path: Path):
    storage = write(tmp_path, {"1.atc": "", "1.json": KARDIA_JSON, "2.json": KARDIA_JSON, "3.hea": ""})
    assert used_and_left_out(storage) == ("folder", ["1.atc", "2.json", "3.hea"], {})


def test_what_a_named_cohort_does_not_take_is_named(tmp_path: Path):
    storage = write(tmp_path, {"1.atc": "", "2.hea": "", "2.dat": "", "3.dcm": "", "notes.txt": "a", ".DS_Store": ""})
    name, used, left_out = used_and_left_out(storage, name="kardia")
    assert (name, used) == ("kardia", ["1.atc"])
    assert left_out == {"2.hea": "other_recording", "3.dcm": "other_recording", "notes.txt": "document"}


@pytest.mark.parametrize("other", ["z/1.hea", "z/1.dcm", "0.atc"])
def test_uk_biobank_among_others_is_ambiguous(tmp_path: Path, other: str):
    storage = write(tmp_path, {"deep/1000012_20205_2_0.xml": "", "deep/1000012_20205_3_0.xml": "", other: ""})
    with pytest.raises(LsemvaeError) as caught:
        detect(storage)
    assert "2 recordings named as those of UK Biobank and 1 others" in str(caught.value)
    assert other in str(caught.value) and "--cohort ukb-20205" in str(caught.value)
    _, used, left_out = used_and_left_out(storage, name="ukb-20205")
    assert (used, left_out) == (["deep/1000012_20205_2_0.xml"], {other: "other_recording"})
    assert len(select(storage, "folder").table) == 3


@pytest.mark.shared_data
def test_other_xml_is_told_by_its_content(tmp_path: Path, shared_data: Path):
    write(tmp_path, {"1000012_20205_2_0.xml": "", "1000012_6025_0_0.xml": "", "manifest.xml": "<files/>"})
    assert used_and_left_out(Storage.open(tmp_path))[2] == {
        "1000012_6025_0_0.xml": "other_recording", "manifest.xml": "other_xml"
    }  # fmt: skip
    shutil.copy(shared_data / "formats" / "cardiosoft" / "resting_12lead.xml", tmp_path / "resting.xml")
    with pytest.raises(LsemvaeError, match=r"1 others \(resting\.xml\)"):
        detect(Storage.open(tmp_path))


def test_tables_of_two_cohorts_are_ambiguous(tmp_path: Path):
    storage = write(tmp_path, {"record_list.csv": "", "aspire.csv": ""})
    with pytest.raises(LsemvaeError, match=r"record_list\.csv \(of mimic-iv-ecg\) and aspire\.csv \(of aspire\)"):
        detect(storage)


def test_files_that_are_no_recordings_are_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    files = {"1.hea": "", "1.dat": "", "._1.hea": "", "pom.xml": "<project/>", "results.csv": "model,auroc\na,0.9\n"}
    files |= {"labels/ph.csv": "file,ph\n1.hea,1\n", "withdrawn.csv": "99\n"}
    storage = write(tmp_path, files)
    chosen = select(storage, labels=storage.path("labels/ph.csv"))
    assert chosen.table["path"].tolist() == ["1.hea"]
    assert {file.path: file.code for file in chosen.left_out} == {"pom.xml": "other_xml", "results.csv": "table"}
    shown = describe_left_out(chosen.left_out)
    assert "pom.xml" in shown and "results.csv" in shown
    logged = "\n".join(record.message for record in caplog.records)
    assert "files that are left out: 1 other xml, 1 table" in logged and "pom" not in logged


def test_a_cycle_of_links_multiplies_nothing(tmp_path: Path):
    write(tmp_path, dict.fromkeys(("a/1.hea", "a/2.hea", "3.hea"), ""))
    (tmp_path / "a" / "again").symlink_to("..")
    assert len(select(Storage.open(tmp_path)).table) == 3


def test_two_recordings_of_one_id_are_named_by_their_paths(tmp_path: Path):
    row = "1,7,{'NORM': 100.0},records/1_hr,\n"
    storage = write(
        tmp_path,
        {
            "records/1_hr.hea": "", "records/2_hr.hea": "",
            "scp_statements.csv": ",diagnostic,rhythm,diagnostic_class\nNORM,1,,NORM\n",
            "ptbxl_database.csv": "ecg_id,patient_id,scp_codes,filename_hr,heart_axis\n"
            + row + row.replace("/1", "/2"),
        },
    )  # fmt: skip
    with pytest.raises(LsemvaeError, match="the first are records/1_hr and records/2_hr"):
        select(storage)


def test_who_has_withdrawn_is_left_out_of_every_cohort(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    files = dict.fromkeys(("1.hea", "2.hea", "3.hea", "1000012_20205_2_0.xml"), "")
    labels = "file,patient_id,ph\n1.hea,0007,1\n2.hea,B8,0\n3.hea,B9,0\n"
    storage = write(tmp_path / "in", files | {"withdrawn.csv": "7\n1000012\n"})
    beside = write(tmp_path / "beside", {"labels.csv": labels, "list.csv": "patient_id\nB8\n"})
    asked = {"name": "folder", "labels": beside.path("labels.csv")}
    assert select(storage, **asked).table["path"].tolist() == ["2.hea", "3.hea"]
    chosen = select(storage, **asked, withdrawn=beside.path("list.csv"))
    assert chosen.table["path"].tolist() == ["3.hea"]
    logged = "\n".join(record.message for record in caplog.records)
    assert f"3 recordings of subjects who have withdrawn are left out (list {chosen.withdrawn.digest} of 3" in logged
    assert "0007" not in logged and "B8" not in logged
    with pytest.raises(LsemvaeError, match="does not exist"):
        select(storage, **asked, withdrawn=beside.path("none.csv"))


def test_dicom_without_extension_becomes_ph_from_a_table_of_pressures(tmp_path: Path, shared_data: Path):
    """Neither a cohort nor a label is named: the columns say what they are."""
    for number in (1, 2):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(
            shared_data / "formats" / "dicom" / "resting_12lead_500hz.dcm", tmp_path / "in" / f"IM00000{number}"
        )
    table = write(tmp_path, {"rhc.csv": "file;patient;mPAP (mmHg)\nIM000001;a;43\nIM000002;b;12\n"})
    chosen = select(Storage.open(tmp_path / "in"), labels=table.path("rhc.csv"))
    assert chosen.name == "folder" and chosen.left_out == []
    assert chosen.table["label.ph"].tolist() == [1, 0] and chosen.table["subject_id"].tolist() == ["a", "b"]


def test_the_help_names_every_cohort():
    import cohort  # has the options of score.py and explain.py
    import ingest

    from lsemvae.cohorts import COHORTS

    for options in (ingest, cohort):
        text = Path(options.__file__).read_text()
        assert all(name in text for name in COHORTS), options
