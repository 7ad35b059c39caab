"""Compare methods on a labelled cohort: the same folds, training and seeds for all, one table, one report.

Every method is tested on subjects that its training has not seen. Methods that pre-train take an encoder each
(--encoders NAME=URI), or are pre-trained first, all with one schedule (--pretrain). Rows without a neural network, an
untrained encoder and the naive score are always in the table. Trainings run on Ray Tune; finished ones are kept under
--output, so the same command again goes on, and more methods or analyses add to what is there. The exit status is 3 if
some trainings failed.
"""

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pretrain
import torch
from command import run_command, start_ray
from options import RARE

from lsemvae import __version__
from lsemvae.config import FinetuneRecipe, PretrainRecipe
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.evaluation import abstention, calibration, plan
from lsemvae.evaluation.cells import MAIN
from lsemvae.evaluation.compare import Comparison, Scores, compare, failures
from lsemvae.evaluation.embedding import Embedded, Pretrained, load_encoder
from lsemvae.evaluation.estimate import cell_seconds, pretrain_seconds
from lsemvae.evaluation.lead_set import Cohort, LeadSet, Setup, evaluate, read_cohort
from lsemvae.evaluation.methods import REFERENCE, SUPERVISED, Method, chosen
from lsemvae.evaluation.metrics import best_threshold
from lsemvae.evaluation.protocol import refit
from lsemvae.evaluation.release import Trained, assembled, release
from lsemvae.evaluation.tables import all_as_markdown, differences_table, main_table
from lsemvae.external import EXTERNAL
from lsemvae.fields import as_json
from lsemvae.leads import LEADS, lead_set_name
from lsemvae.models import Reconstructs, build
from lsemvae.plots import curves
from lsemvae.progress import over
from lsemvae.recipes import FINETUNE, PRETRAIN, SIZES, read_recipe
from lsemvae.reports.evaluation import evaluation_report
from lsemvae.reports.model_card import model_card
from lsemvae.scoring.drift import ScoreBins
from lsemvae.storage import Storage
from lsemvae.tracking import CANDIDATE, Run
from lsemvae.training.grid import digest
from lsemvae.training.launch import open_sources

FAILED = 3  # exit status
REPORT = "report.html"
DRAWN = 4
"""Recordings to look for some to draw."""
LOGGED = (
    "task", "source_layout", "leads", "folds", "seeds", "size", "recipe", "supervised_recipe", "encoders", "release",
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    cohort: str
    """Labelled shards: the --output of workflows/ingest.py (folder or s3:// URI)."""
    task: str
    """The label to predict, with values 0 and 1."""
    output: Path
    """Folder for tables, report, finished trainings and the encoders that are pre-trained here."""
    methods: tuple[str, ...] = ("all",)
    """Names of methods, or all. LS-EMVAE is always compared. A name that is none lists them."""
    leads: tuple[str, ...] = ("6", "12")
    """Lead sets of the main table: 6, 12, or names such as I,II,V1."""
    size: Literal["full", "cpu", "smoke"] = "cpu"
    """Size of the architectures, and the schedule of their pre-training."""
    encoders: tuple[str, ...] = ()
    """Pre-trained bundles, NAME=URI: a folder, s3:// URI or models:/NAME@alias."""
    pretrain: tuple[str, ...] = ()
    """Shards without labels to pre-train the other methods on, as --data of workflows/pretrain.py."""
    pretrain_epochs: Annotated[int | None, RARE] = None
    """Epochs of that pre-training, for every method the same; by default those of the size."""
    pretrain_workers: Annotated[int | None, RARE] = None
    """Workers of that pre-training; by default 2, or 1 on a GPU."""
    exclude: Annotated[tuple[str, ...], RARE] = ()
    """Leave out the subjects of these shards in that pre-training."""
    use_gpu: Annotated[bool, RARE] = False
    """Pre-train on a GPU."""
    training: str = "linear"
    """How pre-trained methods are fine-tuned: a recipe of workflows/finetune.py, or the path of a recipe's .json file.
    Supervised methods train all weights, with the recipe full, cpu or smoke of their size."""
    scratch_epochs: Annotated[int | None, RARE] = None
    """Epochs of the supervised methods; by default those of their recipe."""
    seeds: int = 1
    """Repeat every training that has a random start so often."""
    folds: str = "5"
    """Number of folds, or the label that holds a fold for each recording, such as strat_fold."""
    analyses: tuple[str, ...] = ()
    """lead-sets, ablations, fewer-labels, balance, noise, external, or all."""
    external: str | None = None
    """Other labelled shards with the same label: models that are trained on all of --cohort are tested there."""
    register: str = REFERENCE
    """The method that is trained on all recordings and registered in MLflow, a model for each lead set, or none."""
    model_name: str | None = None
    """The registered models are NAME-LEADS, such as ph-6L; by default NAME is the task."""
    data_licence: Annotated[str, RARE] = "not stated"
    """The licence of the data, for the model card."""
    storage: Annotated[str | None, RARE] = None
    """Where finished trainings are kept (folder or s3:// URI); by default --output."""
    max_concurrent: Annotated[int, RARE] = 2
    """Trainings at a time, one CPU each."""
    gpus: Annotated[float, RARE] = 0
    """GPUs for each training of all weights and for embedding, such as 0.25 for four trainings on one; 0 uses CPUs."""
    dry_run: bool = False
    """Print the trainings and an estimate of the time, and end."""


def main(args: Args) -> None:
    wanted = plan.analyses(args.analyses, external=args.external is not None)
    given = [word.partition("=")[0] for word in args.encoders]
    methods = chosen(
        [*args.methods, *(name for name in given if name in EXTERNAL)], args.size, ablations=plan.ABLATIONS in wanted
    )
    if args.register not in {"none", *(method.name for method in methods)}:
        raise LsemvaeError(f"--register {args.register}: give one of the methods that are compared, or none")
    training, supervised = recipes(args)
    sets = plan.lead_sets(args.leads, plan.SMALL_SETS if plan.LEAD_SETS in wanted else ())
    cohort = read_cohort(args.cohort, args.task, args.folds, training)
    external = open_external(args)
    uris = encoder_uris(args, methods)
    lacking = [method for method in methods if method.takes_encoder and method.name not in uris]
    if args.dry_run:
        show_plan(args, methods, uris, lacking, sets, wanted, cohort, training, supervised)
        return
    encoders = {name: load_encoder(uri) for name, uri in uris.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    failed: list[tuple[str, str]] = []
    encoders |= {name: load_encoder(uri) for name, uri in pretrained(args, lacking, failed).items()}
    if REFERENCE not in encoders:
        raise LsemvaeError("LS-EMVAE has no encoder, because its pre-training failed: nothing can be compared with it")
    start_ray()
    keep = Storage.open(args.storage or args.output.absolute())
    setup = Setup(
        cohort, methods, encoders, training, supervised, keep, external, wanted, args.max_concurrent, args.gpus
    )
    done = [evaluate(setup, leads, analysis) for leads, analysis in sets.items()]
    finish(args, setup, done, failed)


def recipes(args: Args) -> tuple[FinetuneRecipe, FinetuneRecipe]:
    """How pre-trained methods are fine-tuned, and how supervised ones are trained."""
    if args.training.endswith(".json"):
        training = read_recipe(args.training, FinetuneRecipe)
    elif args.training in FINETUNE:
        training = FINETUNE[args.training]
    else:
        raise LsemvaeError(f"there is no recipe {args.training!r}: choose one of {', '.join(FINETUNE)}, or give a file")
    supervised = SUPERVISED[args.size]
    scratch_epochs = args.scratch_epochs or supervised.scratch_epochs
    return replace(training, seeds=args.seeds), replace(supervised, seeds=args.seeds, scratch_epochs=scratch_epochs)


def open_external(args: Args) -> ShardedDataset | None:
    if args.external is None:
        return None
    other = ShardedDataset.open(args.external)
    other.require_label(args.task)
    return other


def encoder_uris(args: Args, methods: Sequence[Method]) -> dict[str, str]:
    """The given encoder of each method. Raises LsemvaeError on a method without one, if nothing is pre-trained."""
    uris = {}
    for word in args.encoders:
        name, _, uri = word.partition("=")
        if not uri or name not in {method.name for method in methods if method.takes_encoder}:
            known = ", ".join(method.name for method in methods if method.takes_encoder)
            raise LsemvaeError(f"--encoders {word}: give NAME=URI, with one of the methods that take one: {known}")
        uris[name] = uri
    lacking = [method for method in methods if method.takes_encoder and method.name not in uris]
    if args.pretrain:
        lacking = [method for method in lacking if method.recipe is None]
    if lacking:
        names = ", ".join(method.name for method in lacking)
        other = "" if lacking[0].recipe is None else "or --pretrain with shards to pre-train on, "
        raise LsemvaeError(
            f"no encoder for {names}: give --encoders {lacking[0].name}=URI, {other}or name other --methods"
        )
    return uris


def pretrained(args: Args, methods: Sequence[Method], failed: list[tuple[str, str]]) -> dict[str, str]:
    """Pre-train these methods, one after another -> their bundles. One that fails is noted, the others go on."""
    found = {}
    for method in methods:
        recipe = pretrain_recipe(args, method)
        # The same settings resume, and others do not take over what is there.
        name = f"{method.name}-{digest(as_json(recipe), args.pretrain, args.exclude)[:8]}"
        storage = args.output.absolute() / "encoders"
        command = pretrain.Args(
            recipe, args.pretrain, str(storage), exclude=args.exclude, name=name, use_gpu=args.use_gpu,
            num_workers=str(workers_of(args)), model_name=f"{method.name}-encoder",
            cache=str(args.output.absolute() / "cache"),
        )  # fmt: skip
        print(f"\npre-training {method.title}", flush=True)
        try:
            pretrain.main(command)
        except LsemvaeError as error:
            print(f"pre-training {method.title} failed: {error}", file=sys.stderr)
            failed.append((method.title, f"pre-training: {error}"))
        else:
            found[method.name] = str(storage / name / "bundle")
    return found


def pretrain_recipe(args: Args, method: Method) -> PretrainRecipe:
    """The method's recipe, with `--pretrain-epochs`."""
    recipe = method.recipe
    assert recipe is not None
    if not args.pretrain_epochs:
        return recipe
    warmup = min(recipe.kl_warmup_epochs, args.pretrain_epochs / 2)
    optim = replace(recipe.optim, epochs=args.pretrain_epochs)
    return replace(recipe, optim=optim, kl_warmup_epochs=warmup)


def workers_of(args: Args) -> int:
    return args.pretrain_workers or (1 if args.use_gpu else 2)


def show_plan(
    args: Args,
    methods: Sequence[Method],
    uris: Mapping[str, str],
    lacking: Sequence[Method],
    sets: Mapping[tuple[str, ...], str],
    wanted: Sequence[str],
    cohort: Cohort,
    training: FinetuneRecipe,
    supervised: FinetuneRecipe,
) -> None:
    """Print the trainings of each lead set and how long they are expected to take here."""
    torch.set_num_threads(1)
    recipe = methods[0].recipe
    assert recipe is not None
    records, folds = len(cohort.people), len(cohort.folds)
    reference = build(recipe.model, LEADS)
    models = {m.name: Pretrained(build(m.recipe.model, LEADS), "", recipe.preprocess, "") for m in methods if m.recipe}
    models |= {name: load_encoder(uri) for name, uri in uris.items() if name in EXTERNAL}
    total = 0.0
    if lacking:
        recordings = sum(s.data.rows("train") * s.repeats for s in open_sources(args.pretrain, args.exclude))
        for method in over(lacking, "time a step of pre-training", "methods"):
            one = pretrain_recipe(args, method)
            seconds = pretrain_seconds(one, LEADS, recordings, workers_of(args))
            total += seconds
            work = f"{one.optim.epochs} epochs of {recordings} recordings"
            print(f"pre-train {method.title}: {work}, about {minutes(seconds)}")
    for leads, analysis in sets.items():
        random = [reference] * training.seeds
        planned = plan.plan(methods, models, random, leads, training, supervised)
        cells = plan.cells(planned, folds, wanted, main=analysis == MAIN)
        print(f"{lead_set_name(leads)} ({analysis}): {len(cells)} trainings")
        for row in over(planned.rows, "time a training", "rows"):
            encoder = planned.encoders.get(recipe.preprocess.digest, {}).get(row.features[0])
            features = encoder.embedding_size if encoder else len(leads) * 9
            start = planned.starts.get(row.name)
            seconds = cell_seconds(row, start, recipe.preprocess.samples, features, records, folds)
            mine = [cell for cell in cells if cell.row is row]
            seconds *= sum(cell.variant.share for cell in mine)
            total += seconds / args.max_concurrent
            print(f"  {row.name}: {len(mine)} trainings, about {minutes(seconds / args.max_concurrent)}")
        for method, reason in planned.refused.items():
            print(f"  {method}: not compared: {reason}")
    device = "on this machine's CPU, one thread a training" if not args.gpus else "on a CPU; a GPU is faster"
    print(f"in all about {minutes(total)} {device}, with embedding and tables some minutes more")


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def finish(args: Args, setup: Setup, done: Sequence[LeadSet], failed: Sequence[tuple[str, str]]) -> None:
    """Tables, report, registered models, and the exit status."""
    scores = gathered(args, setup, done, failed)
    place = Storage.open(args.output.absolute())
    scores.write(place)
    comparison = compare(scores, draws=setup.training.bootstrap_draws, seed=setup.training.optim.seed)
    comparison.write(place)
    place.write_bytes("tables.md", all_as_markdown(comparison).encode())
    first = next(of for of in done if of.analysis == MAIN)
    report = evaluation_report(
        scores, comparison, features=features(first, setup), reconstructions=reconstructions(setup, first)
    )
    place.write_bytes(REPORT, report.encode())
    run = Run.start("evaluate", f"{args.task}-comparison", {name: scores.facts[name] for name in LOGGED})
    run.tags({"data": scores.facts["data"]["uri"], "data_digest": scores.facts["data"]["digest"]})
    run.reads(setup.cohort.data, "evaluation")
    try:
        registered = [] if args.register == "none" else register(args, setup, done, scores, comparison, run)
        for path in sorted(args.output.glob("*.*")):
            run.file(path)
        table = main_table(comparison)
        run.table("comparison_table.json", pd.DataFrame(table.rows, columns=table.header).to_dict("list"))
        run.metrics(numbers(comparison))
    except BaseException:
        run.end("FAILED")
        raise
    run.end()
    for table in (main_table(comparison), differences_table(comparison)):
        print(f"\n{pd.DataFrame(table.rows, columns=table.header).to_string(index=False)}")
    print()
    for line in registered:
        print(line)
    print(f"report:  {args.output / REPORT}; its tables are beside it")
    print(f"MLflow:  {run.url}")
    if registered:
        print("promote: python workflows/promote.py --name …")
    if broken := len(failed) + sum(len(of.ran.failed) for of in done):
        print(f"error: {broken} trainings failed; {args.output}/failed.csv says why", file=sys.stderr)
        raise SystemExit(FAILED)


def features(of: LeadSet, setup: Setup) -> dict[str, np.ndarray] | None:
    """LS-EMVAE's frozen features of each recording, where they were computed."""
    title = setup.methods[0].title
    if title not in of.material.embedded.h_BF:
        return None
    return dict(zip(of.material.embedded.record_B.tolist(), of.material.embedded.h_BF[title][:], strict=True))


def reconstructions(setup: Setup, of: LeadSet) -> bytes | None:
    """A picture of the first recordings as LS-EMVAE reconstructs them."""
    reference = setup.encoders[REFERENCE]
    model, leads = reference.model, reference.model.leads
    if not isinstance(model, Reconstructs) or not set(model.decoder_leads) <= set(leads):
        return None
    rows = setup.cohort.data.model_input(leads, reference.preprocess, batch_size=DRAWN).take_batch(DRAWN)
    accepted = pd.isna(rows["refused"])
    if not accepted.any():
        return None
    x_BLT, mask_BL = (torch.from_numpy(rows[name][accepted].copy()) for name in ("x_LT", "lead_mask_L"))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path, written = Path(folder) / "reconstructions.png", model.decoder_leads
        kept = [leads.index(lead) for lead in written]
        curves.reconstructions(
            x_BLT[:, kept].numpy(), model.eval().reconstruct(x_BLT, mask_BL.bool()).numpy(), written,
            reference.preprocess.rate_hz, path,
        )  # fmt: skip
        return path.read_bytes()


def numbers(comparison: Comparison) -> dict[str, float]:
    """The main table as named numbers for MLflow: LEADS/METHOD/METRIC, with `.low` and `.high` for intervals."""
    main = comparison.metrics[(comparison.metrics["analysis"] == MAIN) & (comparison.metrics["note"] == "")]
    found = {}
    for line in main.itertuples():
        name = re.sub(r"[^\w./-]+", "_", f"{line.leads}/{line.method}/{line.metric}")
        found |= {name: line.value, f"{name}.low": line.low, f"{name}.high": line.high}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def register(
    args: Args, setup: Setup, done: Sequence[LeadSet], every: Scores, comparison: Comparison, run: Run
) -> list[str]:
    """Train the chosen method on all recordings for each lead set of the main table, and register it with its card."""
    (method,) = (method for method in setup.methods if method.name == args.register)
    lines = []
    for of in done:
        row = next((row for row in of.planned.rows if row.name == method.title), None)
        embedded = of.material.embedded
        scores, _ = of.tables()
        mine = scores[(scores["method"] == method.title) & (scores["analysis"] == MAIN) & (scores["seed"] == 0)]
        if of.analysis != MAIN or row is None or mine.empty:
            continue
        score_B = mine.set_index("record_id")["score"].loc[embedded.record_B].to_numpy()
        encoder = setup.encoders.get(method.name)
        set_aside = comparison.set_aside(method.title, of.name)
        trained = Trained(
            assembled(refit(row, of.material, of.trials), encoder.model if encoder else None, of.leads, row.recipe),
            setup.inputs[row.input],
            row.recipe,
            best_threshold(embedded.y_B, score_B),
            calibration.fit_sigmoid(embedded.y_B, score_B, calibration.subject_weights(embedded.subject_B)),
            {name: asdict(value) for name, value in comparison.line(method.title, of.name).items()},
            {"uri": encoder.uri, "digest": encoder.digest} if encoder else None,
            abstention.carried(set_aside, every.doubts_of(method.title, of.name)),
            ScoreBins.of(score_B),
        )
        name, folder = f"{args.model_name or args.task}-{of.name}", args.output / f"bundle-{of.name}"
        saved, version = release(
            trained, setup.cohort.data, len(embedded.y_B), args.task, name, run, folder,
            lambda described, leads=of.name, found=set_aside: model_card(
                every, comparison, described, leads=leads, method=method.title, abstention=abstention.verdict(found),
                data_licence=args.data_licence,
            ),
        )  # fmt: skip
        lines.append(f"model:   models:/{name}/{version} (alias {CANDIDATE}, {method.title}, digest {saved.digest})")
    return lines


def gathered(args: Args, setup: Setup, done: Sequence[LeadSet], failed: Sequence[tuple[str, str]]) -> Scores:
    """The scores of every lead set as one table, with what a reader must know about them."""
    tables = [of.tables() for of in done]
    people = setup.cohort.people.copy()
    for name, other in next((of.material.others for of in done if of.analysis == MAIN), {}).items():
        people = pd.concat([people, _people_of(name, other)], ignore_index=True)
    not_trained = failures(
        [(MAIN, "", "all", title, 0, 0, reason) for title, reason in failed]
        + [(MAIN, "", of.name, title, 0, 0, reason) for of in done for title, reason in of.planned.refused.items()]
    )
    data, training = setup.cohort.data, setup.training
    y_B = setup.cohort.people["label"]
    facts = {
        "task": args.task,
        "source_layout": data.manifest.cohort,  # a simulated cohort has that of MIMIC-IV-ECG
        "data": {"uri": data.storage.uri, "digest": data.manifest.digest},
        "records": len(y_B),
        "positive": int(y_B.sum()),
        "subjects": int(setup.cohort.people["subject_id"].nunique()),
        "refused": {of.name: of.material.embedded.refused for of in done},
        "leads": [of.name for of in done],
        "folds": setup.cohort.about_folds,
        "seeds": training.seeds,
        "policy": policy(args, setup),
        "size": args.size,
        "recipe": as_json(training, every_tag=True),
        "supervised_recipe": as_json(setup.supervised, every_tag=True),
        "preprocess": setup.encoders[REFERENCE].preprocess.digest,
        "encoders": {name: {"uri": e.uri, "digest": e.digest} for name, e in setup.encoders.items()},
        "release": __version__,
    }
    return Scores(
        facts,
        people,
        pd.concat([scores for scores, _ in tables], ignore_index=True),
        pd.concat([not_trained, *(broken for _, broken in tables)], ignore_index=True),
        pd.concat([of.doubts() for of in done], ignore_index=True),
    )


def _people_of(name: str, other: Embedded) -> pd.DataFrame:
    """Another cohort's recordings, which have no fold here."""
    return pd.DataFrame(
        {
            "record_id": [f"{name}/{record}" for record in other.record_B],
            "subject_id": [f"{name}/{subject}" for subject in other.subject_B],
            "label": other.y_B,
            "fold": -1,
            "female": np.nan,
            "age_years": np.nan,
        }
    )


def policy(args: Args, setup: Setup) -> str:
    """How the methods are trained, in words: what makes the comparison fair."""
    training, supervised = setup.training, setup.supervised
    how = {
        "head": f"a head on frozen features ({training.features})",
        "linear": f"L2 logistic regression on frozen features ({training.features}), strength chosen on inner folds",
        "all": f"all weights, {training.optim.epochs} epochs under random circular shifts, scores averaged over "
        f"{training.shifts} shifts",
    }[training.trains]
    before = "given encoders"
    if args.pretrain:
        epochs = args.pretrain_epochs or PRETRAIN[SIZES[args.size]].optim.epochs
        before = f"{epochs} epochs on {', '.join(args.pretrain)} with the schedule of the recipe {SIZES[args.size]}"
    others = [method.title for method in setup.methods if method.name in EXTERNAL]
    elsewhere = (
        f" {' and '.join(others)}: pre-trained by others, on data that may hold these recordings." if others else ""
    )
    return (
        f"Pre-training: {before}, circular shifts for every method.{elsewhere} Fine-tuning of every pre-trained and "
        f"untrained encoder: {how}. Supervised methods: all weights from random ones, "
        f"{supervised.scratch_epochs} epochs under random circular shifts, scores averaged over {supervised.shifts} "
        "shifts. Classical features and amplitude "
        "quantiles: L2 logistic regression."
    )


if __name__ == "__main__":
    run_command(main, Args)
