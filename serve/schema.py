"""What the endpoint takes and gives: the OpenAPI schema follows from these classes."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

MAX_RECORDS = 64
MAX_SAMPLES = 120_000  # two minutes at 1000 Hz
RESEARCH_ONLY = "Research use only: not a medical device."

Samples = Annotated[list[FiniteFloat | None], Field(min_length=1, max_length=MAX_SAMPLES)]
Unit = Literal["mV", "uV"]
Origin = Literal["measured", "derived", "reconstructed"]


class RecordIn(BaseModel):
    """One recording: leads by name, in any order and case; null where nothing was recorded."""

    model_config = ConfigDict(extra="forbid")

    leads: dict[str, Samples] = Field(
        min_length=1, max_length=12, examples=[{"I": [0.01, 0.02], "II": [0.03, 0.05], "V1": [-0.02, 0.01]}]
    )
    rate_hz: Annotated[FiniteFloat, Field(gt=0, description="Samples a second.", examples=[500])]
    unit: Unit = "mV"
    id: Annotated[str, Field(max_length=200, description="Returned as it came; never logged.")] = ""


class ReconstructRequest(BaseModel):
    """Recordings whose absent leads are wanted."""

    model_config = ConfigDict(extra="forbid")

    records: Annotated[list[RecordIn], Field(min_length=1, max_length=MAX_RECORDS)]


class ScoreRequest(ReconstructRequest):
    """Recordings to score together."""

    model: str | None = Field(
        default=None,
        max_length=200,
        description="A served model's name; by default, for each recording, the one that shares most leads with it.",
    )


class ModelOut(BaseModel):
    """Which model answered, exactly."""

    name: str
    version: int | None
    digest: str
    preprocess_digest: str
    task: str
    leads: list[str]
    threshold: float


class ModelCard(ModelOut):
    """A served model: what it takes, where it comes from, what it was measured to do, and what it is not for."""

    min_leads: int = Field(description="With fewer usable leads a recording is refused; absent ones are masked.")
    architecture: str
    preprocess: dict[str, Any]
    calibration: dict[str, Any] | None = Field(description="From score to probability; null: not calibrated.")
    provenance: dict[str, Any] = Field(description="Training data with its digest, encoder, settings, results.")
    intended_use: str
    limits: list[str]


class RefusedOut(BaseModel):
    """Why there is no score."""

    code: str
    reason: str


class Reliability(BaseModel):
    """About the recording, not about the model.

    `limited` when a lead of the model is missing, derived or could not be used, when a quality flag concerns the
    recording or one of the model's leads, or when its length or rate is not 10 s at 500 Hz; each is a sentence in
    `reasons`. `good` says only that none of these was found: how sure the model is, it does not say.
    """

    level: Literal["good", "limited"]
    reasons: list[str]


class RecordOut(BaseModel):
    """The recording as it was read, for drawing."""

    rate_hz: float
    leads: dict[str, list[float | None]] = Field(description="Millivolts to 0.001; null where nothing was recorded.")
    derived: list[str] = Field(description="Computed from I and II.")
    missing: list[str]


class ScoreOut(BaseModel):
    """The answer for one recording: score and decision, or `refused`. Research use only: not a medical device."""

    id: str
    score: float | None = Field(default=None, description="The head's output, 0 to 1: not a probability of disease.")
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
    """One lead of a reconstruction; `derived` was computed from I and II, `reconstructed` came out of the model."""

    origin: Origin
    values: list[float]


class ReconstructOut(BaseModel):
    """All leads that the encoder writes, or `refused`."""

    id: str
    rate_hz: float | None = None
    unit: Literal["mV", "standard deviations"] | None = Field(
        default=None,
        description="mV; or standard deviations, where the model was trained with each lead scaled alone.",
    )
    leads: dict[str, LeadOut] = Field(
        default={}, description="What the model sees: resampled, filtered, its first window."
    )
    refused: RefusedOut | None = None


class ReconstructResponse(BaseModel):
    """One answer for each recording, in order."""

    note: str = (
        "Reconstructed leads are a model's guess from the other leads. They are not a measurement, and nothing may be "
        "read from them as if they were. " + RESEARCH_ONLY
    )
    model: str = Field(description="Digest of the encoder.")
    results: list[ReconstructOut]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether recordings can be scored; where not, or not by the newest version, why."""

    ready: bool
    models: list[str] = Field(description="NAME, or NAME/VERSION, of what is served.")
    problems: dict[str, str]


class Problem(BaseModel):
    """What is wrong with a request. Never a part of the recording."""

    detail: Any
