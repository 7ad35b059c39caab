"""Labels: measurements, or statements about an ECG -> 1, 0, or NaN where the label is not known.

Every function takes numbers or arrays (NaN: not measured) and returns float64 of their shape. An unknown input
gives an unknown label, never a 0. docs/labels.md lists which cohort has which label.
"""

import re
from collections.abc import Iterable, Set

import numpy as np
from numpy.typing import ArrayLike

_NOT_JUDGED = re.compile(r"\b(presumed|not|cannot|can't|unable|unknown)\b", re.IGNORECASE)

PLAUSIBLE = {
    "mpap_mmhg": (5.0, 150.0),
    "pawp_mmhg": (1.0, 60.0),
    "la_volume_ml": (5.0, 600.0),
    "lv_mass_g": (20.0, 600.0),
    "pasp_mmhg": (5.0, 200.0),
    "tr_gradient_mmhg": (1.0, 196.0),
    "tr_velocity_m_s": (0.5, 7.0),
}
"""Smallest and largest value that counts as a measurement of an adult; wider than what is seen in disease.

A value outside is a mistake in the table: another unit (25 mmHg are 3.3 kPa, 80 ml are 0.08 l), a typing error, or
a 0 or -1 that means "not measured" and would become a false label.
"""

NO_TASKS = frozenset({"female", "age_years", "sex", "age", "split", "strat_fold"})
"""Columns beside the labels that describe subjects or divide them into parts: never proposed as a task."""


def pulmonary_hypertension(mpap_mmhg: ArrayLike) -> np.ndarray:
    """1 where the mean pulmonary artery pressure at rest is above 20 mmHg.

    Source: Humbert et al., 2022 ESC/ERS guidelines, Eur Heart J 43:3618, doi 10.1093/eurheartj/ehac237.
    """
    return _above(mpap_mmhg, 20.0)


def post_capillary(mpap_mmhg: ArrayLike, pawp_mmhg: ArrayLike) -> np.ndarray:
    """1 for post-capillary, 0 for pre-capillary PH: wedge pressure (PAWP) above 15 mmHg or not; NaN without PH.

    ESC/ERS 2022 (as above): post-capillary PH is mPAP > 20 and PAWP > 15 mmHg, isolated or combined by its
    resistance (PVR). In the guidelines pre-capillary PH also requires PVR > 2 WU. The paper's task does not, and
    neither does this function: the few with PAWP <= 15 mmHg and PVR <= 2 WU, "unclassified" there, are 0.
    """
    return np.where(pulmonary_hypertension(mpap_mmhg) == 1, elevated_pawp(pawp_mmhg), np.nan)


def elevated_pawp(pawp_mmhg: ArrayLike) -> np.ndarray:
    """1 where the pulmonary artery wedge pressure is above 15 mmHg (ESC/ERS 2022, as above)."""
    return _above(pawp_mmhg, 15.0)


def cmr_pawp_mmhg(la_volume_ml: ArrayLike, lv_mass_g: ArrayLike) -> np.ndarray:
    """Wedge pressure in mmHg, to 2 decimals, estimated from cardiac MRI: a proxy, correlation 0.55 with catheters.

    `la_volume_ml` is the largest volume of the left atrium, `lv_mass_g` the mass of the left ventricle; neither
    is divided by body surface. Source: Garg et al. 2022, Eur Heart J 43:2511, PMC9259376; the rounding, and
    `elevated_pawp` of it as a label, are the LS-EMVAE paper's (arXiv 2503.13470).
    """
    return np.round(6.1352 + 0.07204 * _known(la_volume_ml) + 0.02256 * _known(lv_mass_g), 2)


def pasp_at_least_45(pasp_mmhg: ArrayLike) -> np.ndarray:
    """1 where the pulmonary artery systolic pressure, estimated by echo, is 45 mmHg or more.

    Source: EchoNext's definition of elevated pressure. Poterucha et al. 2025, Nature, doi 10.1038/s41586-025-09227-0.
    """
    return _at_least(pasp_mmhg, 45.0)


def elevated_pasp(pasp_mmhg: ArrayLike) -> np.ndarray:
    """1 where the pulmonary artery systolic pressure, estimated by echo, is above 35 mmHg.

    Source: Rudski et al. 2010, American Society of Echocardiography (ASE), doi 10.1016/j.echo.2010.05.010.
    """
    return _above(pasp_mmhg, 35.0)


def tr_velocity_at_least_3_2(tr_velocity_m_s: ArrayLike) -> np.ndarray:
    """1 where the peak velocity of tricuspid regurgitation (TR) is 3.2 m/s or more. Source: EchoNext, as above."""
    return _at_least(tr_velocity_m_s, 3.2)


def tr_velocity_m_s(tr_gradient_mmhg: ArrayLike) -> np.ndarray:
    """Peak TR velocity in m/s from the peak gradient in mmHg: gradient = 4 v^2, so 41 mmHg are 3.2 m/s (ASE)."""
    gradient_mmhg = _known(tr_gradient_mmhg)
    return np.round(np.sqrt(np.where(gradient_mmhg >= 0, gradient_mmhg, np.nan) / 4), 6)  # 40.96 gives 3.2 exactly


def rv_dysfunction(grades: Iterable[object]) -> np.ndarray:
    """The reader's words for the systolic function of the right ventricle -> 1 if reduced moderately or severely.

    0 if it is normal, low normal, hyperdynamic or mildly reduced. NaN if the words give no such grade: "mild to
    moderate", "depressed", and whatever `is_judged` says was not judged.
    """

    def label(grade: object) -> float:
        if not is_judged(grade):
            return np.nan
        words = str(grade).casefold()
        is_mild, is_worse = "mild" in words, re.search(r"\b(mod|moderate|severe)", words) is not None
        if is_worse:
            return np.nan if is_mild else 1.0
        return 0.0 if is_mild or re.search(r"\b(none|normal|nl|hyperdynamic)\b", words) else np.nan

    return np.array([label(grade) for grade in grades], dtype=float)


def is_judged(grade: object) -> bool:
    """Whether somebody has looked: not for an empty cell, "not well seen", "cannot assess" or "presumed none"."""
    return isinstance(grade, str) and bool(grade.strip()) and not _NOT_JUDGED.search(grade)


def left_axis_deviation(qrs_axis_deg: ArrayLike) -> np.ndarray:
    """1 for a frontal QRS axis from -90 to below -30 degrees, NaN where `right_axis_deviation` is NaN.

    Source: Surawicz et al. 2009, AHA/ACCF/HRS recommendations part III, doi 10.1016/j.jacc.2008.12.013.
    """
    axis = _turned(qrs_axis_deg)
    return np.where(np.isnan(axis), np.nan, (axis >= -90) & (axis < -30))


def right_axis_deviation(qrs_axis_deg: ArrayLike) -> np.ndarray:
    """1 for a frontal QRS axis above 90 and up to 180 degrees, in adults (source as above).

    An axis beyond that (-180 to -90) is extreme and could deviate to either side: NaN.
    """
    axis = _turned(qrs_axis_deg)
    return np.where(np.isnan(axis), np.nan, axis > 90)


def stated(statements: Iterable[Set[str]], positive: Iterable[str], answers: Iterable[str] | None = None) -> np.ndarray:
    """1 for each set of statements that has a `positive` one; else 0 if it has one of `answers`, else NaN.

    Without `answers` any statement counts as an answer: a reader who states something has looked at the ECG.
    """
    positive, answers = set(positive), None if answers is None else set(answers)

    def label(found: Set[str]) -> float:
        if not positive.isdisjoint(found):
            return 1.0
        return 0.0 if (found if answers is None else not answers.isdisjoint(found)) else np.nan

    return np.array([label(found) for found in statements], dtype=float)


def _known(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return np.where(np.isfinite(values), values, np.nan)


def _at_least(values: ArrayLike, limit: float) -> np.ndarray:
    values = _known(values)
    return np.where(np.isnan(values), np.nan, values >= limit)


def _above(values: ArrayLike, limit: float) -> np.ndarray:
    values = _known(values)
    return np.where(np.isnan(values), np.nan, values > limit)


def _turned(axis_deg: ArrayLike) -> np.ndarray:
    """The same direction from -90 to 180 degrees; NaN for an extreme axis. Machines write 270 for -90, too."""
    axis = 180 - (180 - _known(axis_deg)) % 360  # above -180, up to 180
    return np.where(axis < -90, np.nan, axis)
