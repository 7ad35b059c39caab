"""What every route needs: the models, the limits and the metrics of a replica."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from serve.explaining import Explaining
from serve.observed import Metrics
from serve.reconstruct import Encoder
from serve.registry import Registry
from serve.security import Tokens


@dataclass(frozen=True)
class Service:
    """The models that answer requests, and the limits of a request."""

    registry: Registry
    metrics: Metrics
    encoder: Encoder | None = None
    """None where none is configured."""
    explaining: Explaining | None = None
    """None where explanations are switched off."""
    tokens: Tokens = field(default_factory=Tokens)
    cors_origins: list[str] = field(default_factory=list)
    max_body: int = 32 * 2**20
    max_held: int = 512 * 2**20
    body_timeout_s: float = 30.0


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
