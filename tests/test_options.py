"""A search option is written down once: its field in knnlm/options.py. All that carries it follows the record."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

from knnlm.cli.main import app
from knnlm.domains import used_domain
from knnlm.errors import InvalidRequest
from knnlm.messages import DomainInfo, SearchRequest
from knnlm.options import SEARCH_OPTIONS, DomainOptions, KnnOptions, SearchOptions
from knnlm.testing import ToyLanguageModel
from knnlm.tuning_records import Tuning
from knnlm.v1 import datastore_pb2
from knnlm.wire import jsonable
from knnlm.wire.protos import from_proto, to_proto
from services.aggregator.schemas.mixing import Knn
from services.datastore.schemas import SearchBody
from tests.searching import asking

ROOT = Path(__file__).resolve().parents[1]
QUERIES = np.zeros((2, 4), np.float32)
REQUEST = SearchRequest("toy", QUERIES, SearchOptions(k=4))
VALUES: dict[type, Any] = {int: 7, float: 2.5, bool: True, tuple: ("a", "b")}
OPTIONS = [(name, VALUES[option.kind]) for name, option in SEARCH_OPTIONS.items()]


MEMORY_TARGETS = "knnlm/evaluation/memory_targets.py"


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("ef_search", {"knnlm/index/hnsw.py", "services/datastore/settings.py"}),
        (
            "exclude_own_documents",
            {"knnlm/index/exclusion.py", "knnlm/memory/making.py", MEMORY_TARGETS},
        ),
    ],
)
def test_an_option_is_typed_in_few_places(name: str, places: set[str]) -> None:
    """The record, the proto, what searches by it and, where it is bounded, the setting of the bound."""
    written = [*ROOT.glob("knnlm/**/*.py"), *ROOT.glob("services/**/*.py"), *ROOT.glob("proto/**/*.proto")]
    made = "knnlm/v1/"  # from the proto
    assert len(written) > 100
    named = {str(file.relative_to(ROOT)) for file in written if name in file.read_text(encoding="utf-8")}
    found = {file for file in named if not file.startswith(made)}
    assert found == {"knnlm/options.py", "proto/knnlm/v1/datastore.proto", *places}
    assert len(found) <= 5


@pytest.mark.parametrize(("name", "value"), OPTIONS)
def test_every_option_is_carried_by_both_encodings(name: str, value: object) -> None:
    request = asking(REQUEST, **{name: value})
    assert getattr(request.options, name) == value
    message = datastore_pb2.SearchRequest.FromString(to_proto(request, datastore_pb2.SearchRequest).SerializeToString())
    assert from_proto(SearchRequest, message).options == request.options
    given = jsonable.to_json(request, "base64")
    domain = given.pop("domain")
    assert jsonable.from_json(SearchRequest, {**vars(SearchBody(**given)), "domain": domain}).options == request.options


@pytest.mark.parametrize(("name", "value"), OPTIONS)
def test_searches_with_different_options_are_not_answered_together(name: str, value: object) -> None:
    assert asking(REQUEST, **{name: value}).batch_key != REQUEST.batch_key
    assert asking(REQUEST, queries=QUERIES + 1).batch_key == REQUEST.batch_key


def test_searches_that_exclude_entries_are_not_answered_with_those_that_do_not() -> None:
    """They rescore all candidates: a row's answer would depend on who else asked."""
    own = asking(REQUEST, exclude_entries=np.full(len(QUERIES), -1))
    assert own.batch_key != REQUEST.batch_key
    assert own.batch_key == asking(REQUEST, exclude_entries=np.arange(len(QUERIES))).batch_key


def test_every_public_option_is_one_of_the_public_schema_and_of_the_commands() -> None:
    public = {name for name, option in SEARCH_OPTIONS.items() if option.public}
    assert public < SEARCH_OPTIONS.keys() <= SearchBody.model_fields.keys()
    assert {name for name in SEARCH_OPTIONS if name in Knn.model_fields} == public
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a group
    for command in ("score", "next", "eval"):
        assert public <= {parameter.name for parameter in commands[command].params}


@pytest.mark.parametrize("name", [name for name, option in SEARCH_OPTIONS.items() if option.minimum is not None])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_number_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} must be >= 1") as caught:
        SearchOptions(**{name: value})  # type: ignore[arg-type]  # a number for all
    assert caught.value.param == name


def test_a_request_without_k_is_none() -> None:
    with pytest.raises(InvalidRequest, match="k is required"):
        SearchRequest("toy", QUERIES, SearchOptions())


def info(tuning: Tuning | None, index: str = "ivf4") -> DomainInfo:
    model = ToyLanguageModel().info
    return DomainInfo(
        "toy", "v1", ["v1"], "ready", 9, 1, model.key_dim, "float16", model.key_function, index, "toy",
        model.weights_sha256, model.tokenizer_sha256, tuning,
    )  # fmt: skip


TUNING = Tuning(10.0, 0.25, 64, 20.0, 15.0, 1000, 10, search=SearchOptions(nprobe=3, overfetch=2.0), index="ivf4")
FAST = replace(TUNING, search=SearchOptions(rescore=False))


@pytest.mark.parametrize(
    ("asked", "domain", "expected"),
    [
        (SearchOptions(), info(TUNING), SearchOptions(k=64, nprobe=3, overfetch=2.0)),
        (SearchOptions(k=5, nprobe=9), info(TUNING), SearchOptions(k=5, nprobe=9, overfetch=2.0)),
        (SearchOptions(rescore=False), info(TUNING), SearchOptions(k=64, nprobe=3, rescore=False)),
        (SearchOptions(), info(FAST), SearchOptions(k=64, rescore=False)),
        (
            SearchOptions(overfetch=3.0),
            info(FAST),
            SearchOptions(k=64, overfetch=3.0),
        ),  # it means nothing without rescoring
        (
            SearchOptions(),
            info(TUNING, "flat"),
            SearchOptions(k=64),
        ),  # fitted to another index
        (SearchOptions(ef_search=9), info(None), SearchOptions(k=1024, ef_search=9)),
    ],
)
def test_asked_goes_before_tuned_before_the_default(
    asked: SearchOptions, domain: DomainInfo, expected: SearchOptions
) -> None:
    options = KnnOptions((DomainOptions("toy", None, 0.5, 1.0),), asked)
    assert used_domain(options.domains[0], options, domain, ToyLanguageModel().info).search == expected
