"""Requests and answers of the endpoint. The OpenAPI schema is made from these classes."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, FiniteFloat

MAX_RECORDS = 64
MAX_SAMPLES = 4_000_000
"""Of one request, over all leads and recordings: 64 recordings of 12 leads, 10 s and 500 Hz, or one of 11 minutes.
What a single recording may be like, preprocessing decides, for the endpoint and for cohorts alike."""
RESEARCH_ONLY = "Research use only: not a medical device."

# FailFast: a list of a million texts would make a million errors.
Samples = Annotated[list[FiniteFloat | None], Field(min_length=1, max_length=MAX_SAMPLES), FailFast()]
Rate = Annotated[FiniteFloat, Field(ge=1, le=1e9, description="Samples a second.", examples=[500])]
"""Preprocessing refuses most of these, recording by recording. Beyond them, arithmetic on the rate overflows."""
Unit = Literal["mV", "uV"]
Origin = Literal["measured", "derived", "reconstructed"]


class RecordIn(BaseModel):
    """One recording: leads by name, in any order and case; null where nothing was recorded."""

    model_config = ConfigDict(extra="forbid")

    leads: dict[str, Samples] = Field(
        min_length=1, max_length=12, examples=[{"I": [0.01, 0.02], "II": [0.03, 0.05], "V1": [-0.02, 0.01]}]
    )
    rate_hz: Rate
    unit: Unit = "mV"
    id: Annotated[str, Field(max_length=200, description="Returned as it came; never logged.")] = ""


class ReconstructRequest(BaseModel):
    """Recordings whose absent leads are to be reconstructed."""

    model_config = ConfigDict(extra="forbid")

    records: Annotated[list[RecordIn], Field(min_length=1, max_length=MAX_RECORDS)]


class ScoreRequest(ReconstructRequest):
    """Recordings to score together."""

    model: str | None = Field(
        default=None,
        max_length=200,
        description="A served model's name. By default each recording goes to the model that shares most leads.",
    )


class ExplainRequest(ScoreRequest):
    """One recording whose score is to be explained."""

    records: Annotated[list[RecordIn], Field(min_length=1, max_length=1)]


class ModelOut(BaseModel):
    """The model that answered."""

    name: str
    version: int | None
    digest: str
    preprocess_digest: str
    task: str
    leads: list[str]
    threshold: float


class ModelCard(ModelOut):
    """A served model: its input, its origin, its results, its intended use and its limits."""

    min_leads: int = Field(
        description="A recording with fewer usable leads is refused. Above that, missing leads are masked. The model's "
        "own setting: `min_lead_share` of `preprocess`, times its number of leads."
    )
    architecture: str
    preprocess: dict[str, Any]
    calibration: dict[str, Any] | None = Field(
        description="From score to probability; null where the model is not calibrated."
    )
    doubt: dict[str, Any] | None = Field(
        description="The measure of doubt that `reliability` uses, its limit, and the AUROC with and without the more "
        "doubtful tenth of the training recordings; null where no measure is shown to help, or none was tried."
    )
    provenance: dict[str, Any] = Field(description="Training data with its digest, encoder, settings, results.")
    card: str | None = Field(
        description="The model's own card, in Markdown: cohort, results by subgroup, limits; null where it has none."
    )
    intended_use: str
    limits: list[str]


class RefusedOut(BaseModel):
    """Why there is no score."""

    code: str
    reason: str


class Reliability(BaseModel):
    """What is wrong with the recording, for this model.

    `limited` when a lead of the model is missing, derived or not usable, when a quality flag concerns the recording or
    one of the model's leads, when the recording is not 10 s at 500 Hz, or when the model has a measure of `doubt` (see
    `/v1/models`) and the recording is more doubtful than nine in ten of the training recordings. Each is a sentence in
    `reasons`. `good` means that none of these was found. Neither measures the model's uncertainty.
    """

    level: Literal["good", "limited"]
    reasons: list[str]


class RecordOut(BaseModel):
    """The recording as it was read, to draw it."""

    rate_hz: float
    leads: dict[str, list[float | None]] = Field(description="Millivolts to 0.001; null where nothing was recorded.")
    derived: list[str] = Field(description="Computed from I and II.")
    missing: list[str]


class ScoreOut(BaseModel):
    """The answer for one recording: score and decision, or `refused`. Research use only: not a medical device."""

    id: str
    score: float | None = Field(default=None, description="The model's output, 0 to 1: not a probability of disease.")
    probability: float | None = Field(
        default=None,
        description="The score calibrated on the training cohort; null where the model has no calibration.",
    )
    decision: bool | None = Field(default=None, description="Whether the score reaches the model's threshold.")
    flags: list[str] = Field(default=[], description="What is doubtful about the recording, as `kind` or `kind:lead`.")
    reliability: Reliability | None = None
    leads_used: list[str] = []
    leads_derived: list[str] = Field(default=[], description="Those of `leads_used` that were computed from I and II.")
    refused: RefusedOut | None = None
    model: ModelOut | None = None
    record: RecordOut | None = None


class ScoreResponse(BaseModel):
    """One answer for each recording, in order. Research use only: not a medical device."""

    results: list[ScoreOut]


class ShareOut(BaseModel):
    """What of the attributions belongs to a lead, a wave, or a wave of a lead, as shares of all absolute attributions.

    Positive means that it raises the score. `signed` is smaller in size than `absolute` where parts cancel.
    """

    signed: float
    absolute: float


class CellOut(ShareOut):
    """One wave of one lead."""

    drop: float | None = Field(
        description="The logit less that with this wave replaced by a straight line; null where that is not possible."
    )


class LeadShareOut(ShareOut):
    """One lead of the recording."""

    drop: float | None = Field(
        description="The logit less that of the recording without this lead; null where that is not possible."
    )
    gate: float | None = Field(default=None, description="LS-EMVAE's gate weight of the lead; null for others.")
    precision: float | None = Field(
        default=None, description="The lead's share of LS-EMVAE's fused precision; null for others."
    )


class ExplainedLeadOut(BaseModel):
    """A lead of one window, to draw it: as the model sees it, but in mV, with the attribution of each sample."""

    x_mv: list[float]
    attribution: list[float] = Field(description="In units of the logit, rounded to 4 digits of the window's largest.")


class WindowOut(BaseModel):
    """One window of the recording that the score takes. Times of waves are in seconds from the window's start.

    The attributions of all leads sum to `logit - baseline_logit + delta`.
    """

    start_s: float = Field(description="Where the window begins in the recording.")
    rate_hz: float
    samples: int
    logit: float
    baseline_logit: float
    delta: float = Field(description="What the attributions miss the difference of the two logits by.")
    steps: int = Field(description="Points between the baseline and the recording.")
    beats: int
    waves: dict[str, list[list[float | None]]] = Field(
        description="Of P, QRS and T: onset, peak and offset of each beat; null where not found."
    )
    failures: dict[str, int] = Field(description="Beats in which a wave was not found.")
    no_beat: str | None = Field(description="Why no beat was found; null where there are beats.")
    leads: dict[str, ExplainedLeadOut] | None = Field(
        description="The leads that the score uses; null with `signal=false`."
    )


class ExplanationOut(BaseModel):
    """What the score depends on, by integrated gradients of its logit and by occlusion. It is no diagnosis.

    All windows that the score takes count together in `leads`, `waves` and `cells`. An occlusion (`drop`) is the mean
    over windows.
    """

    baseline: str = Field(description="What the recording is compared with: `zero` is no signal.")
    leads: dict[str, LeadShareOut]
    waves: dict[str, ShareOut] | None = Field(
        description="P, QRS, ST (end of QRS to onset of T), T, and the rest; null where no beat was found."
    )
    cells: dict[str, dict[str, CellOut]] | None = Field(
        description="Each lead, and in it each wave; null where no beat was found."
    )
    notes: list[str] = Field(description="What this explanation lacks, and why.")
    windows: list[WindowOut]


class ExplainOut(ScoreOut):
    """The answer of `/v1/score` for the recording, and the explanation; without one where it is refused."""

    explanation: ExplanationOut | None = None


class ExplainResponse(BaseModel):
    """The one answer. Research use only: not a medical device."""

    note: str = (
        "An explanation shows what the model's score depends on. It does not show why a person is ill, and is no "
        "diagnosis. " + RESEARCH_ONLY
    )
    results: Annotated[list[ExplainOut], Field(min_length=1, max_length=1)]


class LeadOut(BaseModel):
    """One lead of a reconstruction: `derived` is computed from I and II, `reconstructed` is the model's output."""

    origin: Origin
    values: list[float]


class ReconstructOut(BaseModel):
    """All leads that the encoder reconstructs, or `refused`."""

    id: str
    rate_hz: float | None = None
    unit: Literal["mV", "standard deviations"] | None = Field(
        default=None,
        description="mV, or standard deviations where the model was trained with each lead scaled alone.",
    )
    leads: dict[str, LeadOut] = Field(
        default={}, description="The model's view of the recording: resampled, filtered, its first window."
    )
    refused: RefusedOut | None = None


class ReconstructResponse(BaseModel):
    """One answer for each recording, in order."""

    note: str = (
        "Reconstructed leads are a model's estimate from the other leads. They are not a measurement and must not be "
        "read as one. " + RESEARCH_ONLY
    )
    model: str = Field(description="Digest of the encoder.")
    results: list[ReconstructOut]


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether recordings can be scored, and why a promoted version does not answer."""

    ready: bool
    models: list[str] = Field(description="Each served model as NAME or NAME/VERSION.")
    problems: dict[str, str]


class Problem(BaseModel):
    """What is wrong with a request. It never quotes the recording."""

    detail: Any
