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
