"""The lm service over HTTP: decode, one call, encode."""

from collections.abc import Mapping

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from knnlm.v1 import lm_pb2
from knnlm.wire import jsonable, protos
from services.lm.engine import Engine
from services.lm.schemas import ForwardAnswer, ForwardBody, ModelAnswer
from services.runtime.context import current
from services.runtime.protobuf_routes import PROTOBUF_TOO, ProtobufRoute, parse

__all__ = ["packed", "routes"]

FORWARD = "/v1/forward"


def routes(engine: Engine) -> APIRouter:
    router = APIRouter(tags=["lm"])

    @router.post(
        FORWARD,
        summary="Log-probabilities and keys of sequences",
        response_model=ForwardAnswer,
        openapi_extra=PROTOBUF_TOO,
    )
    async def forward(body: ForwardBody) -> JSONResponse:
        """Stateless; several requests that want the same are run together."""
        request = jsonable.forward_request_from_json(vars(body))
        result = await engine.forward(request, current())
        return JSONResponse(jsonable.forward_result_to_json(result, body.encoding))

    @router.get("/v1/model", summary="What is loaded", response_model=ModelAnswer)
    async def model() -> JSONResponse:
        return JSONResponse(jsonable.model_to_json(engine.model.info))

    @router.get("/v1/tokenizer", summary="The tokenizer, as the JSON of the tokenizers library")
    async def tokenizer() -> Response:
        """Byte for byte what tokenizer_sha256 in /v1/model is of."""
        return Response(engine.model.tokenizer.json, media_type="application/json")

    return router


def packed(engine: Engine) -> list[ProtobufRoute]:
    """Forward with knnlm.v1.ForwardRequest as its body."""

    async def forward(parts: Mapping[str, str], body: bytes) -> bytes:  # noqa: ARG001  the path has none
        message = parse(body, lm_pb2.ForwardRequest.FromString)
        result = await engine.forward(protos.forward_request_from_proto(message), current())
        return protos.forward_result_to_proto(result).SerializeToString()

    return [ProtobufRoute(FORWARD, forward)]
