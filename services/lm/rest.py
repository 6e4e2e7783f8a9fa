"""The lm service over HTTP: decode, one call, encode."""

import asyncio
from collections.abc import Mapping

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from knnlm.messages import ForwardRequest, ForwardResult, ModelInfo
from knnlm.v1 import lm_pb2
from knnlm.wire import protos
from knnlm.wire.jsonable import from_json, to_json
from services.lm.engine import Engine
from services.lm.schemas import ChatTemplate, ForwardBody
from services.runtime.bodies import packing
from services.runtime.context import current
from services.runtime.protobuf_routes import PROTOBUF_TOO, ProtobufRoute, parse
from services.runtime.schemas import answer

FORWARD = "/v1/forward"


def routes(engine: Engine) -> APIRouter:
    router = APIRouter(tags=["lm"], route_class=packing())

    @router.post(
        FORWARD,
        summary="Log-probabilities and keys of sequences",
        response_model=answer(ForwardResult),
        openapi_extra=PROTOBUF_TOO,
    )
    async def forward(body: ForwardBody) -> JSONResponse:
        """Stateless; several requests that want the same are run together."""
        request = await asyncio.to_thread(from_json, ForwardRequest, vars(body))
        result = await engine.forward(request, current())
        return await asyncio.to_thread(lambda: JSONResponse(to_json(result, body.encoding)))

    @router.get("/v1/model", summary="What is loaded", response_model=answer(ModelInfo))
    async def model() -> JSONResponse:
        return JSONResponse(to_json(engine.model.info))

    @router.get("/v1/tokenizer", summary="The tokenizer, as the JSON of the tokenizers library")
    async def tokenizer() -> Response:
        """Byte for byte what tokenizer_sha256 in /v1/model is of."""
        return Response(engine.model.tokenizer.json, media_type="application/json")

    @router.get("/v1/chat_template", summary="The Jinja template that makes a prompt of messages")
    async def chat_template() -> ChatTemplate:
        """null where the model has none."""
        return ChatTemplate(chat_template=engine.model.tokenizer.chat_template)

    return router


def protobuf_routes(engine: Engine) -> list[ProtobufRoute]:
    """Forward with knnlm.v1.ForwardRequest as its body."""

    async def forward(parts: Mapping[str, str], body: bytes) -> bytes:  # noqa: ARG001  the path has none
        message = parse(body, lm_pb2.ForwardRequest.FromString)
        result = await engine.forward(protos.forward_request_from_proto(message), current())
        return protos.to_proto(result, lm_pb2.ForwardResponse).SerializeToString()

    return [ProtobufRoute(FORWARD, forward)]
