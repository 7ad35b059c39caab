"""CSV and NPY files, made by the tests."""

import io
import json

import numpy as np

DECLARED = "# rate_hz: 500\n# unit: mV\n"


SIDE = {"rate_hz": 500, "unit": "mV", "leads": ["I", "II", "V1"]}


ARRAY_LT = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def npy(values: object, **options: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def npy_header(text: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode() + data


CSV_EXAMPLE = {"a.csv": f"{DECLARED}I,II,V1\n0.1,0.2,0.3\n0.15,-0.25,\n".encode()}


NPY_EXAMPLE = {"a.npy": npy(ARRAY_LT), "a.json": json.dumps(SIDE).encode()}


HUGE = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 12)}"
