"""What the lm service's HTTP face takes."""

from pydantic import BaseModel

from knnlm.messages import ForwardRequest
from services.runtime.schemas import Encoding, body_fields

MAX_SEQUENCES = 65_536  # each is an array to be made on the event loop


class ForwardBody(body_fields(ForwardRequest, max_items=MAX_SEQUENCES)):  # type: ignore[misc]  # made of the record
    __doc__ = ForwardRequest.__doc__

    encoding: Encoding = "list"


class ChatTemplate(BaseModel):
    chat_template: str | None
