"""The online service on Ray Serve: one deployment whose replicas hold every served model.

Run it with `serve run serve/config.yaml`. `api.py` has the routes, `scoring.py` chooses a recording's model and batch,
`security.py` checks tokens and limits, `registry.py` decides which versions answer.
"""

import logging
import os
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve as ray_serve
from ray.serve import Application

from lsemvae.errors import LsemvaeError
from lsemvae.memory import keep_freed_memory
from serve.api import make_api
from serve.explaining import Explaining
from serve.model_thread import require_working
from serve.observed import Metrics
from serve.reconstruct import Encoder
from serve.registry import Registry
from serve.security import Tokens
from serve.service import Service

log = logging.getLogger("ray.serve")


class Config(BaseModel):
    """The `args` of serve/config.yaml."""

    model_config = ConfigDict(extra="forbid")

    models: list[str] = Field(min_length=1, description="models:/NAME@champion, models:/NAME/3, or a bundle's folder")
    encoder: str | None = Field(default=None, description="the pre-trained bundle that /v1/reconstruct uses")
    bundles: Path = Field(default=Path("~/.cache/lsemvae/serve"), description="where the bundles that answer are kept")
    threads: int | None = Field(
        default=None, gt=0, description="torch threads of a replica; by default all of its node's cores"
    )
    explain_queue: int = Field(
        default=4, ge=0, description="explanations that wait while one is made: beyond it 503; 0 makes none"
    )
    explain_timeout_s: float = Field(default=50, gt=0, description="time for one explanation: after it 504")
    model_timeout_s: float = Field(
        default=60, gt=0, description="time for one batch: a replica whose models take longer is replaced"
    )
    poll_s: float = Field(default=20, gt=0, description="seconds between two looks at MLflow's aliases")
    allow_anonymous: bool = Field(default=False, description="answer everybody when no token is set")
    cors_origins: list[str] = Field(
        default=[], description="other sites whose pages may send requests; none by default"
    )
    max_body_mb: int = Field(default=32, gt=0, description="size of one request's body")
    max_held_mb: int = Field(
        default=512,
        gt=0,
        description="memory of all requests that a replica is answering, their parsed samples included",
    )
    body_timeout_s: float = Field(default=30, gt=0, description="time in which a whole body must arrive")


def make_service(config: Config) -> Service:
    """Loads what the configuration names. Raises LsemvaeError when no token is set and anonymous use is not allowed."""
    tokens = Tokens.from_environment()
    if not tokens.required and not config.allow_anonymous:
        raise LsemvaeError(
            "no token is set: export LSEMVAE_TOKENS=$(openssl rand -hex 32) where Ray starts, or LSEMVAE_TOKENS_FILE, "
            "or say allow_anonymous: true in serve/config.yaml"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens.follow()
    bundles, metrics = config.bundles.expanduser(), Metrics()
    return Service(
        registry=Registry(config.models, bundles, config.poll_s, device, metrics),
        metrics=metrics,
        encoder=Encoder(config.encoder, bundles, config.poll_s, device) if config.encoder else None,
        explaining=_explaining(config),
        tokens=tokens,
        cors_origins=config.cors_origins,
        max_body=config.max_body_mb * 2**20,
        max_held=config.max_held_mb * 2**20,
        body_timeout_s=config.body_timeout_s,
    )


def _explaining(config: Config) -> Explaining | None:
    """With as many threads as the replica has; None where explanations are switched off."""
    if not config.explain_queue:
        return None
    return Explaining(config.explain_queue, config.explain_timeout_s, torch.get_num_threads())


@ray_serve.deployment(name="ecg")
@ray_serve.ingress()
class EcgService:
    """A replica. Ray Serve takes the application from `__serve_build_asgi_app__`."""

    def __init__(self, config: Config) -> None:
        keep_freed_memory()
        # By default Ray gives a replica as many threads as it reserves CPUs.
        torch.set_num_threads(config.threads or _cores())
        self._service, self._model_timeout_s = make_service(config), config.model_timeout_s

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self._service)

    async def check_health(self) -> None:
        """Ray Serve asks this regularly, and replaces a replica that raises or does not answer three times in a row."""
        await require_working(self._service.registry.served.values(), self._model_timeout_s)


def _cores() -> int:
    """This node's cores that Ray may use; in a pod these are fewer than the machine has."""
    node_id = ray.get_runtime_context().get_node_id()
    of_ray = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == node_id)
    return max(1, min(int(of_ray), len(os.sched_getaffinity(0))))


def build(config: Config) -> Application:
    """The application that serve/config.yaml names as `import_path`."""
    deployment: Any = EcgService  # which the decorators have made of the class
    return deployment.bind(config)
