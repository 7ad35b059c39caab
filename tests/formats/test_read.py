"""What every format has in common: recognised by content, harmless when hostile, silent about who was recorded.

A new reader joins by an entry in `EXAMPLES`.
"""

import contextlib
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import alivecor_files, cardiosoft_files, clinical_files, dicom_files, plain_files, wfdb_files
from support.apart import Apart, Hung, in_memory, reads_or_refuses

from lsemvae import formats
from lsemvae.data.shards import pack, unpack
from lsemvae.errors import UnreadableRecording
from lsemvae.formats import READERS, find_recordings, read_record
from lsemvae.leads import LEADS
from lsemvae.record import Record
from lsemvae.storage import Storage

# Name of the format -> files of a small recording, the main one first. "SECRET" stands where identifiers do.
EXAMPLES: dict[str, Mapping[str, bytes]] = {
    "wfdb": wfdb_files.VALID,
    "cardiosoft": cardiosoft_files.EXAMPLE,
    "atc": alivecor_files.EXAMPLE,
    "kardia": alivecor_files.KARDIA_EXAMPLE,
    "csv": plain_files.CSV_EXAMPLE,
    "npy": plain_files.NPY_EXAMPLE,
    "dicom": {"a.dcm": dicom_files.dicom_bytes(dicom_files.group(dicom_files.random_raw()))},
    **{kind: {"a.ecg": build(clinical_files.random_raw())} for kind, build in clinical_files.BUILDERS.items()},
}
FORMATS = pytest.mark.parametrize("files", EXAMPLES.values(), ids=EXAMPLES)
KARDIA = alivecor_files.KARDIA_EXAMPLE["six.json"]
XML_ROOTS = ["CardiologyXML", "RestingECG", "restingecgdata", "AnnotatedECG"]


def main_of(files: Mapping[str, bytes]) -> str:
    return next(iter(files))


def read_files(files: Mapping[str, bytes], name: str | None = None) -> Record:
    return read_record(name or main_of(files), in_memory(files))


def refusal(content: bytes) -> UnreadableRecording:
    with pytest.raises(UnreadableRecording) as caught:
        read_files({"a.bin": content})
    assert "a.bin" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return caught.value


def readers_of(content: bytes) -> list[formats.Reader]:
    return [reader for recognise, reader in READERS if recognise(content[:4096])]


# --- recognised by content ----------------------------------------------------------------------------------


def test_every_reader_has_an_example() -> None:
    covered = {readers_of(files[main_of(files)])[0] for files in EXAMPLES.values()}
    assert covered == {reader for _, reader in READERS}


@FORMATS
def test_one_reader_recognises_it_under_any_name(files: Mapping[str, bytes]) -> None:
    main = main_of(files)
    assert len(readers_of(files[main])) == 1
    as_named = read_files(files)
    for suffix in (".bin", ".hea", ".xml", ".csv", ""):
        name = PurePath(main).stem + suffix
        renamed = {name: files[main]} | {other: files[other] for other in files if other != main}
        record = read_files(renamed)
        np.testing.assert_array_equal(record.signal_mv_LT, as_named.signal_mv_LT)


@FORMATS
def test_a_record_as_everything_behind_expects_it(files: Mapping[str, bytes]) -> None:
    record = read_files(files)
    assert list(record.leads) == [lead for lead in LEADS if lead in record.leads]
    assert set(record.derived) < set(record.leads)
    assert record.signal_mv_LT.dtype == np.float32
    assert record.record_id == PurePath(main_of(files)).stem
    assert "SECRET" not in f"{record.record_id} {record.subject_id} {record.flags}"
    assert 0 < np.nanmax(np.abs(record.signal_mv_LT)) < 100
    if record.uv_per_lsb_L is not None:  # shards hold the recorder's integers
        np.testing.assert_allclose(unpack(pack(record)).signal_mv_LT, record.signal_mv_LT, rtol=1e-6)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 5000, b"\xff" * 5000, b"{}", b"[]", b"<html></html>", b"<", b"%PDF-1.7", b"PK\x03\x04", b"GIF89a",
     b"record_id,ph\na,1\n", b'{"rate_hz": 500, "unit": "mV", "leads": ["I"]}', b"\xfe\xff", b"# comment\n",
     b"<?xml version='1.0'?><!-- <CardiologyXML> -->", b"<?xml version='1.0'?><other><CardiologyXML/></other>"],
)  # fmt: skip
def test_what_is_no_recording(content: bytes) -> None:
    assert readers_of(content) == []
    assert refusal(content).code == "format"


def test_files_of_a_folder() -> None:
    """Recordings by content; only the beginnings of files are read, and only of those whose name does not decide."""
    dicom = EXAMPLES["dicom"]["a.dcm"]
    csv = plain_files.CSV_EXAMPLE["a.csv"]
    recordings = {"b/x.hea": b"", "r.npy": b"", "a.csv": csv, "t.tsv": csv, "k.JSON": KARDIA, "cut.xml": b"garbage"}
    recordings |= {"DICOM/IM000001": dicom, "1.2.840.1": dicom, "muse.txt": EXAMPLES["muse"]["a.ecg"]}
    recordings |= {"X.XML": EXAMPLES["cardiosoft"]["a_20205_2_0.xml"], "k.atc.bak": EXAMPLES["atc"]["six.atc"]}
    companions = {"b/x.dat": b"", "b/x.atr": b"", "r.json": plain_files.NPY_EXAMPLE["a.json"]}
    image = dicom.replace(b"1.2.840.10008.5.1.4.1.1.9.1.1", b"1.2.840.10008.5.1.4.1.1.7.1.1", 1)
    passed_over = {
        "._x.hea": (b"\0\5\x16\7", "hidden"),
        ".cache/y.hea": (b"", "hidden"),
        "__MACOSX/z.atc": (b"", "hidden"),
        "labels.csv": (b"record_id,ph\na,1\n", "table"),
        "truth.json": (b"[1, 2]", "json"),
        "pom.xml": (b"<?xml version='1.0'?><project/>", "other_xml"),
        "notes.txt": (b"I,II\n1,2\n", "document"),
        "README": (b"Release 2 of this data set\n", "document"),
        "d.h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "hdf5"),
        "e.csv.gz": (b"\x1f\x8b\x08" + bytes(100), "compressed"),
        "f.mat": (b"MATLAB 5.0 MAT-file, Platform: GLNX86", "matlab"),
        "g.mat": (b"\1\0\2\0" * 100, "no_header"),
        "h.edf": (b"0       X X X X", "edf"),
        "IM000002": (image, "no_waveform"),
        "u.bin": (b"\xff\xfe\xfd" * 100, "unknown"),
    }
    files = recordings | companions | {path: content for path, (content, _) in passed_over.items()}
    asked = []

    def head(path: str, n_bytes: int) -> bytes:
        asked.append(path)
        assert n_bytes <= 4096
        return files[path][:n_bytes]

    listing = find_recordings(files, head)
    assert listing.recordings == list(recordings)
    assert {found.path: found.code for found in listing.passed_over} == {
        path: code for path, (_, code) in passed_over.items()
    }
    assert all(found.reason for found in listing.passed_over)
    by_name = {"b/x.hea", "r.npy", "b/x.dat", "b/x.atr", "._x.hea", ".cache/y.hea", "__MACOSX/z.atc"}
    assert sorted(asked) == sorted(files.keys() - by_name)


@FORMATS
def test_a_recording_is_found_under_any_name(files: Mapping[str, bytes]) -> None:
    """All but the two text formats that notes can begin like."""
    content = files[main_of(files)]
    is_text = readers_of(content)[0] in (formats.wfdb.read, formats.plain.read_csv)
    for name in ("IM000001", "a.bin", "scan.2024"):
        found = find_recordings([name], lambda path, n_bytes: content[:n_bytes])
        assert found.recordings == ([] if is_text else [name])


def test_a_listing_of_a_million_files_reads_a_bounded_number_at_once() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def head(path: str, n_bytes: int) -> bytes:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        with lock:
            now -= 1
        return b"{}"

    listing = find_recordings([f"p{number}.json" for number in range(5000)], head)
    assert len(listing.passed_over) == 5000
    assert most <= 32


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size first: a sparse file of a terabyte is refused in no memory, from a store as from a folder."""
    with (tmp_path / "a.csv").open("wb") as file:
        file.write(plain_files.CSV_EXAMPLE["a.csv"])
        file.truncate(2**40)
    for attempt in (
        lambda: formats.read(tmp_path / "a.csv"),
        lambda: formats.read_relative("a.csv", Storage.open(tmp_path).read_bytes),
    ):
        with pytest.raises(UnreadableRecording, match=r"'a\.csv' has 1099511627776 bytes") as caught:
            attempt()
        assert caught.value.code == "too_large"
    storage = Storage.open(tmp_path)
    assert find_recordings(storage.list(), storage.head).recordings == ["a.csv"]


@pytest.mark.shared_data
def test_odd_real_files(shared_data: Path) -> None:
    with pytest.raises(UnreadableRecording) as caught:
        formats.read(shared_data / "odd/empty.xml")
    assert "empty.xml" in str(caught.value)
    assert formats.read(shared_data / "odd/broken_checksum.atc").flags == ("checksum:I",)


# --- hostile files ------------------------------------------------------------------------------------------

opened: list[str] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if threading.get_ident() != threading.main_thread().ident:
        return
    if event == "open" and isinstance(arguments[0], str | Path):
        opened.append(str(arguments[0]))
    elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "pickle.find_class"):
        opened.append(event)


_audited: list[bool] = []


@contextmanager
def nothing_reached(max_bytes: int) -> Iterator[None]:
    """No file but modules and private copies is opened, no connection made, no more memory taken than this."""
    if not _audited:
        sys.addaudithook(_audit)
        _audited.append(True)
    opened.clear()
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    installed = (sys.prefix, sys.base_prefix)
    assert [path for path in opened if not path.startswith(installed) and "lsemvae-" not in path] == []
    assert peak < max_bytes


@FORMATS
def test_nothing_but_its_files_is_reached(files: Mapping[str, bytes]) -> None:
    read_files(files)  # libraries are imported
    with nothing_reached(4 * 2**20):
        read_files(files)


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
XML_ATTACKS = {
    "billion laughs": '<!DOCTYPE {0} [<!ENTITY l0 "lol">' + LAUGHS + "]><{0}>&l11;</{0}>",
    "quadratic blowup": '<!DOCTYPE {0} [<!ENTITY a "' + "a" * 50_000 + '">]><{0}>' + "&a;" * 10_000 + "</{0}>",
    "external file": '<!DOCTYPE {0} [<!ENTITY x SYSTEM "file:///etc/passwd">]><{0}>&x;</{0}>',
    "external address": '<!DOCTYPE {0} [<!ENTITY x SYSTEM "http://127.0.0.1:9/x">]><{0}>&x;</{0}>',
    "parameter entity": '<!DOCTYPE {0} [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x.dtd"> %x;]><{0}/>',
    "attribute defaults": '<!DOCTYPE {0} [<!ATTLIST {0} a CDATA "x">]><{0}/>',
    "empty subset": "<!DOCTYPE {0} []><{0}/>",
    "deep": "<{0}>" + "<a>" * 90_000 + "</a>" * 90_000 + "</{0}>",
    "unclosed and deep": "<{0}>" + "<a>" * 90_000,
    "wide": "<{0}>" + "<a/>" * 1_000_000 + "</{0}>",
    "attributes": "<{0} " + " ".join(f'a{i}=""' for i in range(300_000)) + "/>",
    "long": "<{0}>" + " " * 2**24 + "</{0}>",
    "include": '<{0} xmlns:xi="http://www.w3.org/2001/XInclude"><xi:include href="file:///etc/passwd"/></{0}>',
    "style sheet": '<?xml-stylesheet href="http://127.0.0.1:9/x.xsl"?><{0}/>',
}


@pytest.mark.parametrize("attack", XML_ATTACKS.values(), ids=XML_ATTACKS)
@pytest.mark.parametrize("root", XML_ROOTS)
def test_hostile_xml(root: str, attack: str) -> None:
    content = attack.replace("{0}", root).encode()
    with nothing_reached(len(content) + 4 * 2**20):
        error = refusal(content)
    if attack.startswith("<!DOCTYPE"):
        assert error.code == "unsafe_xml"
    elif len(content) > 10_000:
        assert error.code == "too_large"


def peak_bytes(content: bytes) -> int:
    """The most memory that this process has had when it has read this, what libraries in C allocate included."""
    with contextlib.suppress(UnreadableRecording):
        read_files({"a.bin": content})
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_xml_takes_little_memory_of_the_process() -> None:
    """tracemalloc above does not see what the XML parser allocates. Unfolded, the bombs take gigabytes."""
    apart = Apart(peak_bytes)
    before = apart(b"<?xml version='1.0'?><CardiologyXML/>")
    for root in XML_ROOTS:
        for name, attack in XML_ATTACKS.items():
            content = attack.replace("{0}", root).encode()
            assert apart(content) < before + 4 * 2**24 + 32 * 2**20, (root, name)  # the largest has 16 MiB
    apart.close()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig"])
def test_hostile_xml_in_other_encodings(encoding: str) -> None:
    content = XML_ATTACKS["billion laughs"].replace("{0}", "CardiologyXML").encode(encoding)
    with nothing_reached(4 * 2**20):
        error = refusal(content)
    assert error.code == ("format" if encoding == "utf-16-le" else "unsafe_xml")  # without its mark, it is unknown


def test_a_named_dtd_is_not_fetched() -> None:
    """GE MUSE names one. For the other formats a DOCTYPE is a reason to refuse."""
    for root, code in (("CardiologyXML", "unsafe_xml"), ("RestingECG", None)):
        for system in ("restecg.dtd", "file:///etc/passwd", "http://127.0.0.1:9/restecg.dtd"):
            with nothing_reached(4 * 2**20):
                error = refusal(f'<!DOCTYPE {root} SYSTEM "{system}"><{root}>&x;</{root}>'.encode())
            assert error.code == (code or "xml")  # the entity is not defined


ATTACKS: dict[str, tuple[bytes, str]] = {
    "atc: a block of 4 GiB": (alivecor_files.HEAD + b"ecg \xff\xff\xff\xff", "truncated"),
    "atc: a million blocks": (alivecor_files.HEAD + (b"none" + bytes(8)) * 10**6, "too_large"),
    "kardia: deep": (b'{"leadI":' + b"[" * 5000, "json"),
    "kardia: a million lists": (b'{"leadI":[' + b"[]," * 10**6, "too_large"),
    "kardia: large": (b'{"leadI":"' + b" " * 2**24, "too_large"),
    "csv: a million columns": (plain_files.DECLARED.encode() + b"I," * 10**6 + b"\n1\n", "header"),
    "csv: wide rows": (plain_files.DECLARED.encode() + b"I\n" + b"1," * 10**5, "length"),
    "csv: endless comments": (b"#\n" * 2000 + b"I\n" + b"#\n" * 10**6, "undeclared"),
    "csv: large": (b"I\n" + b"1" * 2**26, "too_large"),
    "npy: 10^12 samples": (plain_files.npy_header(plain_files.HUGE), "too_large"),
    "npy: a long header": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"(" * 10**6, "header"),
}


@pytest.mark.parametrize(("content", "code"), ATTACKS.values(), ids=ATTACKS)
def test_hostile_content(content: bytes, code: str) -> None:
    with nothing_reached(6 * len(content) + 4 * 2**20):
        assert refusal(content).code == code


# --- fuzz: only the reader's own error may come out ---------------------------------------------------------

TOKENS = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([b"0", b"-1", b"1e400", b"nan", b"99999999999", b",", b"\n", b'"', b"<", b">", b"&", b"[", b"{",
                     b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x80", b"null", b"I", b"II", b"-"]),
)  # fmt: skip


def hang(content: bytes) -> bytes:
    while b"end" not in content:
        time.sleep(0.1)
    return content


def test_a_read_that_hangs_is_ended_and_its_bytes_are_shown() -> None:
    apart = Apart(hang, bound_s=1.0)
    assert apart(b"the end") == b"the end"
    with pytest.raises(Hung, match=r"no answer within 1 s to .*for ever"):
        apart(b"for ever")
    assert apart(b"the end") == b"the end"
    apart.close()


@FORMATS
def test_mutated_files(files: Mapping[str, bytes]) -> None:
    @settings(deadline=None, max_examples=100)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = dict(files)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(files)))
            content = changed[name]
            start = data.draw(st.integers(0, len(content)))
            length = data.draw(st.sampled_from((0, 0, 1, 2, 4, 30, len(content))))
            changed[name] = content[:start] + data.draw(TOKENS) + content[start + length :]
        reads_or_refuses(changed)

    check()


@FORMATS
def test_cut_files(files: Mapping[str, bytes]) -> None:
    main = main_of(files)
    for end in np.linspace(0, len(files[main]) - 1, 60).astype(int).tolist():
        reads_or_refuses({**files, main: files[main][:end]})


@FORMATS
def test_any_bytes_behind_a_true_beginning(files: Mapping[str, bytes]) -> None:
    @settings(deadline=None, max_examples=60)
    @given(st.sampled_from((8, 12, 60, 200)), st.binary(max_size=200))
    def check(kept: int, rest: bytes) -> None:
        reads_or_refuses({main_of(files): files[main_of(files)][:kept] + rest})

    check()


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes(content: bytes) -> None:
    reads_or_refuses({"a.bin": content})


@FORMATS
def test_nothing_is_logged(files: Mapping[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    main = main_of(files)
    for content in (files[main], files[main][:-3], files[main].replace(b"5", b"\xff", 1)):
        with contextlib.suppress(UnreadableRecording):
            read_files({**files, main: content})
    assert "SECRET" not in caplog.text
