"""What made the keys: a datastore is not used, continued or judged as if another model had made it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.reader import Datastore
from knnlm.domains import used_domain
from knnlm.errors import DatastoreMismatch
from knnlm.evaluation.perplexity import leaks
from knnlm.evaluation.splits import encode
from knnlm.index.searcher import Searcher
from knnlm.lm.loading import config_sha256
from knnlm.lm.model import LanguageModel
from knnlm.messages import Document
from knnlm.options import DomainOptions, KnnOptions
from knnlm.pipeline import Pipeline
from tests.lm.conftest import Tiny
from tests.reference import POCKET, ROOT

TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def changed(folder: Path, target: Path, **fields: Any) -> LanguageModel:
    """The same weights and tokenizer under another config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return LanguageModel.load(str(target), device="cpu")


def test_a_datastore_is_refused_to_the_same_weights_with_another_configuration(llama: Tiny, tmp_path: Path) -> None:
    other = changed(llama.folder, tmp_path / "m", rope_parameters={"rope_theta": 80000.0, "rope_type": "default"})
    assert other.info.weights_sha256 == llama.lm.info.weights_sha256
    assert other.info.fingerprint != llama.lm.info.fingerprint
    path = build([Document("a", TEXT[:200])], llama.lm, Catalog(tmp_path / "store"), "toy")
    Datastore.open(path, expect=llama.lm.info)
    values = f"config_sha256 {llama.lm.info.config_sha256}.* has config_sha256 {other.info.config_sha256}"
    with pytest.raises(DatastoreMismatch, match=values):
        Datastore.open(path, expect=other.info)
    searcher = Searcher.open(path)
    asked = DomainOptions("toy", lmbda=0.1, temperature=1.0)
    with pytest.raises(DatastoreMismatch, match=other.info.config_sha256):
        used_domain(asked, KnnOptions((asked,)), searcher.info(()), other.info)


def test_a_datastore_is_refused_to_another_bos(llama: Tiny, tmp_path: Path) -> None:
    path = build([Document("a", TEXT[:200])], llama.lm, Catalog(tmp_path / "store"), "toy")
    for other in (7, None):
        info = replace(llama.lm.info, bos_token_id=other)
        assert info.fingerprint != llama.lm.info.fingerprint
        with pytest.raises(DatastoreMismatch, match=f"bos_token_id 256, .* has bos_token_id {other}"):
            Datastore.open(path, expect=info)


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": 0.1},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": 32},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
    ],
)
def test_what_changes_answers_changes_the_hash(llama: Tiny, tmp_path: Path, fields: dict[str, Any]) -> None:
    assert changed(llama.folder, tmp_path / "m", **fields).info.config_sha256 != llama.lm.info.config_sha256


def test_what_does_not_change_answers_does_not_change_the_hash(llama: Tiny, tmp_path: Path) -> None:
    noise = {
        "architectures": ["Other"], "transformers_version": "4.0.0", "dtype": "bfloat16", "_name_or_path": "x/y",
        "use_cache": False, "attention_dropout": 0.5, "pad_token_id": 3, "initializer_range": 1.0,
    }  # fmt: skip
    other = changed(llama.folder, tmp_path / "m", **noise)
    assert other.info.config_sha256 == llama.lm.info.config_sha256
    assert other.info.fingerprint == llama.lm.info.fingerprint


def test_what_a_configuration_leaves_to_its_defaults_may_be_said(tiny: Tiny, tmp_path: Path) -> None:
    """Also in another release, whose classes have more options than were known when a datastore was made."""
    config = AutoConfig.from_pretrained(tiny.folder)
    assert config_sha256(config) == tiny.lm.info.config_sha256
    whole = config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert config_sha256(AutoConfig.from_pretrained(tmp_path)) == tiny.lm.info.config_sha256


@pytest.fixture(scope="module")
def pocket() -> dict[str, LanguageModel]:
    return {dtype: LanguageModel.load(str(POCKET), device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ("bfloat16", "float32"),
        pytest.param("float32", "bfloat16", marks=pytest.mark.slow),
        pytest.param("float32", "float32", marks=pytest.mark.slow),
    ],
)
def test_stored_text_is_seen_whatever_dtype_made_the_keys(
    pocket: dict[str, LanguageModel], tmp_path: Path, made: str, asked: str
) -> None:
    documents = [Document(str(i), TEXT[start : start + 2000]) for i, start in enumerate((0, 2000))]
    searcher = Searcher.open(build(documents, pocket[made], Catalog(tmp_path), "toy"))
    assert searcher.info(()).model_dtype == made
    lm = pocket[asked]
    fresh = [Document("fresh", TEXT[-2000:])]
    with Pipeline(lm, {"toy": searcher}) as pipeline:
        stored_share, fresh_share = (
            leaks(pipeline, encode(d, lm.tokenizer), ["toy"], (512, 256))["toy"] for d in (documents, fresh)
        )
    assert stored_share > 0.9
    assert fresh_share < 0.02
