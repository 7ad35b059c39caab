"""What the endpoint takes and gives: the OpenAPI schema follows from these classes."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

MAX_RECORDS = 64
MAX_SAMPLES = 120_000  # two minutes at 1000 Hz

Samples = Annotated[list[FiniteFloat | None], Field(min_length=1, max_length=MAX_SAMPLES)]


class RecordIn(BaseModel):
    """One recording: leads by name, in any order and case; null where nothing was recorded."""

    model_config = ConfigDict(extra="forbid")

    leads: dict[str, Samples] = Field(
        min_length=1, max_length=12, examples=[{"I": [0.01, 0.02], "II": [0.03, 0.05], "V1": [-0.02, 0.01]}]
    )
    rate_hz: Annotated[FiniteFloat, Field(gt=0, description="Samples a second.", examples=[500])]
    unit: Literal["mV", "uV"] = "mV"
    id: Annotated[str, Field(max_length=200, description="Returned as it came; never logged.")] = ""


class ScoreRequest(BaseModel):
    """Recordings to score together."""

    model_config = ConfigDict(extra="forbid")

    records: Annotated[list[RecordIn], Field(min_length=1, max_length=MAX_RECORDS)]
    model: str | None = Field(
        default=None,
        description="A served model's name; by default the one with most leads that each recording has.",
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


class RefusedOut(BaseModel):
    """Why there is no score."""

    code: str
    reason: str


class ScoreOut(BaseModel):
    """The answer for one recording: score and decision, or `refused`."""

    id: str
    score: float | None = None
    decision: bool | None = None
    leads_used: list[str] = []
    leads_derived: list[str] = []
    flags: list[str] = []
    refused: RefusedOut | None = None
    model: ModelOut | None = None


class ScoreResponse(BaseModel):
    """One answer for each recording, in order. Research use only: not a medical device."""

    results: list[ScoreOut]
