"""Labels: each is 1 on one side of its limit, 0 on the other, and unknown where its input is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.cohorts import labels

NAN = float("nan")
pressures = st.floats(1, 150) | st.just(NAN)
few = settings(max_examples=60, deadline=None)


def plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in np.atleast_1d(values)]


@pytest.mark.parametrize(
    ("mpap", "pawp", "ph", "post"),
    [
        (20.0, 18, 0, None),  # above 20, not from 20; without PH there is no kind of PH
        (20.01, 15, 1, 0),
        (20.01, 15.01, 1, 1),
        (43, None, 1, None),
        (None, 22, None, None),  # an elevated wedge pressure alone is no PH
        (14, None, 0, None),
    ],
)
def test_pulmonary_hypertension_and_its_kind(mpap, pawp, ph, post):
    mpap, pawp = (NAN if value is None else value for value in (mpap, pawp))
    assert plain(labels.pulmonary_hypertension(mpap)) == [ph]
    assert plain(labels.post_capillary(mpap, pawp)) == [post]


def test_the_equation_of_cardiac_mri():
    """By hand: 6.1352 + 0.07204 * 74.2 + 0.02256 * 91.5 = 13.544808."""
    assert plain(labels.cmr_pawp_mmhg(74.2, 91.5)) == [13.54]
    # 6.1352 + 0.07204 v + 2.256 at 100 g: 91.7 ml give 14.9973 and 91.8 ml 15.0045, both 15.00, which is not above.
    volume_ml = np.array([91.7, 91.8, 91.9])
    assert plain(labels.cmr_pawp_mmhg(volume_ml, 100)) == [15.0, 15.0, 15.01]
    assert plain(labels.elevated_pawp(labels.cmr_pawp_mmhg(volume_ml, 100))) == [0, 0, 1]


@few
@given(st.lists(st.tuples(pressures, pressures), min_size=1, max_size=20))
def test_unknown_in_unknown_out_and_the_higher_the_likelier(pairs):
    mpap, pawp = np.array(pairs).T
    ph, post, elevated = (
        labels.pulmonary_hypertension(mpap), labels.post_capillary(mpap, pawp), labels.elevated_pawp(pawp)
    )  # fmt: skip
    assert ph.shape == post.shape == elevated.shape == mpap.shape
    for values in (ph, post, elevated):
        assert values.dtype == np.float64
        assert set(values[~np.isnan(values)]) <= {0.0, 1.0}
    np.testing.assert_array_equal(np.isnan(ph), np.isnan(mpap))
    np.testing.assert_array_equal(np.isnan(elevated), np.isnan(pawp))
    # The kind is known exactly where there is PH and a wedge pressure.
    np.testing.assert_array_equal(~np.isnan(post), (ph == 1) & ~np.isnan(pawp))
    order = np.argsort(mpap)
    assert (np.diff(ph[order][~np.isnan(ph[order])]) >= 0).all()


@few
@given(st.floats(5, 600), st.floats(20, 600))
def test_a_larger_atrium_or_a_heavier_ventricle_never_lowers_the_estimate(volume_ml, mass_g):
    estimate = labels.cmr_pawp_mmhg(volume_ml, mass_g)
    assert labels.cmr_pawp_mmhg(volume_ml + 1, mass_g) >= estimate
    assert labels.cmr_pawp_mmhg(volume_ml, mass_g + 1) >= estimate
    assert np.round(estimate, 2) == estimate
    assert np.isnan(labels.cmr_pawp_mmhg(volume_ml, NAN))
    assert np.isnan(labels.cmr_pawp_mmhg(np.inf, mass_g))


@pytest.mark.parametrize(
    ("axis", "left", "right"),
    [
        (0, 0, 0), (-30, 0, 0), (-31, 1, 0), (-90, 1, 0), (270, 1, 0), (-91, None, None), (-180, 0, 1), (180, 0, 1),
        (90, 0, 0), (91, 0, 1), (200, None, None), (None, None, None),
    ],
)  # fmt: skip
def test_axis_deviation(axis, left, right):
    axis = NAN if axis is None else axis
    assert (plain(labels.left_axis_deviation(axis)), plain(labels.right_axis_deviation(axis))) == ([left], [right])


@few
@given(st.integers(-360, 360))
def test_an_axis_is_a_direction(axis):
    """Whole turns change nothing, and no axis deviates to both sides."""
    for deviation in (labels.left_axis_deviation, labels.right_axis_deviation):
        assert plain(deviation(axis)) == plain(deviation(axis + 360)) == plain(deviation(axis - 360))
    assert not (labels.left_axis_deviation(axis) == 1 and labels.right_axis_deviation(axis) == 1)


def test_statements():
    found = [{"LVH", "SR"}, {"NORM"}, {"SR"}, set()]
    assert plain(labels.stated(found, ["LVH"], ["NORM", "LVH"])) == [1, 0, None, None]
    assert plain(labels.stated(found, ["LVH"])) == [1, 0, 0, None]
    assert plain(labels.stated([{"A"}], ["A"], [])) == [1]  # what is stated is known


def test_ranges_hold_the_limits_and_exclude_other_units():
    """An mPAP of PH in kPa, volumes in litres, and a 0 for what was not measured are no measurements."""
    wrong = {"mpap_mmhg": (20 / 7.5, 0), "pawp_mmhg": (-1, 0), "la_volume_ml": (0.08, 0), "lv_mass_g": (0.09, 0)}
    wrong |= {"pasp_mmhg": (35 / 7.5, 0), "tr_gradient_mmhg": (-1, 0), "tr_velocity_m_s": (-1, 0)}
    limits = {"mpap_mmhg": 20, "pawp_mmhg": 15, "la_volume_ml": 75, "lv_mass_g": 90}
    limits |= {"pasp_mmhg": 45, "tr_gradient_mmhg": 41, "tr_velocity_m_s": 3.2}
    for name, (low, high) in labels.PLAUSIBLE.items():
        assert all(value < low for value in wrong[name])
        assert low < limits[name] < high
    assert labels.PLAUSIBLE["tr_velocity_m_s"][1] < 50  # cm/s


@pytest.mark.parametrize(
    ("pasp", "velocity", "expected"),
    [
        (45.0, 3.2, [1, 1, 1]),  # from 45 and 3.2, but above 35
        (44.9, 3.19, [0, 1, 0]),
        (35.0, 1.0, [0, 0, 0]),
        (35.1, None, [0, 1, None]),
        (None, 4.0, [None, None, 1]),
    ],
)
def test_labels_of_the_echocardiogram(pasp, velocity, expected):
    pasp, velocity = (NAN if value is None else value for value in (pasp, velocity))
    found = (labels.pasp_at_least_45(pasp), labels.elevated_pasp(pasp), labels.tr_velocity_at_least_3_2(velocity))
    assert [plain(values)[0] for values in found] == expected


def test_a_gradient_of_the_tricuspid_regurgitation_is_four_times_the_velocity_squared():
    np.testing.assert_array_equal(labels.tr_velocity_m_s([40.96, 64, 0, -1, NAN]), [3.2, 4, 0, NAN, NAN])
    assert labels.tr_velocity_at_least_3_2(labels.tr_velocity_m_s(40.96)) == 1


@pytest.mark.parametrize(
    ("grade", "expected"),
    [
        *((grade, 0) for grade in ("normal", "mildly reduced", "Nl RV function", "Low normal function", "none")),
        *((grade, 0) for grade in ("Hyperdynamic", "Mild global RV hypo", " Normal ")),
        *((grade, 1) for grade in ("moderately reduced", "severely reduced", "Moderate global RV hypo", "SEVERE")),
        ("Mod-severe", 1),
        *((grade, None) for grade in ("presumed none", "Presumed normal", "RV not well seen", "", " ", "abnormal")),
        *((grade, None) for grade in ("Cannot assess RV function", "mild to moderate", "Mild-mod", "RV depressed")),
        ("Basal RV hypo (McConnell's sign)", None),
        (None, None),
        (NAN, None),
        (1.0, None),
    ],
)
def test_words_for_the_right_ventricle(grade, expected):
    assert plain(labels.rv_dysfunction([grade])) == [expected]
