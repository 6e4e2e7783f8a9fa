"""What the datastore service's HTTP face takes, and the answer that is no record."""

from pydantic import BaseModel, StrictInt

from knnlm.messages import DomainInfo, PassagesRequest, SearchRequest
from services.runtime.schemas import Encoding, Strict, Text, answer, body_fields


class SearchBody(body_fields(SearchRequest, without={"domain"})):  # type: ignore[misc]  # made of the record
    __doc__ = SearchRequest.__doc__

    k: StrictInt
    encoding: Encoding = "list"


class PassagesBody(body_fields(PassagesRequest, without={"domain"})):  # type: ignore[misc]  # made of the record
    __doc__ = PassagesRequest.__doc__

    encoding: Encoding = "list"


class DomainAnswer(answer(DomainInfo)):  # type: ignore[misc]  # made of the record
    __doc__ = DomainInfo.__doc__


class DomainsAnswer(BaseModel):
    domains: list[DomainAnswer]


class ActivateBody(Strict):
    version: Text
