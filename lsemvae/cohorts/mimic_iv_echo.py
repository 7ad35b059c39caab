"""MIMIC-IV-ECG with labels from MIMIC-IV-ECHO: each ECG gets the echocardiogram of its patient that is nearest in time.

The source is MIMIC-IV-ECG with the table of structured measurements beside record_list.csv. A row of that table is one
measurement: subject, time, name, result, unit. Only resting transthoracic studies (`test_type` "tte") are used.

The table has no pulmonary artery systolic pressure (PASP) of its own. Where it has none under the name `pasp`, PASP is
4 v^2 of the tricuspid regurgitation (the gradient, if the velocity is absent) plus the right atrial pressure, which is
read from the words for the inferior vena cava (IVC).
"""

import gzip
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from lsemvae.cohorts import labels as definitions
from lsemvae.cohorts import mimic_iv_ecg
from lsemvae.cohorts.tables import LABEL_PREFIX, documented_labels, plausible, read_table, require_columns
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

MEASUREMENTS = tuple(f"structured{mark}measurement.csv{end}" for mark in "_-" for end in ("", ".gz"))
"""Names of the table: public descriptions and the release spell it differently."""
DAYS = 90.0
"""How far an echocardiogram may be from the ECG."""

COLUMNS = {
    "subject": "subject_id",
    "time": "measurement_datetime",
    "name": "measurement",
    "value": "result",
    "unit": "unit",
    "type": "test_type",
}
"""What a column holds -> its name. `unit` and `type` may be absent."""
NAMES = {
    "pasp": "pasp",
    "tr_velocity": "tr_velocity",
    "tr_gradient": "tr_mmhg",
    "rv_function": "rv_function",
    "ivc": "ivc",
}
"""Measurement -> how the column of names calls it."""

NORMAL_RAP_MMHG, HIGH_RAP_MMHG = 3.0, 15.0
_MMHG = {"mmhg": 1.0, "mm hg": 1.0}
_UNITS = {
    "pasp": ("pasp_mmhg", _MMHG),
    "tr_gradient": ("tr_gradient_mmhg", _MMHG),
    "tr_velocity": ("tr_velocity_m_s", {"m/s": 1.0, "m/sec": 1.0, "cm/s": 0.01, "cm/sec": 0.01}),
}
"""Measurement -> its documented name, and factors of units. An empty unit is that of the release: mmHg or m/s."""
_CHUNK_ROWS = 500_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EchoOptions:
    """How ECGs and echocardiograms are matched, and what the table calls things: `COLUMNS` and `NAMES` by default."""

    days: float = DAYS
    names: Mapping[str, str] = field(default_factory=lambda: COLUMNS | NAMES)

    @classmethod
    def of(cls, days: float | None, names: Sequence[str]) -> "EchoOptions":
        """`names` are pairs such as "value=result". Raises LsemvaeError."""
        days = DAYS if days is None else days
        if not 0 <= days <= 3650:
            raise LsemvaeError(f"--echo-days is {days:g}: give a number of days from 0 to 3650")
        given = dict(pair.split("=", 1) for pair in names if "=" in pair)
        known = COLUMNS | NAMES
        if len(given) < len(names) or not given.keys() <= known.keys() or not all(given.values()):
            raise LsemvaeError(
                f"--echo-columns is {' '.join(names)}: give pairs such as value=result, each of {', '.join(known)} once"
            )
        return cls(days, known | given)


def recordings(storage: Storage, labels: pd.DataFrame | None, echo: EchoOptions | None = None) -> pd.DataFrame:
    """The recordings of MIMIC-IV-ECG; labels of the user, and those in the source, come before those of the echo."""
    echo = EchoOptions() if echo is None else echo
    table = mimic_iv_ecg.recordings(storage, labels)
    times = read_table(storage, mimic_iv_ecg.RECORD_LIST, only=["study_id", "ecg_time"])
    require_columns(times, mimic_iv_ecg.RECORD_LIST, "ecg_time")
    ecg_time = pd.to_datetime(times["ecg_time"], errors="coerce").astype("datetime64[ns]")
    measured = echo_labels(storage, echo)
    nearest = _nearest(table["subject_id"], ecg_time, measured, echo.days).add_prefix(LABEL_PREFIX)
    logger.info(
        f"{int(nearest.notna().any(axis=1).sum())} of {len(table)} ECGs have an echocardiogram within {echo.days:g} "
        f"days; {int(ecg_time.isna().sum())} have no time"
    )
    return table.join(nearest[[name for name in nearest.columns if name not in table.columns]])


def echo_labels(storage: Storage, echo: EchoOptions) -> pd.DataFrame:
    """subject, time, and the labels of each echocardiogram that has any, in the order of time."""
    name = next((name for name in MEASUREMENTS if storage.exists(name)), MEASUREMENTS[0])
    rows = _rows(storage, name, echo.names)
    found = pd.DataFrame(index=rows.groupby(["subject", "time"]).size().index)
    values = {measurement: rows[rows["name"] == measurement] for measurement in NAMES}
    numbers = {measurement: _numbers(values[measurement], measurement, name) for measurement in _UNITS}
    grades, ivc = values["rv_function"]["value"], values["ivc"]["value"]
    numbers["rv_dysfunction"] = pd.Series(definitions.rv_dysfunction(grades), grades.index)
    numbers["rap_mmhg"] = ivc.map(right_atrial_pressure_mmhg).astype("float64")
    for measurement, series in numbers.items():
        found[measurement] = series.groupby([rows["subject"], rows["time"]]).max()  # of repeats: the peak

    from_gradient = pd.Series(definitions.tr_velocity_m_s(found["tr_gradient"]), found.index)
    found["tr_velocity_m_s"] = found.pop("tr_velocity").fillna(from_gradient)
    estimate = 4 * found["tr_velocity_m_s"] ** 2 + found.pop("rap_mmhg").fillna(NORMAL_RAP_MMHG)
    pasp_mmhg = found.pop("pasp").fillna(estimate.round(1))
    found["pasp_mmhg"] = pasp_mmhg.where(pasp_mmhg.between(*definitions.PLAUSIBLE["pasp_mmhg"]))
    found = documented_labels(found.drop(columns="tr_gradient"), name)
    return found.dropna(how="all").reset_index().sort_values("time", kind="stable", ignore_index=True)


def right_atrial_pressure_mmhg(ivc: str) -> float:
    """What the words for the inferior vena cava say of the pressure: the middle of "(5-10mmHg)", 15 for ">15mmHg".

    15 where it is "dilated" without a number, and 3, the normal value, for all else (Rudski et al. 2010, ASE).
    """
    words = ivc.casefold()
    if between := re.search(r"(\d+)\s*-\s*(\d+)\s*mm\s?hg", words):
        return (int(between[1]) + int(between[2])) / 2
    if above := re.search(r">\s*(\d+)\s*mm\s?hg", words):
        return float(above[1])
    return HIGH_RAP_MMHG if "dilated" in words else NORMAL_RAP_MMHG


def _nearest(subjects: pd.Series, ecg_time: pd.Series, measured: pd.DataFrame, days: float) -> pd.DataFrame:
    """For each ECG the labels of its subject's nearest echocardiogram, NaN where there is none within `days`."""
    ecgs = pd.DataFrame({"subject": subjects.astype(str), "time": ecg_time}).reset_index(names="row")
    ecgs = ecgs.dropna(subset="time").sort_values("time", kind="stable")
    joined = pd.merge_asof(
        ecgs, measured, on="time", by="subject", direction="nearest", tolerance=pd.Timedelta(days=days)
    )
    return joined.set_index("row").drop(columns=["subject", "time"]).reindex(subjects.index)


def _rows(storage: Storage, name: str, names: Mapping[str, str]) -> pd.DataFrame:
    """subject, time, name (a key of `NAMES`), value and unit of the rows that are needed; others are never kept."""
    meaning = {names[key].strip().casefold(): key for key in NAMES}
    parts, other_names, without_time = [], set[str](), 0
    for chunk in _chunks(storage, name, names):
        called = chunk["name"].str.strip().str.casefold()
        if len(other_names) < 1000:
            other_names |= set(called.dropna()) - meaning.keys()
        chunk = chunk.assign(name=called.map(meaning)).dropna(subset=["name", "value", "subject"])
        if "type" in chunk.columns:
            chunk = chunk[chunk["type"].str.strip().str.casefold() == "tte"]
        time = pd.to_datetime(chunk["time"], errors="coerce").astype("datetime64[ns]")
        without_time += int(time.isna().sum())
        parts.append(chunk.assign(time=time).dropna(subset="time"))
    rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if rows.empty:
        raise LsemvaeError(
            f"{name} has no measurement named {', '.join(names[key] for key in NAMES)} of a transthoracic study with a "
            f"time; among its names are {', '.join(sorted(other_names)[:10]) or 'none'}: name yours with "
            "--echo-columns tr_velocity=NAME"
        )
    if without_time:
        logger.warning(f"{name}: {without_time} measurements have no time that can be read and are left out")
    return rows


def _chunks(storage: Storage, name: str, names: Mapping[str, str]) -> Iterator[pd.DataFrame]:
    """The needed columns, as text and under the keys of `COLUMNS`, in chunks: the table has millions of rows."""
    wanted = {names[key]: key for key in COLUMNS}
    try:
        with storage.reading(name) as stream:
            content = gzip.GzipFile(fileobj=stream) if name.endswith(".gz") else stream
            reader = pd.read_csv(
                content, dtype=str, usecols=lambda column: column in wanted, chunksize=_CHUNK_ROWS, index_col=False
            )
            for chunk in reader:
                if absent := [key for key in ("subject", "time", "name", "value") if names[key] not in chunk.columns]:
                    raise LsemvaeError(
                        f"{name} has no column {', '.join(names[key] for key in absent)}: name yours with "
                        f"--echo-columns {' '.join(f'{key}=COLUMN' for key in absent)}, or use --cohort mimic-iv-ecg"
                    )
                yield chunk.rename(columns=wanted)
    except (ValueError, EOFError, zlib.error) as error:
        if isinstance(error, LsemvaeError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise LsemvaeError(f"{name} is not a CSV with a header line ({reason}): download it again") from None


def _numbers(rows: pd.DataFrame, measurement: str, name: str) -> pd.Series:
    """Values in mmHg or m/s; NaN for an unknown unit and for what is impossible, which warnings count."""
    documented, factors = _UNITS[measurement]
    if "unit" not in rows.columns:
        return plausible(rows["value"], documented, name)
    unit = rows["unit"].fillna("").str.strip().str.casefold()
    factor = unit.map({"": 1.0, **factors}).astype("float64")
    if unknown := int(factor.isna().sum()):
        shown = repr(unit[factor.isna()].iloc[0][:20])
        logger.warning(f"{name}: {unknown} values of {measurement} have a unit such as {shown} and are not used")
    known = factor.notna()
    return plausible(rows["value"][known], documented, name, factor[known])
