"""What was fitted for a version, as its manifest stores it."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from knnlm.datastore.layout import Count, Record, first_problem
from knnlm.errors import InvalidRequest
from knnlm.options import SEARCH_OPTIONS, SearchOptions
from knnlm.tuning_records import RuleQuality, SearchQuality, Tuning


def _known_options(values: dict[str, bool | int | float]) -> dict[str, bool | int | float]:
    """Search options by name. Raises ValueError for what is none, or has a value that none can have."""
    unknown = values.keys() - SEARCH_OPTIONS.keys()
    if unknown:
        raise ValueError(f"unknown search options {', '.join(sorted(unknown))}")
    try:
        SearchOptions.of(values)
    except InvalidRequest as err:
        raise ValueError(err.message) from err
    return values


AskedOptions = Annotated[dict[str, bool | int | float], AfterValidator(_known_options)]


class QualityRecord(Record):
    """tuning_records.SearchQuality, as it is stored."""

    name: str
    search: AskedOptions
    perplexity: float
    queries_per_second: float | None = None
    chosen: bool = False

    def message(self) -> SearchQuality:
        return SearchQuality(**{**self.model_dump(), "search": SearchOptions.of(self.search)})


class RuleRecord(Record):
    """tuning_records.RuleQuality, as it is stored."""

    name: str
    perplexity: float
    difference: float = 0.0
    low: float = 0.0
    high: float = 0.0
    chosen: bool = False


class TuningRecord(Record):
    """tuning_records.Tuning, as it is stored. Of the fields after `documents` only what differs from the default."""

    temperature: float = Field(gt=0)
    lmbda: float = Field(ge=0, le=1)
    k: int = Field(ge=1, lt=1 << 31)
    lm_perplexity: float
    knn_perplexity: float
    tokens: Count
    documents: Count
    rule: str = "fixed"
    parameters: dict[str, float | tuple[float, ...]] = Field(default_factory=dict)
    search: AskedOptions = Field(default_factory=dict)
    index: str | None = None
    quality: tuple[QualityRecord, ...] = ()
    cache: dict[str, float | tuple[float, ...]] = Field(default_factory=dict)
    rules: tuple[RuleRecord, ...] = ()

    @classmethod
    def of(cls, tuning: Tuning) -> Self:
        """Raises InvalidRequest when a number is not finite or out of its range."""
        quality = [{**vars(row), "search": row.search.asked()} for row in tuning.quality]
        try:
            rules = [vars(row) for row in tuning.rules]
            return cls.model_validate(
                {**vars(tuning), "search": tuning.search.asked(), "quality": quality, "rules": rules}
            )
        except ValidationError as err:
            raise InvalidRequest(f"not a usable tuning: {first_problem(err)}", param="tuning") from err

    def message(self) -> Tuning:
        quality = tuple(row.message() for row in self.quality)
        rules = tuple(RuleQuality(**row.model_dump()) for row in self.rules)
        search = SearchOptions.of(self.search)
        return Tuning(**{**self.model_dump(), "search": search, "quality": quality, "rules": rules})

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:  # Any: JSON
        fields: dict[str, Any] = handler(self)
        later = ("rule", "parameters", "search", "index", "quality", "cache", "rules")
        return {name: v for name, v in fields.items() if name not in later or v not in (None, "fixed", {}, [], ())}
