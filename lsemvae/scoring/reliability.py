"""One rule for what is doubtful about a recording, for single answers of the endpoint and for the rows of a cohort."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lsemvae.leads import LEADS
from lsemvae.quality import FLAGS


@dataclass(frozen=True)
class Reliability:
    """The model's leads that the recording lacks or that were computed, and a sentence for each doubt.

    `missing` are leads that the recording does not have; `unusable` are there, but flat or too short of samples;
    `derived` were used, but computed from I and II.
    """

    missing: tuple[str, ...]
    unusable: tuple[str, ...]
    derived: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def level(self) -> Literal["good", "limited"]:
        """`"good"` when there is no reason for doubt, else `"limited"`."""
        return "limited" if self.reasons else "good"


def reliability(
    present: Iterable[str],
    derived: Iterable[str],
    leads_used: Iterable[str],
    flags: Iterable[str],
    model_leads: Sequence[str],
    doubtful: str | None = None,
) -> Reliability:
    """Doubts about a recording with the leads `present`, some of them `derived`, for a model of `model_leads`.

    `doubtful` is what `lsemvae.bundle.Scorer.why_doubtful` says.
    """
    held, computed, used = set(present), set(derived), set(leads_used)
    missing = tuple(lead for lead in model_leads if lead not in held)
    unusable = tuple(lead for lead in model_leads if lead in held and lead not in used)
    used_derived = tuple(lead for lead in model_leads if lead in used and lead in computed)
    reasons = []
    if missing:
        reasons.append(f"Missing of the model's {len(model_leads)} leads: {', '.join(missing)}.")
    if unusable:
        reasons.append(f"Flat or without enough samples, so not used: {', '.join(unusable)}.")
    if used_derived:
        reasons.append(f"Computed from I and II, not measured: {', '.join(used_derived)}.")
    flagged: defaultdict[str, list[str]] = defaultdict(list)
    for flag in flags:
        kind, _, detail = flag.partition(":")
        if flag in FLAGS or detail not in LEADS:
            flagged[FLAGS.get(flag) or FLAGS.get(kind, flag)]  # the flag concerns the whole recording
        elif detail in model_leads and detail not in unusable:
            flagged[FLAGS.get(kind, kind)].append(detail)
    reasons += [f"{', '.join(leads)}: {text}" if leads else text for text, leads in flagged.items()]
    reasons += [doubtful] if doubtful else []
    return Reliability(missing, unusable, used_derived, tuple(reasons))
