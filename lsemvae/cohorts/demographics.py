"""Sex and age of subjects as `female` (1, 0 or NaN) and `age_years` (NaN where unknown), to report subgroups by."""

import math
import re
from collections.abc import Callable, Mapping

import pandas as pd

AGES = {"under 50": (0.0, 50.0), "50 to 64": (50.0, 65.0), "65 to 74": (65.0, 75.0), "75 and over": (75.0, math.inf)}
"""Age groups of reports: from the first age in years to below the second."""
OLDER_THAN_89 = 90.0
"""Stands for ">89": data sets hide the exact age of the very old."""
_MAX_AGE = 120.0

_WORDS = {"f": 1.0, "female": 1.0, "w": 1.0, "woman": 1.0, "m": 0.0, "male": 0.0, "man": 0.0}
_ABOVE = re.compile(r">\s*(\d+)")


def female(sex: pd.Series, codes: Mapping[str, float] | None = None) -> pd.Series:
    """F, female, woman -> 1; M, male, man -> 0; other words and empty cells -> NaN.

    `codes` gives the meaning of a source's numbers, such as {"0": 0, "1": 1}. There is no default, because sources
    contradict each other: 0 is a woman in UK Biobank and a man in PTB-XL.
    """
    known = _WORDS | dict(codes or {})
    return sex.map(lambda cell: known.get(_text(cell).removesuffix(".0"))).astype("float64")


def age_years(age: pd.Series) -> pd.Series:
    """Numbers, also as text, -> years; ">89" -> 90; below 0, above 120, or no number -> NaN."""

    def years(cell: object) -> object:
        text = _text(cell)
        above = _ABOVE.fullmatch(text)
        return int(above[1]) + 1 if above else text

    ages = pd.to_numeric(age.map(years), errors="coerce").astype("float64")
    return ages.where(ages.between(0, _MAX_AGE))


def with_demographics(table: pd.DataFrame, plain_name: Callable[[str], str]) -> pd.DataFrame:
    """A user's table in which a column of age is called `age_years`, and words for sex have become `female`.

    A column `sex` of numbers stays as it is: the table does not say which number is a woman.
    """
    names: dict[str, str] = {}
    for column in table.columns:
        names.setdefault(plain_name(column), column)
    if "age" in names and "age_years" not in names:
        names["age_years"] = names["age"]
    if (column := names.get("age_years")) is not None:
        ages = age_years(table[column])
        if ages.notna().any() or pd.api.types.is_numeric_dtype(table[column]):  # else the column holds other words
            table = table.assign(**{column: ages}).rename(columns={column: "age_years"})
    sex = table[names["sex"]] if "sex" in names and "female" not in names else None
    if sex is not None and not pd.api.types.is_numeric_dtype(sex) and (women := female(sex)).notna().any():
        table = table.drop(columns=names["sex"]).assign(female=women)
    return table


def _text(cell: object) -> str:
    return "" if pd.isna(cell) else str(cell).strip().casefold()
