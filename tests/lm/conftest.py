"""Every tiny model once per run: saved, loaded through LanguageModel, and beside it the plain model of transformers."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from knnlm.lm.architectures import Architecture, find
from knnlm.lm.loading import no_progress_bars
from knnlm.lm.model import LanguageModel
from tests.lm import tiny_models


@dataclass(frozen=True)
class Tiny:
    """plain: the same weights in transformers alone, with the attention that is written out (eager).

    But for Falcon's ALiBi: transformers 5.23 adds it twice there, and once, as it was trained, under sdpa.
    """

    name: str
    folder: Path
    row: Architecture
    lm: LanguageModel
    plain: Any


@cache
def build(name: str, parent: Path) -> Tiny:
    """Once per process, whichever files ask for it and however they are ordered."""
    folder = parent / name
    config = tiny_models.CONFIGS[name]()
    tiny_models.save(tiny_models.random_model(config), folder)
    attention = "sdpa" if getattr(config, "alibi", False) else "eager"
    with no_progress_bars():
        plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    plain.eval()
    return Tiny(name, folder, find(config), LanguageModel.load(str(folder), device="cpu"), plain)


@pytest.fixture(scope="session", params=tiny_models.CONFIGS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Each tiny model in turn."""
    return build(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """One of them, for what does not depend on the architecture."""
    return build("llama", tmp_path_factory.getbasetemp())
