"""Documents added to and removed from a domain, as JSON: what the aggregator and the datastore service take."""

from pydantic import BaseModel, Field, StrictBool

from services.runtime.fields import Strict, Text

__all__ = ["AddDocumentsBody", "ChangeAnswer", "DocumentBody", "RemoveDocumentsBody"]


class DocumentBody(Strict):
    id: Text = Field(description="1 to 4096 characters, the name it is removed by.")
    text: Text = Field(description="Not empty.")


class AddDocumentsBody(Strict):
    documents: list[DocumentBody]
    replace: StrictBool = Field(
        False, description="Documents of these ids that exist are removed in the same step; otherwise they are refused."
    )


class RemoveDocumentsBody(Strict):
    ids: list[Text] = Field(description="Of documents; one that does not exist: nothing is removed.")


class ChangeAnswer(BaseModel):
    domain: str
    version: str = Field(description="The one that answers now.")
    parent: str = Field(description="The one that answered before.")
    added_documents: int
    added_entries: int
    removed_documents: int
    removed_entries: int
    advice: str | None = Field(description="When compacting is worth while.")
