"""What the datastore service's HTTP face takes and gives."""

from pydantic import BaseModel, Field, StrictBool, StrictInt

from services.runtime.schemas import Array, Encoding, Strict, Text, TuningAnswer, search_fields


class SearchBody(search_fields("SearchFields", public=False)):  # type: ignore[misc]  # a class made of the table of search options
    """knnlm.options.SearchOptions, and what is searched for."""

    queries: Array = Field(description="(n, key_dim) float32 or float16, finite")
    k: StrictInt = Field(description="Neighbors per query.")
    version: Text | None = Field(None, description="Answer from this version or not at all.")
    ids: StrictBool = Field(False, description="Also return entry numbers.")
    passages: StrictInt = Field(0, description="Text around this many nearest neighbors of each query.")
    passage_tokens: StrictInt = Field(24, description="Tokens on each side of it.")
    exclude_entries: Array | None = Field(
        None, description="(n,) int64, an entry for each query that is no neighbor of it, -1 = none"
    )
    encoding: Encoding = "list"


class PassageAnswer(BaseModel):
    """Where an entry came from."""

    document: str
    entry: int
    position: int = Field(description="Of the value, in tokens from the document's beginning.")
    before: Array = Field(description="The end of its context, int32.")
    after: Array = Field(description="Its value and what followed, int32.")


class SearchAnswer(BaseModel):
    domain: str
    version: str
    distances: Array = Field(description="(n, k') float32, squared L2, nearest first; k' = min(k, entries)")
    values: Array = Field(description="(n, k') int32, the token each entry stores; -1 = no neighbor")
    ids: Array | None = Field(description="(n, k') int64, when asked for")
    passages: list[list[PassageAnswer]] = Field(description="One list per query, when asked for.")
    timings: dict[str, float] = Field(description="Seconds per stage.")


class MemoryAnswer(BaseModel):
    """Where a loaded version lies: resident (held by the process), mapped (files), device, or none."""

    index: str
    index_bytes: int = Field(description="Once all of it is used.")
    keys: str
    keys_bytes: int = Field(description="Once all of them are used.")


class DomainAnswer(BaseModel):
    domain: str
    version: str
    versions: list[str] = Field(description="All on disk, oldest first.")
    state: str = Field(description="ready, loading VERSION, or stale and why CURRENT cannot be served.")
    entries: int
    documents: int
    key_dim: int
    key_dtype: str
    key_function: str
    index: str = Field(description="The one that answers.")
    model_id: str
    weights_sha256: str
    tokenizer_sha256: str
    tuning: TuningAnswer | None
    indexes: list[str] = Field(description="All that the version has.")
    memory: MemoryAnswer | None
    context_length: int | None = Field(None, description="Tokens of a window that its keys were made with.")
    min_context: int | None = Field(None, description="Tokens that each of its keys has seen at least.")
    config_sha256: str | None = Field(None, description="Of the configuration of the model that made its keys.")
    model_dtype: str | None = Field(None, description="Of the model that made its keys; null: not recorded.")
    bos_token_id: int | None = Field(None, description="Of that model; says nothing where config_sha256 is null.")


class DomainsAnswer(BaseModel):
    domains: list[DomainAnswer]


class ActivateBody(Strict):
    version: Text
