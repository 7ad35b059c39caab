"""A trained model is a directory, the bundle: `config.json` and `model.safetensors`. Nothing is pickled.

Checkpoints, MLflow versions, batch scoring and Serve all use it. `config.json` holds the architecture, the
preprocessing and its version, leads, task, threshold, calibration, a measure of doubt where one helps, the score of an
example, provenance, and the SHA-256 of the weights. Its own SHA-256 is the bundle's digest, so that one digest
identifies everything that decides a score.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lsemvae import __version__
from lsemvae.errors import BundleError, LsemvaeError, Refused
from lsemvae.fields import as_json
from lsemvae.leads import LEADS, in_order
from lsemvae.models import architecture_name, build, config_from
from lsemvae.models.parts.doubt import Kind
from lsemvae.preprocess import PART, READABLE, Prepared, PreprocessConfig, preprocess, preprocess_signals, windows
from lsemvae.preprocess import VERSION as PREPROCESS_VERSION
from lsemvae.record import Record
from lsemvae.simulate import RATE_HZ, EcgParameters, simulate_ecg

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_CARD = "model_card"
"""The name in `provenance` of a text in Markdown about the model."""
EXAMPLE_TOLERANCE = 1e-4
"""Another processor or number of threads changes a score by 1e-6; other preprocessing or arithmetic by more."""


SET_ASIDE = 0.1
"""Share of the training recordings that are more doubtful than a bundle's limit."""


@dataclass(frozen=True)
class Calibration:
    """score -> probability, by Platt's sigmoid: logit(probability) = slope * logit(score) + intercept.

    The slope is above 0, so the order of recordings, and with it AUROC and every decision, does not change.
    """

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slope) and self.slope > 0 and math.isfinite(self.intercept)):
            raise LsemvaeError(
                f"calibration has slope {self.slope!r} and intercept {self.intercept!r}: give two finite numbers, the "
                "slope above 0"
            )

    def probability(self, score: np.ndarray | float) -> np.ndarray:
        """Scores between 0 and 1, of any shape -> probabilities of that shape."""
        return np.exp(-np.logaddexp(0.0, -(self.slope * logit(score) + self.intercept)))


def logit(score: np.ndarray | float) -> np.ndarray:
    """ln(score / (1 - score)), limited to +-16, since a float32 score may be 0 or 1."""
    score = np.clip(np.asarray(score, dtype=np.float64), 1e-7, 1 - 1e-7)
    return np.log(score) - np.log1p(-score)


@dataclass(frozen=True)
class Doubt:
    """A measure of doubt that was shown to find recordings which the model scores badly.

    kind      the measure, see `lsemvae.models.parts.doubt`
    limit     a tenth of the training recordings is more doubtful, each judged by a model trained without its subject
    measured  what setting these aside is worth, see `lsemvae.evaluation.abstention`
    """

    kind: Kind
    limit: float
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise LsemvaeError(f"the measure of doubt is {self.kind!r}: this version knows {', '.join(get_args(Kind))}")
        if not (isinstance(self.limit, int | float) and math.isfinite(self.limit) and self.limit >= 0):
            raise LsemvaeError(f"the limit of the doubt is {self.limit!r}: give a finite number, 0 or more")

    def reason(self, doubt: float) -> str | None:
        """Why the score of a recording with this doubt is less reliable, as a sentence; None up to the limit."""
        if doubt <= self.limit:
            return None
        share = f"{100 * SET_ASIDE:.0f} %"
        if self.kind == "distance":
            return f"Unlike the recordings that the model was trained on: of those, {share} were as unusual."
        return f"The score depends on where in the recording the beats fall, as in {share} of the training recordings."


@dataclass(frozen=True)
class Bundle:
    """The content of `config.json`. `task` and `threshold` are None for a pre-trained encoder.

    `calibration` is None without one, `doubt` where no measure of doubt is shown to help. `example` is the score of
    `example_record` when the bundle was saved; None for an encoder, and in bundles from before this field.
    """

    architecture: str
    config: dict[str, Any]
    leads: tuple[str, ...]
    preprocess: PreprocessConfig
    task: str | None = None
    threshold: float | None = None
    calibration: Calibration | None = None
    doubt: Doubt | None = None
    example: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""
    digest: str = ""

    @classmethod
    def of(cls, model: nn.Module, preprocess: PreprocessConfig, **rest: Any) -> "Bundle":
        """The description of a model that `models.build` made."""
        config: Any = model.config
        leads: Any = model.leads  # every architecture has both, which nn.Module does not know
        return cls(architecture_name(config), as_json(config), tuple(leads), preprocess, **rest)


def save(bundle: Bundle, model: nn.Module | Mapping[str, torch.Tensor], folder: Path) -> Bundle:
    """Writes the directory in one step, replacing an old one of that name -> the bundle with its digest.

    `model` may be given as its `state_dict()`.
    A bundle with a task is loaded again to score the example, and stores that score.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        state = model if isinstance(model, Mapping) else model.state_dict()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, partial / WEIGHTS)
        content = {
            "format": FORMAT,
            "version": __version__,
            "architecture": bundle.architecture,
            "config": bundle.config,
            "leads": bundle.leads,
            "preprocess": asdict(bundle.preprocess),
            "preprocess_version": PREPROCESS_VERSION,
            "task": bundle.task,
            "threshold": bundle.threshold,
            "calibration": asdict(bundle.calibration) if bundle.calibration else None,
            # Left out where there is none, so that bundles keep the digests of releases without it.
            **({"doubt": asdict(bundle.doubt)} if bundle.doubt else {}),
            "example": None,
            "provenance": bundle.provenance,
            "weights_sha256": _sha256(partial / WEIGHTS),
        }
        (partial / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True))
        if bundle.task is not None:
            content["example"] = Scorer(partial).score([example_record()])[0].score
            (partial / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True))
        saved = describe(partial)
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return saved


def describe(folder: Path) -> Bundle:
    """Reads and checks `config.json` alone. Raises BundleError that names the mistake and its place."""
    path = folder / CONFIG
    try:
        text = path.read_text()
        content = json.loads(text)
    except FileNotFoundError:
        raise BundleError(f"{folder} is no bundle: it has no {CONFIG}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BundleError(f"{path} is not a JSON object")
    if content.get("format") != FORMAT:
        raise BundleError(f"{path} has format {content.get('format')!r}, this version reads {FORMAT}: update lsemvae")
    absent = sorted({"architecture", "config", "leads", "preprocess", "weights_sha256"} - content.keys())
    if absent:
        raise BundleError(f"{path} lacks {', '.join(absent)}: make the bundle again")
    if content.get("preprocess_version") not in READABLE:
        raise BundleError(
            f"{path} was trained with preprocessing version {content.get('preprocess_version')!r}, "
            f"this release reads {', '.join(map(str, READABLE))}: use the lsemvae version {content.get('version')} "
            "that made it"
        )
    unknown = sorted(content["preprocess"].keys() - {f.name for f in fields(PreprocessConfig)})
    if unknown:
        raise BundleError(f"{path}: unknown preprocessing setting {', '.join(unknown)}")
    try:
        leads, settings = in_order(content["leads"]), PreprocessConfig(**content["preprocess"])
        calibration = Calibration(**content["calibration"]) if content.get("calibration") else None
        doubt = Doubt(**content["doubt"]) if content.get("doubt") else None
        config_from(content["architecture"], content["config"])
    except (LsemvaeError, TypeError) as error:
        raise BundleError(f"{path}: {error}") from None
    example = content.get("example")
    if not (example is None or (isinstance(example, float) and 0 <= example <= 1)):
        raise BundleError(f"{path}: the score of the example is {example!r}, must be between 0 and 1")
    return Bundle(
        architecture=content["architecture"],
        config=content["config"],
        leads=leads,
        preprocess=settings,
        task=content.get("task"),
        threshold=content.get("threshold"),
        calibration=calibration,
        doubt=doubt,
        example=example,
        provenance=content.get("provenance", {}),
        weights_sha256=content["weights_sha256"],
        digest=_digest(text.encode()),
    )


def is_unaltered(folder: Path, digest: str) -> bool:
    """Whether a bundle's folder holds the bytes with this digest, whichever version wrote them."""
    try:
        config = (folder / CONFIG).read_bytes()
        return _digest(config) == digest and _sha256(folder / WEIGHTS) == json.loads(config)["weights_sha256"]
    except (OSError, ValueError, KeyError):
        return False


def load(folder: Path, device: str = "cpu") -> tuple[Bundle, nn.Module]:
    """The bundle and its model in evaluation mode. Raises BundleError on a wrong digest, key or shape."""
    bundle = describe(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise BundleError(f"{folder} has no {WEIGHTS}: it is incomplete")
    if _sha256(weights) != bundle.weights_sha256:
        raise BundleError(f"{weights} is not the file this bundle was saved with (its SHA-256 differs): fetch it again")
    try:
        tensors = load_file(weights, device=device)
    except (SafetensorError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and weights.exists():
            raise  # torch raises it where the file has just gone, and for other reasons
        raise BundleError(f"{weights} cannot be read: {error}") from None
    with torch.device("meta"):
        model = build(config_from(bundle.architecture, bundle.config), bundle.leads)
    _check_tensors(weights, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    return bundle, model.to(device).eval()


def _check_tensors(path: Path, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    absent, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if absent or extra:
        what = f"lacks {absent[0]!r}" if absent else f"has {extra[0]!r}, which the architecture does not"
        raise BundleError(f"{path} {what}: it does not belong to this config.json")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise BundleError(f"{path}: {name!r} is {list(found[name].shape)}, must be {list(tensor.shape)}")


def _digest(config: bytes) -> str:
    return hashlib.sha256(config).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Score:
    """The answer for one recording: a score, or why it was refused.

    `probability` is the calibrated score, None where the bundle has no calibration. `doubt` is how doubtful the score
    is by the bundle's measure, None where it has none.
    """

    score: float | None
    decision: bool | None
    leads_used: tuple[str, ...]
    refused: Refused | None = None
    probability: float | None = None
    doubt: float | None = None


def example_record() -> Record:
    """The recording whose score a bundle stores: 12 leads, 10 s, no noise, some right heart strain.

    It must never change, because bundles hold its score.
    """
    quiet = EcgParameters(severity=0.8, heart_rate_bpm=66.0, noise_mv=(0.0,) * 5)
    signal_mv_LT, _ = simulate_ecg(quiet, np.random.default_rng(20503))
    return Record.from_leads(dict(zip(LEADS, signal_mv_LT.astype(np.float32), strict=True)), RATE_HZ)


@dataclass(frozen=True, eq=False)
class Ready(Record):
    """A record with its model input for the bundle of this digest, [1, L, T]. `ready` makes it."""

    digest: str = ""
    prepared: Prepared | None = None


def ready(records: Sequence[Record], bundle: Bundle) -> list[Record]:
    """The records with their model input: `Scorer.score` then only runs the model. It gives the same scores.

    Where the score takes all windows of a recording, their input may need any amount of memory. Then the records stay
    as they are.
    """
    if bundle.preprocess.window == "all":
        return list(records)
    made: list[Record] = []
    for k in range(0, len(records), PART):  # what is filtered at once needs no copy into a whole
        part = records[k : k + PART]
        x_BLT, mask_BL, refused_B = preprocess(part, bundle.leads, bundle.preprocess)
        for b, record in enumerate(part):
            row = slice(b, b + 1)
            prepared = Prepared(x_BLT[row], mask_BL[row], refused_B[row])
            made.append(Ready(**vars(record), digest=bundle.digest, prepared=prepared))
    return made


CHUNK = 64  # recordings in one pass: more would only cost memory


class Scorer:
    """Scores recordings with one bundle: the same way online, in batches and in a plain loop."""

    def __init__(self, folder: Path | str, device: str = "cpu") -> None:
        """Loads a bundle's folder. Raises BundleError when it is none, is damaged, or has no task."""
        folder = Path(folder)
        self.bundle, model = load(folder, device)
        self.model: Any = model  # every architecture with a task has `predict`
        if self.bundle.task is None:
            raise BundleError(f"{folder} is a pre-trained encoder, it has no task: fine-tune it first")
        self._folder, self._device = folder, device
        if device != "cpu":  # TF32 changes scores by more than another version of torch does
            torch.backends.cudnn.allow_tf32 = False

    def check_example(self) -> None:
        """Raises BundleError when the example's score differs from the stored one, if there is one."""
        if self.bundle.example is None:
            return
        score = self.score([example_record()])[0].score
        if score is None or not abs(score - self.bundle.example) <= EXAMPLE_TOLERANCE:
            raise BundleError(
                f"{self._folder} scores its example {score}, and {self.bundle.example} when it was saved: the versions "
                "of lsemvae, torch or numpy here are not those that made it, or it was altered"
            )

    def score(self, records: Sequence[Record]) -> list[Score]:
        """One `Score` for each record, in order. Leads are taken by name; the bundle ignores those it does not know."""
        leads = self.bundle.leads
        made = [
            of.prepared for of in records if isinstance(of, Ready) and of.digest == self.bundle.digest and of.prepared
        ]
        if made and len(made) == len(records):
            return [
                answer
                for k in range(0, len(made), CHUNK)
                for answer in self._answers(Prepared.joined(made[k : k + CHUNK]))
            ]
        return self.score_signals([r.signal_for(leads) for r in records], [r.rate_hz for r in records])

    def score_file(self, path: Path | str, *, uv_per_lsb: float | None = None) -> Score:
        """The same for a local file of any format that `formats.read` knows. Raises UnreadableRecording."""
        from lsemvae.formats import read  # what loads bundles only, such as a model in MLflow, needs no readers

        return self.score([read(path, uv_per_lsb=uv_per_lsb)])[0]

    def score_signals(self, signals_mv: Sequence[np.ndarray], rates_hz: Sequence[float]) -> list[Score]:
        """The same from arrays [L, T] in mV that hold the bundle's leads in order, NaN where a sample is missing."""
        config = self.bundle.preprocess
        if config.window != "all":
            return self._score_windows(signals_mv, rates_hz)
        parts = [windows(signal, rate, config) for signal, rate in zip(signals_mv, rates_hz, strict=True)]
        rates_of_parts = [rate for rate, part in zip(rates_hz, parts, strict=True) for _ in part]
        scored = iter(self._score_windows([window for part in parts for window in part], rates_of_parts))
        return [self._mean([next(scored) for _ in part]) for part in parts]

    def _score_windows(self, signals_mv: Sequence[np.ndarray], rates_hz: Sequence[float]) -> list[Score]:
        answers: list[Score] = []
        for start in range(0, len(signals_mv), CHUNK):
            part = slice(start, start + CHUNK)
            prepared = preprocess_signals(signals_mv[part], rates_hz[part], self.bundle.leads, self.bundle.preprocess)
            answers += self._answers(prepared)
        return answers

    def _mean(self, of_windows: Sequence[Score]) -> Score:
        """The mean over the windows that are not refused, or the first refusal when all are."""
        accepted = [answer for answer in of_windows if answer.score is not None]
        if len(of_windows) == 1 or not accepted:
            return of_windows[0]
        score = float(np.mean([answer.score for answer in accepted]))
        doubts = [answer.doubt for answer in accepted if answer.doubt is not None]
        used = {lead for answer in accepted for lead in answer.leads_used}
        leads_used = tuple(lead for lead in self.bundle.leads if lead in used)
        return self._scored(score, leads_used, float(np.mean(doubts)) if doubts else None)

    def _scored(self, score: float, leads_used: tuple[str, ...], doubt: float | None) -> Score:
        calibration = self.bundle.calibration
        probability = float(calibration.probability(score)) if calibration else None
        return Score(score, score >= self.threshold, leads_used, probability=probability, doubt=doubt)

    def why_doubtful(self, answer: Score) -> str | None:
        """Why this answer is more doubtful than the bundle's limit, as a sentence; None where it is not."""
        doubt = self.bundle.doubt
        return None if doubt is None or answer.doubt is None else doubt.reason(answer.doubt)

    @property
    def threshold(self) -> float:
        return self.bundle.threshold if self.bundle.threshold is not None else 0.5

    def _answers(self, prepared: Prepared) -> list[Score]:
        accepted_B = prepared.accepted_B
        score_B = np.full(len(accepted_B), np.nan)
        doubt_B: list[float | None] = [None] * len(accepted_B)
        if accepted_B.any():
            x_BLT, mask_BL = (
                torch.from_numpy(values if accepted_B.all() else values[accepted_B]).to(self._device)
                for values in (prepared.x_BLT, prepared.lead_mask_BL)
            )
            with torch.inference_mode():
                if self.bundle.doubt is None:
                    probability_B = self.model.predict(x_BLT, mask_BL)
                else:
                    probability_B, found_B = self.model.predict_with_doubt(x_BLT, mask_BL, self.bundle.doubt.kind)
                    for row, found in zip(np.flatnonzero(accepted_B), found_B.tolist(), strict=True):
                        doubt_B[row] = found
            score_B[accepted_B] = probability_B.float().cpu().numpy()
        answers = []
        rows = zip(score_B, doubt_B, prepared.lead_mask_BL, prepared.refused_B, strict=True)
        for score, doubt, mask_L, reason in rows:
            if reason is not None:
                answers.append(Score(None, None, (), reason))
                continue
            used = tuple(lead for lead, usable in zip(self.bundle.leads, mask_L, strict=True) if usable)
            answers.append(self._scored(float(score), used, doubt))
        return answers
