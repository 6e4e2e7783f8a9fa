"""What the endpoints of models and domains take and give."""

from typing import Literal

from pydantic import BaseModel, Field, StrictBool

from knnlm.messages import DomainInfo
from services.runtime.schemas import Strict, Text, answer


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "knnlm"
    max_model_len: int
    stale: str | None = Field(description="Why its memory does not say what its domain says now; null where it does.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Domain(answer(DomainInfo)):  # type: ignore[misc]  # made of the record
    __doc__ = DomainInfo.__doc__


class DomainReplica(BaseModel):
    """One replica of the datastore service, as it answers now."""

    address: str
    version: str | None = Field(description="The one it answers from; null when it does not answer.")
    state: str = Field(description="ready, loading VERSION, stale: REASON, down, or an error code.")
    problem: str | None = Field(description="What it says when it is not well.")


class DomainStatus(Domain):
    replicas: list[DomainReplica] = Field(description="Those that serve the domain, and those that do not answer.")


class DomainList(BaseModel):
    domains: list[Domain]


class ActivateRequest(Strict):
    version: Text
    wait: StrictBool = Field(False, description="Answer when every replica that serves the domain does so from it.")
