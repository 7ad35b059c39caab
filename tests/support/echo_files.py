"""EchoNext, and MIMIC-IV-ECHO beside MIMIC-IV-ECG, made by the tests in the published layout."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

SIZES = {"train": 5, "val": 2, "test": 3, "no_split": 2}
"""Of a small EchoNext. The published one has 72,475, 4,626, 5,442 and 17,457 ECGs."""

ECHONEXT_COLUMNS = (
    *("ecg_key", "patient_key", "split", "sex", "age_at_ecg", "race_ethnicity", "location_setting"),
    *("acquisition_year", "most_recent_ecg", "ventricular_rate", "atrial_rate", "pr_interval", "qrs_duration"),
    *("qt_corrected", "lvef_value", "lvef_lte_45_flag", "pasp_value", "pasp_gte_45_flag", "tr_max_velocity_value"),
    *("tr_max_gte_32_flag", "tricuspid_regurgitation_value", "rv_systolic_function_value"),
    *("rv_systolic_dysfunction_moderate_or_greater_flag", "shd_moderate_or_greater_flag"),
)
UNMEASURED: Mapping[str, object] = {
    "pasp_value": "",
    "pasp_gte_45_flag": 0,
    "tr_max_velocity_value": "",
    "tr_max_gte_32_flag": 0,
    "rv_systolic_function_value": "",
    "rv_systolic_dysfunction_moderate_or_greater_flag": 0,
}
"""The trap of the published table: where nothing was measured, the flags are 0."""


def rows(
    sizes: Mapping[str, int] = SIZES, measured: Mapping[int, Mapping[str, object]] | None = None
) -> list[dict[str, object]]:
    """Rows of the table, split after split, two ECGs a patient, nothing measured but what `measured` gives by row."""
    splits = [split for split, size in sizes.items() for _ in range(size)]
    common = {"sex": "Female", "age_at_ecg": 61, "acquisition_year": 2015, "ventricular_rate": 72, **UNMEASURED}
    return [
        {"ecg_key": f"{number:06d}", "patient_key": f"{number // 2:05d}", "split": split, **common}
        | dict((measured or {}).get(number, {}))
        for number, split in enumerate(splits)
    ]


def echonext_csv(listed: Iterable[Mapping[str, object]]) -> str:
    """With the unnamed column of row numbers that pandas writes."""
    lines = ["," + ",".join(ECHONEXT_COLUMNS)]
    for number, row in enumerate(listed):
        lines.append(f"{number}," + ",".join(str(row.get(name, "")) for name in ECHONEXT_COLUMNS))
    return "\n".join(lines) + "\n"


def standardised(count: int, seed: int = 0) -> np.ndarray:
    """float64 [N, 1, 2500, 12] in standard deviations: beats of another height and sign in each lead, and noise."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(2500) / 250
    heights_L = np.array([4.0, 6, 3, -5, 2, 4, -4, 3, 5, 7, 6, 5])
    beats_NT = [np.exp(-0.5 * (((time_s + phase) % 0.8 - 0.4) / 0.02) ** 2) for phase in rng.uniform(0, 0.8, count)]
    values = np.stack(beats_NT)[:, None, :, None] * heights_L if count else np.empty((0, 1, 2500, 12))
    return values + 0.1 * rng.standard_normal(values.shape)


def write_echonext(
    root: Path,
    listed: Sequence[Mapping[str, object]] | None = None,
    *,
    table: str = "echonext_metadata_100k.csv",
    splits: Iterable[str] = SIZES,
) -> dict[str, np.ndarray]:
    """Write the table and the files of these splits -> their arrays."""
    listed = rows() if listed is None else listed
    root.mkdir(parents=True, exist_ok=True)
    (root / table).write_text(echonext_csv(listed))
    arrays = {}
    for number, split in enumerate(splits):
        arrays[split] = standardised(sum(row["split"] == split for row in listed), seed=number)
        np.save(root / f"EchoNext_{split}_waveforms.npy", arrays[split])
    return arrays


def write_sparse(path: Path, count: int) -> None:
    """A file of the published shape and size whose samples are zeros that take no disk."""
    with path.open("wb") as stream:
        header = {"descr": "<f8", "fortran_order": False, "shape": (count, 1, 2500, 12)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.truncate(stream.tell() + count * 2500 * 12 * 8)


# --- MIMIC-IV-ECHO ------------------------------------------------------------------------------------------

MEASUREMENT_COLUMNS = (
    *("subject_id", "measurement_id", "measurement_datetime", "test_type"),
    *("measurement", "measurement_description", "result", "unit"),
)


def measurements_csv(measured: Iterable[Sequence[object]], columns: Sequence[str] = MEASUREMENT_COLUMNS) -> str:
    """Rows of subject, time, name, value, unit and, if given, the kind of study, which is otherwise "tte"."""
    lines = [",".join(columns)]
    for number, (subject, time, name, value, unit, *kind) in enumerate(measured):
        cells = [subject, number, time, *(kind or ["tte"]), name, f"about {name}", f'"{value}"', unit]
        lines.append(",".join(map(str, cells)))
    return "\n".join(lines) + "\n"


def record_list(ecgs: Iterable[tuple[str, str, str]]) -> str:
    """record_list.csv of MIMIC-IV-ECG from subject, study and time."""
    lines = ["subject_id,study_id,file_name,ecg_time,path"]
    for subject, study, time in ecgs:
        lines.append(f"{subject},{study},{study},{time},files/p{subject[:4]}/p{subject}/s{study}/{study}")
    return "\n".join(lines) + "\n"
