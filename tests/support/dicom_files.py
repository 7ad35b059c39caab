"""DICOM files, made by the tests."""

import io
from collections.abc import Mapping

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from lsemvae.leads import LEADS

NUMBERS = dict(zip(("I", "II", "V1", "V2", "V3", "V4", "V5", "V6"), range(1, 9), strict=True)) | dict(
    zip(("III", "aVR", "aVL", "aVF"), range(61, 65), strict=True)
)


def code(value: str, scheme: str, meaning: str = "") -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def channel(lead: str, *, source: Dataset | None = None, unit: str | None = "uV", **elements: object) -> Dataset:
    """One channel definition; an element given as None is absent."""
    item = Dataset()
    item.ChannelSourceSequence = [source or code(f"5.6.3-9-{NUMBERS[lead]}", "SCPECG", f"Lead {lead}")]
    if unit is not None:
        item.ChannelSensitivityUnitsSequence = [code(unit, "UCUM")]
    values = {"ChannelSensitivity": "5", "ChannelSensitivityCorrectionFactor": "1", "ChannelBaseline": "0"}
    values |= {"ChannelSampleSkew": "0", "WaveformBitsStored": 16} | elements
    for keyword, value in values.items():
        if value is not None:
            setattr(item, keyword, value)
    return item


def group(raw: Mapping[str, np.ndarray], channels: list[Dataset] | None = None, **elements: object) -> Dataset:
    """One multiplex group of the rows of `raw`, in their order."""
    raw_CT = np.stack(list(raw.values()))
    item = Dataset()
    item.ChannelDefinitionSequence = channels if channels is not None else [channel(lead) for lead in raw]
    values = {
        "MultiplexGroupLabel": "RHYTHM",
        "WaveformOriginality": "ORIGINAL",
        "NumberOfWaveformChannels": len(raw_CT),
        "NumberOfWaveformSamples": raw_CT.shape[1],
        "SamplingFrequency": "500",
        "WaveformBitsAllocated": 16,
        "WaveformSampleInterpretation": "SS",
        "WaveformData": raw_CT.T.astype(elements.pop("dtype", "<i2")).tobytes(),
    } | elements
    for keyword, value in values.items():
        if value is not None:
            setattr(item, keyword, value)
    if "WaveformData" in item:
        item["WaveformData"].VR = "OW"
    return item


def dicom_bytes(*groups: Dataset, syntax: str = ExplicitVRLittleEndian, undefined_length: bool = False) -> bytes:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.9.1.1", "1.2.3"
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "SECRET-77"
    if groups:
        dataset.WaveformSequence = Sequence(groups)
        dataset["WaveformSequence"].is_undefined_length = undefined_length
        dataset.WaveformSequence.is_undefined_length = undefined_length
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def random_raw(*leads: str, samples: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {lead: rng.integers(-3000, 3000, samples) for lead in leads or LEADS}
