"""The rows of a cohort's explanations: what the score of each recording depends on, by lead and wave."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from lsemvae.bundle import Bundle, describe
from lsemvae.data.shards import LABEL_PREFIX
from lsemvae.errors import LsemvaeError
from lsemvae.explain.attribution import Settings, attribute
from lsemvae.explain.checks import Checks, Effort, run_checks
from lsemvae.explain.explainer import Explainer, Explanation, mean_over_windows
from lsemvae.explain.igar import PEAKS, igar, peaks
from lsemvae.explain.igar import SETTINGS as IGAR_SETTINGS
from lsemvae.explain.reference import Reference
from lsemvae.explain.truth import truth_check
from lsemvae.explain.waves import DELINEATED, WAVES
from lsemvae.scoring.chosen import read_all
from lsemvae.scoring.inputs import CohortInput, Read, signals_of
from lsemvae.scoring.parts import MODEL_FIELDS, Failure, Job, Product
from lsemvae.tracking import fetched

Progress = Callable[[int, int], object]
"""It is told how many steps are done, and of how many."""
PART_RECORDS = 32


@dataclass(frozen=True)
class Asked:
    """How recordings are explained, and with which labels. It is sent to other processes.

    label      the label column that is called `label` in the rows; None for none
    people     which of female and age_years there are
    reference  the recordings of the baseline; None for the baseline "zero"
    encoder    the URI of an encoder, for the weights of the leads
    igar       whether rows have the authors' ratio
    effort     how much the checks compute
    simulated  whether the checks ask, too, if attributions find what the label of a simulated cohort depends on
    """

    settings: Settings
    label: str | None = None
    people: tuple[str, ...] = ()
    reference: CohortInput | None = None
    encoder: str | None = None
    igar: bool = False
    effort: Effort = field(default_factory=Effort)
    simulated: bool = False

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys([*([self.label] if self.label else []), *self.people]))


def people_in(columns: Sequence[str]) -> tuple[str, ...]:
    """Which of female and age_years these columns of `lsemvae.scoring.chosen.table_of` have."""
    return tuple(name for name in ("female", "age_years") if LABEL_PREFIX + name in columns)


def explanations(leads: Sequence[str], asked: Asked) -> Product:
    """What explain.py makes of a cohort, with a model of these leads."""
    return Product("explanations", schema(leads, asked), partial(ExplanationRows, asked=asked))


def schema(leads: Sequence[str], asked: Asked) -> pa.Schema:
    """The columns of the rows. What is not known is null.

    label, female, age_years             of the data, where it has them
    windows, logit, …, steps             see `lsemvae.explain.explainer.Window`, and `values_of` for several windows
    beats, failures.WAVE, no_waves       beats found, beats that lack this wave, and why there is no beat
    signed.LEAD.WAVE, absolute.LEAD.WAVE see `lsemvae.explain.shares`
    lead_drop.LEAD, wave_drop.LEAD.WAVE  see `lsemvae.explain.occlusion`
    gate.LEAD, precision.LEAD            see `lsemvae.explain.experts`
    igar.LEAD, igar.LEAD.PEAK            see `lsemvae.explain.igar`, where it was asked for
    """
    labels = [(name, pa.float64()) for name in [*(["label"] if asked.label else []), *asked.people]]
    cells = [f"{lead}.{wave}" for lead in leads for wave in WAVES]
    numbers = [f"{kind}.{cell}" for kind in ("signed", "absolute") for cell in cells]
    numbers += [f"lead_drop.{lead}" for lead in leads]
    numbers += [f"wave_drop.{lead}.{wave}" for lead in leads for wave in WAVES if wave != "rest"]
    numbers += [f"{kind}.{lead}" for kind in ("gate", "precision") for lead in leads]
    if asked.igar:
        numbers += [f"igar.{lead}" for lead in leads] + [f"igar.{lead}.{peak}" for lead in leads for peak in PEAKS]
    return pa.schema(
        [
            ("subject_id", pa.string()),
            ("record_id", pa.string()),
            *labels,
            ("score", pa.float64()),
            ("decision", pa.bool_()),
            ("refused", pa.string()),
            ("reason", pa.string()),
            *MODEL_FIELDS,
            ("baseline", pa.string()),
            ("bound", pa.float64()),
            ("windows", pa.int64()),
            ("logit", pa.float64()),
            ("baseline_logit", pa.float64()),
            ("delta", pa.float64()),
            ("steps", pa.int64()),
            ("beats", pa.int64()),
            *((f"failures.{wave}", pa.int64()) for wave in DELINEATED),
            ("no_waves", pa.string()),
            ("notes", pa.string()),
            *((name, pa.float64()) for name in numbers),
        ]
    )


class ExplanationRows:
    """Explains recordings: rows of `schema`."""

    def __init__(self, folder: Path, device: str, asked: Asked) -> None:
        bundle = describe(folder)
        reads = read_all(asked.reference, bundle.leads)
        with fetched(asked.encoder) if asked.encoder else nullcontext() as encoder:
            self.explainer = Explainer(
                folder,
                asked.settings,
                device,
                reference=Reference.of_signals(*signals_of(reads), bundle.leads, bundle.preprocess) if reads else None,
                encoder=encoder.folder if encoder else None,
            )
        self._asked, self._device = asked, device

    @property
    def bundle(self) -> Bundle:
        return self.explainer.scorer.bundle

    def __call__(self, reads: Sequence[Read]) -> list[dict[str, Any]]:
        found = iter(explained(self.explainer, reads))
        return [self._about(read) | self._values(read, found) for read in reads]

    def _values(self, read: Read, found: Iterator[Explanation]) -> dict[str, Any]:
        if read.signal_mv_LT is None:
            return {"refused": read.unreadable, "reason": read.reason}
        explanation = next(found)
        return values_of(explanation) | (self._igar(explanation) if self._asked.igar and explanation.windows else {})

    def check(self, reads: Sequence[Read], progress: Progress | None = None) -> Checks | None:
        """The checks of the explanations of these recordings, of each its first window; None where all are refused."""
        readable = [read for read in reads if read.signal_mv_LT is not None]
        found = zip(readable, explained(self.explainer, readable), strict=True)
        first = [(read.subject_id, explanation.windows[0]) for read, explanation in found if explanation.windows]
        if not first:
            return None
        windows, model, settings = [window for _, window in first], self.explainer.scorer.model, self._asked.settings
        x_BLT, mask_BL = np.stack([one.x_LT for one in windows]), np.stack([one.lead_mask_L for one in windows])
        checks = run_checks(
            model,
            torch.from_numpy(x_BLT).to(self._device),
            torch.from_numpy(mask_BL).to(self._device),
            self.bundle.preprocess.rate_hz,
            settings,
            baseline=self.explainer.baseline(x_BLT, [one.waves for one in windows]),
            subject_B=[subject_id for subject_id, _ in first],
            effort=self._asked.effort,
            progress=progress,
        )
        if not self._asked.simulated:
            return checks
        hearts = truth_check(
            model,
            self.bundle.leads,
            self.bundle.preprocess,
            settings,
            draws=self._asked.effort.draws,
            progress=progress,
        )
        return replace(checks, truth=hearts.truth, evidence=hearts.evidence)

    def _igar(self, explanation: Explanation) -> dict[str, float | None]:
        """The mean over windows of the authors' ratio, toward the class of the decision."""
        sign = 1.0 if explanation.score.decision else -1.0
        ratios = []
        for window in explanation.windows:
            x, mask = (torch.from_numpy(v[None]).to(self._device) for v in (window.x_LT, window.lead_mask_L))
            values_LT = sign * attribute(self.explainer.scorer.model, x, mask, IGAR_SETTINGS).values_BLT[0]
            found = peaks(window.x_LT, window.waves)
            ratios.append(igar(values_LT, window.lead_mask_L, found, explanation.rate_hz))
        names = [*explanation.leads, *(f"{lead}.{peak}" for lead in explanation.leads for peak in PEAKS)]
        ratio_N = mean_over_windows([np.concatenate([ratio.lead_L, ratio.wave_LP.ravel()]) for ratio in ratios])
        return {f"igar.{name}": value for name, value in zip(names, _known(ratio_N), strict=True)}

    def _about(self, read: Read) -> dict[str, Any]:
        settings, names = self._asked.settings, dict.fromkeys(self._asked.people)
        labels = {name: read.labels.get(name) for name in names}
        if self._asked.label:
            labels["label"] = read.labels.get(self._asked.label)
        return labels | {"baseline": settings.baseline, "bound": settings.bound}


class Again(NamedTuple):
    """What is made of some recordings once more, when all are explained."""

    shown: dict[str, Explanation]
    """By the id of the recording."""
    checks: Checks | None


def explain_again(
    job: Job, asked: Asked, shown: CohortInput | None, checked: CohortInput | None, progress: Progress | None = None
) -> Again | Failure:
    """Explains the recordings to be shown, and checks the explanations of others; or says why it cannot.

    It runs where the parts were made: the same device gives the same numbers.
    """
    try:
        with fetched(job.uri) as model:
            rows = ExplanationRows(model.folder, "cuda" if job.use_gpu else "cpu", asked)
        reads = [read for read in read_all(shown, rows.bundle.leads) if read.signal_mv_LT is not None]
        ids = [read.record_id for read in reads]
        found = dict(zip(ids, explained(rows.explainer, reads), strict=True))
        return Again(found, rows.check(read_all(checked, rows.bundle.leads), progress) if checked else None)
    except (LsemvaeError, OSError) as error:
        return Failure.of(error)


def explained(explainer: Explainer, reads: Sequence[Read]) -> list[Explanation]:
    """The explanations of those that are readable."""
    return explainer.explain_signals(*signals_of(reads))


def values_of(explanation: Explanation) -> dict[str, Any]:
    """The columns of one explanation.

    Of several windows, logits and drops are means, beats and failures sums, steps the most of any window, and delta
    that of the window in which it is largest.
    """
    score, windows = explanation.score, explanation.windows
    if score.refused:
        return {"refused": score.refused.code, "reason": str(score.refused)}
    reasons = dict.fromkeys(window.waves.reason for window in windows if window.waves.reason)
    row: dict[str, Any] = {
        "score": score.score,
        "decision": score.decision,
        "windows": len(windows),
        "logit": float(np.mean([window.logit for window in windows])),
        "baseline_logit": float(np.mean([window.baseline_logit for window in windows])),
        "delta": max((window.delta for window in windows), key=abs),
        "steps": max(window.steps for window in windows),
        "beats": explanation.beats,
        "no_waves": "; ".join(reasons) or None,
        "notes": " ".join(explanation.notes) or None,
    }
    row |= {f"failures.{wave}": count for wave, count in explanation.failures.items()}
    return row | _by_lead_and_wave(explanation)


def _by_lead_and_wave(explanation: Explanation) -> dict[str, float | None]:
    leads, shares = explanation.leads, explanation.shares
    assert shares is not None  # there are windows
    row = _cells("signed", leads, shares.signed_LW) | _cells("absolute", leads, shares.absolute_LW)
    row |= _cells("wave_drop", leads, explanation.wave_drop_LW)
    of_leads = {
        "lead_drop": explanation.lead_drop_L, "gate": explanation.gate_L, "precision": explanation.precision_L,
    }  # fmt: skip
    for kind, values_L in of_leads.items():
        if values_L is not None:
            row |= {f"{kind}.{lead}": value for lead, value in zip(leads, _known(values_L), strict=True)}
    return row


def _cells(kind: str, leads: Sequence[str], values_LW: np.ndarray) -> dict[str, float | None]:
    names = [f"{kind}.{lead}.{wave}" for lead in leads for wave in WAVES]
    return dict(zip(names, _known(values_LW.ravel()), strict=True))


def _known(values_N: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values_N]
