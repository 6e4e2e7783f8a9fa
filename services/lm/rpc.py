"""The lm service over gRPC: decode, one call, encode."""

from typing import Any, TypeAlias

import grpc

from knnlm.v1 import lm_pb2, lm_pb2_grpc
from knnlm.wire import protos
from services.lm.engine import Engine
from services.runtime.context import current
from services.runtime.service import RpcService

__all__ = ["rpc_service"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # generic over messages in the stubs only


def rpc_service(engine: Engine) -> RpcService:
    return RpcService(
        "knnlm.v1.LanguageModel",
        lambda server: lm_pb2_grpc.add_LanguageModelServicer_to_server(_Servicer(engine), server),
    )


class _Servicer(lm_pb2_grpc.LanguageModelServicer):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # methods are named as in lm.proto
    async def Forward(self, request: lm_pb2.ForwardRequest, context: Context) -> lm_pb2.ForwardResponse:  # noqa: ARG002, N802
        result = await self._engine.forward(protos.forward_request_from_proto(request), current())
        return protos.to_proto(result, lm_pb2.ForwardResponse)

    async def GetModel(self, request: lm_pb2.GetModelRequest, context: Context) -> lm_pb2.GetModelResponse:  # noqa: ARG002, N802
        model = self._engine.model
        tokenizer = model.tokenizer.json if request.include_tokenizer else ""
        template = model.tokenizer.chat_template if request.include_chat_template else None
        return protos.to_proto(model.info, lm_pb2.GetModelResponse, tokenizer_json=tokenizer, chat_template=template)
