"""Which files of a listing are recordings, decided by their content, and why the others are not."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from lsemvae.formats import dicom, plain, wfdb, xml
from lsemvae.formats.readers import HEAD_BYTES, reader_of

Head = Callable[[str, int], bytes]
"""Path and number -> as many bytes from the beginning of the file, such as `Storage.head`."""

SUFFIXES = (".hea", ".xml", ".dcm", ".scp", ".atc", ".npy")
"""How the main files of recordings usually end. Their content decides what they are."""
UNSURE_SUFFIXES = (".csv", ".json")
"""How some recordings end, but tables, labels and side files too."""

_SURE_SUFFIXES = (".hea", ".dcm", ".scp", ".atc", ".npy")
_TABLE_SUFFIXES = (".csv", ".tsv")
_CONCURRENT_READS = 32

# How files begin that are no recordings this package reads -> code, what they are and what to do.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "hdf5", "HDF5 (.h5): export its recordings as WFDB, NPY or CSV"),
    (b"MATLAB ", "matlab", "MATLAB (.mat) without a WFDB header: add its .hea file, or export it as NPY or CSV"),
    (b"\x1f\x8b", "compressed", "compressed with gzip: unpack it"),
    (b"PK\x03\x04", "compressed", "a ZIP archive (or a NumPy .npz or Office file): unpack it"),
    (b"BZh", "compressed", "compressed with bzip2: unpack it"),
    (b"\xfd7zXZ\0", "compressed", "compressed with xz: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "compressed", "a 7-Zip archive: unpack it"),
    (b"0       ", "edf", "EDF: convert it to WFDB"),
    (b"\xffBIOSEMI", "edf", "BDF: convert it to WFDB"),
    (b"%PDF", "document", "a PDF document"),
    (b"\x89PNG", "document", "an image"),
    (b"\xff\xd8\xff", "document", "an image"),
)


# What remains when no content is recognised.
_BY_SUFFIX: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (_TABLE_SUFFIXES, "table", "a table whose header row does not name leads"),
    ((".json",), "json", "JSON that is not a recording of the Kardia API"),
    ((".dat", ".mat"), "no_header", "signals without a WFDB header: put the .hea file of the same name beside it"),
)

_RECORDING = ("recording", "")
_COMPANION = ("companion", "")


@dataclass(frozen=True)
class PassedOver:
    """A file that is not taken for a recording. `code` is a short word for counts, `reason` a phrase for people."""

    path: str
    code: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The main files of recordings, and the other files except those that belong to a recording."""

    recordings: list[str]
    passed_over: list[PassedOver]


def find_recordings(paths: Iterable[str], head: Head) -> Listing:
    """Sorts a listing of files into main files of recordings and files that are passed over, both in its order.

    A file is a recording if its beginning is that of a known format, whatever its name. Two text formats, WFDB headers
    and CSV, are only recognised under their own suffixes, because notes can begin like them. A file that ends in .hea,
    .dcm, .scp, .atc or .npy counts as a recording even if it cannot be read, and so does XML that is not well-formed:
    it is then reported as unreadable, not dropped.

    Neither recordings nor passed over are the files beside a recording: `X.*` beside `X.hea`, and `X.json` beside
    `X.csv` or `X.npy`. Hidden files, such as the `._X.hea` of macOS, are passed over without a look.

    `head` is called for files whose name does not decide, 32 at a time; its errors pass through.
    """
    paths = list(paths)
    beside_header = {path.lower().removesuffix(".hea") for path in paths if path.lower().endswith(".hea")}
    with_side_file = {_stem(path) for path in paths if path.lower().endswith((".csv", ".tsv", ".npy"))}

    def judge(path: str) -> tuple[str, str]:
        name = path.lower()
        if any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts):
            return "hidden", "a hidden file"
        if name.endswith(_SURE_SUFFIXES):
            return _RECORDING
        if _stem(path) in beside_header and not name.endswith(SUFFIXES + UNSURE_SUFFIXES):
            return _COMPANION
        verdict = _judge_content(name, head(path, HEAD_BYTES)[:HEAD_BYTES])
        has_owner = name.endswith(".json") and _stem(path) in with_side_file | beside_header
        return _COMPANION if has_owner and verdict != _RECORDING else verdict

    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        verdicts = list(zip(paths, pool.map(judge, paths), strict=True))
    return Listing(
        recordings=[path for path, verdict in verdicts if verdict == _RECORDING],
        passed_over=[
            PassedOver(path, *verdict) for path, verdict in verdicts if verdict not in (_RECORDING, _COMPANION)
        ],
    )


def _stem(path: str) -> str:
    """`"a/X.ECG.csv"` -> `"a/x.ecg"`."""
    folder, slash, name = path.lower().rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def _judge_content(name: str, head: bytes) -> tuple[str, str]:
    """Code and reason, by the beginning of a file; `name` is in lower case."""
    reader = reader_of(head)
    if reader in (wfdb.read, plain.read_csv) and not name.endswith(_TABLE_SUFFIXES):
        reader = None
    if reader is dicom.read and not dicom.may_hold_waveform(head):
        return "no_waveform", "DICOM without a waveform, such as an image, a report or a DICOMDIR"
    if reader is not None:
        return _RECORDING
    for signature, code, reason in _SIGNATURES:
        if head.startswith(signature):
            return code, reason
    if name.endswith(".xml"):
        root = xml.root_name(head)
        known = "CardioSoft, GE MUSE, Philips and aECG can be read"
        return ("other_xml", f"XML with the root element {root[:40]!r}: {known}") if root else _RECORDING
    for suffixes, code, reason in _BY_SUFFIX:
        if name.endswith(suffixes):
            return code, reason
    return ("document", "a text file") if _is_text(head) else ("unknown", "of no known format")


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-8", "ignore")  # the head may end within a character
    return len(head) - len(text.encode()) < 4 and all(part.isprintable() for part in text.split())
