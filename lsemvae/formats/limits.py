"""Limits for recordings of every format, and the units of voltage that can be read."""

MAX_SIGNALS = 64
MAX_SAMPLES = 10_000_000
"""In one signal."""
MAX_TOTAL_SAMPLES = 20_000_000
"""In all signals together; the record then takes 80 MB."""
RATE_RANGE_HZ = (1.0, 100_000.0)
STEP_RANGE_UV = (1e-6, 1e6)
"""Microvolts a count. A gain outside of this range is a mistake, and the millivolts could overflow float32."""
UV_PER_UNIT = {"v": 1e6, "mv": 1e3, "uv": 1.0, "\u00b5v": 1.0, "\u03bcv": 1.0, "nv": 1e-3}
"""By the name of the unit in lower case."""
GIVE_STEP = "if you know its step in microvolts, read it with lsemvae.formats.read(path, uv_per_lsb=STEP)"
"""The end of messages about a step that the file lacks or states wrongly."""
