"""Turn the published weights of an external encoder into a bundle, which the other commands take as --encoder.

ecg-fm is ECG-FM (McKeen et al. 2024), timesfm is TimesFM 2.5 (Das et al. 2024). Nothing is downloaded: you get the
weights yourself, as safetensors or as a PyTorch checkpoint of tensors alone; nothing is unpickled. The bundle has the
encoder's own preprocessing, and its provenance names the file, its SHA-256 and its licence.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from command import run_command

from lsemvae.bundle import save
from lsemvae.errors import LsemvaeError
from lsemvae.external import EXTERNAL, adapt
from lsemvae.progress import Bar
from lsemvae.storage import Storage
from lsemvae.tracking import CANDIDATE, Run


@dataclass(frozen=True)
class Args:
    encoder: Annotated[Literal["ecg-fm", "timesfm"], tyro.conf.Positional]
    """Which encoder the weights belong to."""
    output: Path
    """The bundle: a new folder, or one that is replaced."""
    weights: str | None = None
    """The file of weights: a path or s3:// URI."""
    register: str | None = None
    """Also make the bundle a version of this MLflow model, such as ecg-fm-encoder."""


def main(args: Args) -> None:
    if args.weights is None:
        raise LsemvaeError(f"{EXTERNAL[args.encoder].where}: download it and name it in --weights")
    if args.output.exists() and not (args.output / "config.json").is_file():
        raise LsemvaeError(f"--output {args.output} exists and is no bundle: name a new folder")
    with Bar(None, "convert"), tempfile.TemporaryDirectory() as temporary:
        described, model = adapt(args.encoder, local_file(args.encoder, args.weights, Path(temporary)), args.weights)
        saved = save(described, model, args.output)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{EXTERNAL[args.encoder].title}: {millions:.1f} million parameters, digest {saved.digest}")
    print(f"bundle:  {args.output}")
    if args.register:
        run = Run.start("adapt", args.encoder, {"encoder": args.encoder, "weights": saved.provenance["weights"]})
        with Bar(None, "register"):
            run.bundle(args.output)
            version = run.register(args.register, {"digest": saved.digest, "kind": "encoder"}, CANDIDATE)
        run.end()
        print(f"model:   models:/{args.register}/{version} (alias {CANDIDATE})")
        print(f"MLflow:  {run.url}")
    print(f"next:    python workflows/finetune.py RECIPE --encoder {args.output} --data … --task …")


def local_file(encoder: str, uri: str, folder: Path) -> Path:
    """The file on this machine, downloaded into `folder` from an object store. Raises LsemvaeError if it is absent."""
    storage = Storage.open(uri)
    path = Path(storage.base)
    if not (path.is_file() if storage.is_local else storage.exists()):
        raise LsemvaeError(f"there is no file {uri}. {EXTERNAL[encoder].where}; nothing is downloaded from there")
    if storage.is_local:
        return path
    with storage.reading("") as source, (folder / path.name).open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)
    return folder / path.name


if __name__ == "__main__":
    run_command(main, Args)
