"""Simulate one twelve-lead ECG, of a heart that is under more or less right-heart pressure.

The heart is a current dipole (a vectorcardiogram, VCG): a sum of Gaussians in time with a vector each for P,
QRS and T (Sameni, Clifford, Jutten & Shamsollahi 2007, "Multichannel ECG and noise modeling", EURASIP J Adv
Signal Process 2007:043407, which extends ECGSYN: McSharry, Clifford, Tarassenko & Smith 2003, IEEE Trans
Biomed Eng 50:289). Dower's matrix (as in Edenbrandt & Pahlm 1988, J Electrocardiol 21:361) projects it on
eight leads; III, aVR, aVL and aVF are exact arithmetic on I and II. The vectors are this project's own.

    dose = logistic((severity - 0.8) / 0.4)     scales the overload vectors that are added to P, QRS and T

`lsemvae.cohorts.simulated` draws the severity from a pressure, and writes whole cohorts.
"""

import math
from dataclasses import dataclass

import numpy as np

from lsemvae.leads import LIMB_FROM_I_II, LIMB_LEADS

RATE_HZ, SAMPLES = 500, 5000

# Frank's axes: x to the left, y to the feet, z to the back. Rows I, II, V1 … V6.
_DOWER = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
_LIMB_LEADS_FROM_I_II = np.array([(1, 0), (0, 1), *(LIMB_FROM_I_II[lead] for lead in LIMB_LEADS[2:])])
# Electrodes RA, LA, LL, V1 … V6: how the recorder computes the eight leads from their potentials.
_LEADS_FROM_ELECTRODES = np.zeros((8, 9))
_LEADS_FROM_ELECTRODES[:2, :3] = [[-1, 1, 0], [-1, 0, 1]]
_LEADS_FROM_ELECTRODES[2:] = np.hstack([np.full((6, 3), -1 / 3), np.eye(6)])

# Each row: seconds from the R peak at RR = 1 s, width (sd, seconds); x, y, z in mV; x, y, z added at dose 1.
_P = np.array(
    [
        [-0.150, 0.018, 0.05, 0.070, -0.045, 0.0, 0.13, -0.05],  # right atrium: P pulmonale
        [-0.112, 0.020, 0.07, 0.045, 0.030, -0.02, 0.02, 0.0],  # left atrium
    ]
)
_QRS = np.array(
    [
        [-0.024, 0.007, -0.12, -0.06, -0.24, 0, 0, 0],  # septum: small r in V1, q in V6
        [-0.002, 0.010, 1.20, 0.75, 0.05, -0.30, 0, 0],  # left ventricle
        [0.014, 0.010, 0.45, 0.25, 1.00, 0, 0, 0],  # left ventricle, back: S in V1 and V2
        [0.016, 0.012, 0, 0, 0, -0.85, 0.10, -1.45],  # right ventricle: R in V1, axis to the right
        [0.034, 0.011, 0, 0, 0, -0.60, 0.10, -0.20],  # right ventricle, late: S in V5 and V6
        [0.033, 0.009, -0.22, -0.20, 0.22, 0, 0, 0],  # base
    ]
)
_T = np.array(
    [
        [0.235, 0.055, 0.16, 0.07, -0.10, -0.08, -0.07, 0.22],  # strain: T inverted in V1 … V3
        [0.285, 0.034, 0.26, 0.14, -0.20, -0.12, -0.12, 0.36],
    ]
)


def _noise_spectra() -> np.ndarray:
    """Power [3, F] of white noise, muscle and baseline wander within 150 Hz, each of unit variance."""
    hz = np.fft.rfftfreq(SAMPLES, 1 / RATE_HZ)
    hz[0] = np.inf
    white = (hz <= 150).astype(float)
    muscle = white * (np.minimum(hz, 150) / 20) ** 2 / (1 + (hz / 20) ** 2) / (1 + (hz / 100) ** 4)
    spectra_3F = np.stack([white, muscle, (hz < 0.7) / hz**2])
    return spectra_3F / spectra_3F.sum(axis=1, keepdims=True)


_NOISE_SPECTRA = _noise_spectra()


@dataclass(frozen=True)
class EcgParameters:
    """One recording. The defaults are an average heart. Only `severity` depends on the pressure."""

    severity: float = 0.0
    heart_rate_bpm: float = 70.0
    atrial_fibrillation: bool = False
    rotation_rad: tuple[float, ...] = (0.0, 0.0, 0.0)  # of the heart about x, y, z
    gains: tuple[float, ...] = (1.0, 1.0, 1.0)  # amplitude of P, QRS, T
    stretches: tuple[float, ...] = (1.0, 1.0, 1.0)  # PR interval, QRS duration, QT interval
    overload: tuple[float, ...] = (1.0, 1.0, 1.0)  # how much of the overload P, QRS and T show
    noise_mv: tuple[float, ...] = (0.003, 0.006, 0.04, 0.03, 0.003)  # white, muscle, wander, breathing, mains
    mains_hz: float = 60.0


def simulate_ecg(parameters: EcgParameters, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, float]]:
    """Parameters -> millivolts [12, 5000] in the order of LEADS, and the true values of the cart's measurements.

    The measurements have the names, units (ms, degrees) and origin (P onset at 40 ms) of machine_measurements.csv;
    those of P are NaN in atrial fibrillation.
    """
    waves = _waves(parameters)
    r_s, rr_s = _beats(parameters, rng)
    eight_LT = _DOWER @ _dipole(parameters, waves, r_s, rr_s, rng)
    eight_LT += _LEADS_FROM_ELECTRODES @ _electrode_noise(parameters, rng)
    signal_mv_LT = np.vstack([_LIMB_LEADS_FROM_I_II @ eight_LT[:2], eight_LT[2:]])
    return signal_mv_LT, _measurements(parameters, waves, float(rr_s.mean()))


def true_waves(parameters: EcgParameters, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Onset and end in s, [N, 2], of each P, QRS and T that `simulate_ecg` makes with a generator in the same state.

    T begins with its main wave, 2.5 widths before the centre. The other edges are those of the measurements.
    """
    p, qrs, t = _waves(parameters)
    r_s, rr_s = _beats(parameters, rng)
    edges_s = {
        "P": (p[0, 0] - 2.5 * p[0, 1], p[-1, 0] + 2.5 * p[-1, 1]),
        "QRS": (qrs[0, 0] - 2.5 * qrs[0, 1], qrs[-1, 0] + 2.5 * qrs[-1, 1]),
        "T": (t[-1, 0] - 2.5 * t[-1, 1], t[-1, 0] + 2 * t[-1, 1]),
    }
    found = {wave: r_s[:, None] + np.array(edges) for wave, edges in edges_s.items()}
    found["T"] = r_s[:, None] + np.cbrt(rr_s)[:, None] * np.array(edges_s["T"])
    if parameters.atrial_fibrillation:
        found["P"] = np.empty((0, 2))
    return found


def _waves(parameters: EcgParameters) -> list[np.ndarray]:
    """The tables of P, QRS and T (each row: time s, width s; x, y, z mV) of this heart under its load."""
    from scipy.special import expit  # takes 0.2 s, and every process that reads a bundle imports this module

    dose = expit((parameters.severity - 0.8) / 0.4)
    (cx, cy, cz), (sx, sy, sz) = np.cos(parameters.rotation_rad), np.sin(parameters.rotation_rad)
    rotation = (
        np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        @ np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    )
    p_gain, qrs_gain, t_gain = parameters.gains
    gains = (0.0 if parameters.atrial_fibrillation else p_gain, qrs_gain, t_gain)
    waves = []
    for table, gain, stretch, share in zip(
        (_P, _QRS, _T), gains, parameters.stretches, parameters.overload, strict=True
    ):
        vectors = gain * (table[:, 2:5] + share * dose * table[:, 5:]) @ rotation.T
        waves.append(np.hstack([table[:, :2] * stretch, vectors]))
    return waves


def _beats(parameters: EcgParameters, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """R peaks in s, from the last before the recording to the first after it, and the RR interval before each in s.

    In sinus rhythm RR varies in McSharry's two bands, 0.1 Hz (Mayer waves) and 0.25 Hz (breathing). In atrial
    fibrillation the intervals are independent and log-normal.
    """
    mean_s = 60.0 / parameters.heart_rate_bpm
    count = int(25.0 / mean_s)
    if parameters.atrial_fibrillation:
        rr_s = mean_s * np.exp(0.22 * rng.standard_normal(count))
    else:
        angle = 2 * np.pi * mean_s * np.arange(count) * np.array([[0.1], [0.25]])
        bands = np.sin(angle + rng.uniform(0, 2 * np.pi, (2, 1))).sum(axis=0)
        rr_s = mean_s * (1.0 + 0.025 * bands + 0.005 * rng.standard_normal(count))
    rr_s = np.clip(rr_s, 0.3, 2.5)
    r_s = np.cumsum(rr_s) - 2.5 - rng.uniform(0, mean_s)
    used = slice(np.searchsorted(r_s, 0.0) - 1, np.searchsorted(r_s, SAMPLES / RATE_HZ) + 1)
    return r_s[used], rr_s[used]


def _dipole(
    parameters: EcgParameters,
    waves: list[np.ndarray],
    r_s: np.ndarray,
    rr_s: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """The VCG in mV [3, T]: P before the next R peak, QRS around the nearest, T after the last.

    The time of T scales with the cube root of the RR interval (Fridericia).
    """
    time_s = np.arange(SAMPLES) / RATE_HZ
    following = np.searchsorted(r_s, time_s, side="right")
    since_s, until_s = time_s - r_s[following - 1], r_s[following] - time_s
    nearest_s = np.where(since_s < until_s, since_s, -until_s)
    vcg_3T = np.zeros((3, SAMPLES))
    for wave, tau_s in zip(waves, (-until_s, nearest_s, since_s / np.cbrt(rr_s[following - 1])), strict=True):
        vcg_3T += wave[:, 2:].T @ np.exp(-0.5 * ((tau_s - wave[:, :1]) / wave[:, 1:2]) ** 2)
    if parameters.atrial_fibrillation:
        angle = 2 * np.pi * rng.uniform(5.0, 7.5) * time_s + 1.5 * np.sin(2 * np.pi * 0.4 * time_s)
        vcg_3T += np.array([[0.01], [0.04], [-0.05]]) * np.sin(angle)
    return vcg_3T


def _electrode_noise(parameters: EcgParameters, rng: np.random.Generator) -> np.ndarray:
    """Noise of the nine electrodes in mV [9, T]: coloured Gaussian noise, breathing and mains."""
    amplitude_F = np.sqrt(np.square(parameters.noise_mv[:3]) @ _NOISE_SPECTRA) * (SAMPLES / 2)
    normal = rng.standard_normal((9, 2 * len(amplitude_F)), dtype=np.float32)
    noise_mv = np.fft.irfft(normal.view(np.complex64) * amplitude_F, SAMPLES)
    tones_hz = (rng.uniform(0.18, 0.35), parameters.mains_hz)
    for level_mv, hz in zip(parameters.noise_mv[3:], tones_hz, strict=True):
        angle = 2 * np.pi * hz * np.arange(SAMPLES) / RATE_HZ + rng.uniform(0, 2 * np.pi)
        noise_mv += level_mv * rng.standard_normal((9, 1)) * np.sin(angle)
    return noise_mv


def _measurements(parameters: EcgParameters, waves: list[np.ndarray], rr_s: float) -> dict[str, float]:
    """Onsets and ends, 2.5 widths from a wave's centre (2 at the end of T), and the axes of the waves' areas."""
    p, qrs, t = waves
    measured = {
        "p_onset": p[0, 0] - 2.5 * p[0, 1],
        "p_end": p[-1, 0] + 2.5 * p[-1, 1],
        "qrs_onset": qrs[0, 0] - 2.5 * qrs[0, 1],
        "qrs_end": qrs[-1, 0] + 2.5 * qrs[-1, 1],
        "t_end": (t[-1, 0] + 2 * t[-1, 1]) * np.cbrt(rr_s),
    }
    start_s = measured["p_onset"]
    measured = {name: 40.0 + 1000.0 * (edge_s - start_s) for name, edge_s in measured.items()}
    for name, wave in zip(("p_axis", "qrs_axis", "t_axis"), waves, strict=True):
        area_i, area_ii = _DOWER[:2] @ (wave[:, 1] @ wave[:, 2:])
        measured[name] = math.degrees(math.atan2((area_ii - area_i / 2) * 2 / math.sqrt(3), area_i))
    if parameters.atrial_fibrillation:
        measured |= dict.fromkeys(("p_onset", "p_end", "p_axis"), math.nan)
    return measured | {"rr_interval": 1000.0 * rr_s}
