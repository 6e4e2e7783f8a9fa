"""The lm service over HTTP: decode, one call, encode."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from knnlm.wire import jsonable
from services.lm.engine import Engine
from services.lm.schemas import ForwardAnswer, ForwardBody, ModelAnswer
from services.runtime.calls import current

__all__ = ["routes"]


def routes(engine: Engine) -> APIRouter:
    router = APIRouter(tags=["lm"])

    @router.post("/v1/forward", summary="Log-probabilities and keys of sequences", response_model=ForwardAnswer)
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
