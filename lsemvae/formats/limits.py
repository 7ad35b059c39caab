"""What any recording may claim of itself, whatever its format, and the units that voltages come in."""

MAX_SIGNALS = 64
MAX_SAMPLES = 10_000_000
"""Of one signal."""
MAX_TOTAL_SAMPLES = 20_000_000
"""Of all signals together: 80 MB in the record that results."""
RATE_RANGE_HZ = (1.0, 100_000.0)
STEP_RANGE_UV = (1e-6, 1e6)
"""Microvolts a count. Outside of it the gain is a mistake, and millivolts could overflow float32."""
UV_PER_UNIT = {"v": 1e6, "mv": 1e3, "uv": 1.0, "\u00b5v": 1.0, "\u03bcv": 1.0, "nv": 1e-3}
"""By the unit's name in lower case."""
