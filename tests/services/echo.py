"""The smallest service over the runtime: echoes, waits, fails on request. Its rpcs are borrowed from the lm service."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import httpx
from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr, StrictInt
from pydantic_settings import SettingsConfigDict

from knnlm.errors import KnnlmError
from knnlm.v1 import lm_pb2, lm_pb2_grpc
from services.runtime.context import current
from services.runtime.http import build_app
from services.runtime.observability import Metrics
from services.runtime.security import admin_only
from services.runtime.service import Admission, RpcService, Service
from services.runtime.settings import GrpcSettings

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class EchoSettings(GrpcSettings):
    """A service that says what it hears."""

    model_config = SettingsConfigDict(env_prefix="KNNLM_ECHO_")

    size: int = Field(3, ge=1, description="an ordinary number")
    secret: SecretStr | None = Field(None, description="a secret")


class EchoRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: StrictInt = Field(ge=1)
    word: str = ""


class EchoCore(lm_pb2_grpc.LanguageModelServicer):
    """`gate` holds slow requests until it is set; `error` is raised by /fail and by the rpc when it is set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        self.error: Exception | None = None
        self.problem: str | None = None
        self.happened: list[str] = []

    def load(self) -> None:
        self.happened.append("load")

    async def start(self) -> None:
        self.happened.append("start")

    def problems(self) -> Sequence[str]:
        return [] if self.problem is None else [self.problem]

    async def close(self) -> None:
        self.happened.append("close")

    async def wait(self) -> str:
        self.entered.set()
        try:
            await self.gate.wait()
        finally:
            self.left.set()
        return "done"

    # methods are named as in lm.proto
    async def GetModel(self, request: lm_pb2.GetModelRequest, context: Context) -> lm_pb2.GetModelResponse:  # noqa: ARG002, N802
        if self.error is not None:
            raise self.error
        return lm_pb2.GetModelResponse(model_id=current().id)

    async def count(self, request: bytes, context: Context) -> AsyncIterator[bytes]:  # noqa: ARG002
        """Two replies, one before and one after the gate; then the error, if one is set."""
        current().timings["work"] = 1.0
        yield request
        yield (await self.wait()).encode()
        if self.error is not None:
            raise self.error

    async def Forward(self, request: lm_pb2.ForwardRequest, context: Context) -> lm_pb2.ForwardResponse:  # noqa: ARG002, N802
        await self.wait()
        return lm_pb2.ForwardResponse()


def counter(core: EchoCore) -> "grpc.GenericRpcHandler":
    """An rpc that answers with a stream, which none of ours does."""
    method: Any = grpc.unary_stream_rpc_method_handler(core.count)  # the stubs know servers with threads alone
    return grpc.method_handlers_generic_handler("knnlm.test.Counter", {"Count": method})


def echo_service(core: EchoCore, settings: EchoSettings | None = None) -> Service:
    router = APIRouter()

    @router.post("/echo/{name}")
    async def echo(name: str, request: EchoRequest) -> dict[str, object]:
        with current().stage("work"):
            return {"name": name, "count": request.count, "left": current().remaining()}

    @router.get("/fail")
    async def fail() -> None:
        raise core.error or KnnlmError("set an error first")

    @router.get("/slow")
    async def slow() -> str:
        return await core.wait()

    @router.get("/stream")
    async def stream() -> StreamingResponse:
        async def words() -> AsyncIterator[str]:
            yield "first "
            yield await core.wait()

        return StreamingResponse(words(), media_type="text/plain")

    @router.post("/admin", dependencies=[Depends(admin_only)])
    async def admin() -> str:
        return "done"

    return Service(
        name="echo",
        title="echo",
        settings=settings or EchoSettings(port=0, grpc_port=0),
        core=core,
        metrics=Metrics("echo"),
        routers=[router],
        rpc=[
            RpcService(
                "knnlm.v1.LanguageModel",
                lambda server: lm_pb2_grpc.add_LanguageModelServicer_to_server(core, server),
            ),
            RpcService("knnlm.test.Counter", lambda server: server.add_generic_rpc_handlers((counter(core),))),
        ],
    )


@asynccontextmanager
async def echo_http(core: EchoCore, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """A client of its HTTP face alone, ready from the start, without a socket."""
    echo = echo_service(core, EchoSettings(**settings))
    door = Admission(echo)
    door.readiness.enter("ready")
    transport = httpx.ASGITransport(build_app(echo, door), raise_app_exceptions=False)
    async with httpx.AsyncClient(base_url="http://test", transport=transport) as client:
        yield client, echo
