"""The online service on Ray Serve: one deployment whose replicas hold every served model.

Run it with `serve run serve/config.yaml`. What it answers is in `api.py`, how a recording finds its model and its
batch in `scoring.py`, who may ask in `security.py`, which versions answer in `registry.py`.
"""

import logging
import os
import tempfile
from pathlib import Path

import ray
import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve as ray_serve
from ray.serve import Application

from lsemvae.errors import LsemvaeError
from lsemvae.memory import keep_freed_memory
from lsemvae.tracking import fetch
from serve.api import Service, make_api
from serve.observed import Metrics
from serve.reconstruct import Reconstructor
from serve.registry import Registry
from serve.security import tokens_from_environment

log = logging.getLogger("ray.serve")


class Config(BaseModel):
    """The `args` of serve/config.yaml."""

    model_config = ConfigDict(extra="forbid")

    models: list[str] = Field(min_length=1, description="models:/NAME@champion, models:/NAME/3 or a bundle's folder")
    encoder: str | None = Field(default=None, description="the pre-trained bundle of /v1/reconstruct")
    bundles: Path = Field(default=Path("~/.cache/lsemvae/serve"), description="where the bundles that answer are kept")
    threads: int | None = Field(
        default=None, gt=0, description="of torch in a replica; all of its node's cores by default"
    )
    poll_s: float = Field(default=20, gt=0, description="seconds between two looks at MLflow's aliases")
    allow_anonymous: bool = Field(default=False, description="answer everybody when no token is set")
    cors_origins: list[str] = Field(default=[], description="sites whose pages may ask; none by default")
    max_body_mb: int = Field(default=32, gt=0, description="of one request")
    max_held_mb: int = Field(default=256, gt=0, description="of all requests that a replica is answering")
    body_timeout_s: float = Field(default=30, gt=0, description="in which a body must have come")


def make_service(config: Config) -> Service:
    """Loads what the configuration names. Raises LsemvaeError when nobody could be told from anybody."""
    tokens = tokens_from_environment()
    if not tokens and not config.allow_anonymous:
        raise LsemvaeError(
            "no token is set: export LSEMVAE_TOKENS=$(openssl rand -hex 32) where Ray starts, or LSEMVAE_TOKENS_FILE, "
            "or say allow_anonymous: true in serve/config.yaml"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reconstructor, problem = None, ""
    if config.encoder:
        try:
            with tempfile.TemporaryDirectory() as temporary:
                reconstructor = Reconstructor(fetch(config.encoder, Path(temporary)).folder, device)
        except LsemvaeError as error:  # scoring goes on without it
            problem = str(error)
            log.error(f"{config.encoder}: {problem}")
    return Service(
        registry=Registry(config.models, config.bundles.expanduser(), config.poll_s, device),
        metrics=Metrics(),
        reconstructor=reconstructor,
        reconstructor_problem=problem,
        tokens=tokens,
        cors_origins=config.cors_origins,
        max_body=config.max_body_mb * 2**20,
        max_held=config.max_held_mb * 2**20,
        body_timeout_s=config.body_timeout_s,
    )


@ray_serve.deployment(name="ecg")
@ray_serve.ingress()
class EcgService:
    """A replica. Ray Serve asks it for its application once it is made."""

    def __init__(self, config: Config) -> None:
        keep_freed_memory()
        # Ray would have it that a replica computes with as many threads as it reserves CPUs.
        torch.set_num_threads(config.threads or _cores())
        self._service = make_service(config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self._service)


def _cores() -> int:
    """Those of this node that Ray may use: in a pod, fewer than the machine has."""
    node_id = ray.get_runtime_context().get_node_id()
    of_ray = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == node_id)
    return max(1, min(int(of_ray), len(os.sched_getaffinity(0))))


def build(config: Config) -> Application:
    """What serve/config.yaml names as `import_path`."""
    return EcgService.bind(config)
