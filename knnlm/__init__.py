"""knnlm: nearest-neighbour language models (Khandelwal et al. 2020, arXiv 1911.00172), as a library.

Importing this package loads nothing heavy: a name below is imported from its module when it is first used; torch lives
in `knnlm.lm`, faiss in `knnlm.index`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what _MODULES says, for type checkers and editors
    from knnlm import errors
    from knnlm.clients.aggregator import AsyncClient, Client
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.reader import Datastore
    from knnlm.datastore.text import read_documents
    from knnlm.errors import KnnlmError
    from knnlm.evaluation.memory_targets import build_targets
    from knnlm.evaluation.memory_training import train_memory
    from knnlm.evaluation.search_settings import tune
    from knnlm.generation import GenerationOptions
    from knnlm.index.searcher import Searcher
    from knnlm.lm.model import LanguageModel
    from knnlm.messages import Document
    from knnlm.options import DomainOptions, KnnOptions, MemoryOptions, SearchOptions
    from knnlm.pipeline import Pipeline, build
    from knnlm.sampling import SamplingOptions
    from knnlm.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "AsyncClient", "Catalog", "Client", "Datastore", "Document", "DomainOptions", "GenerationOptions", "KnnOptions",
    "KnnlmError", "LanguageModel", "MemoryOptions", "Pipeline", "SamplingOptions", "SearchOptions", "Searcher",
    "Tokenizer", "build", "build_targets", "errors", "read_documents", "train_memory", "tune",
]  # fmt: skip

_MODULES = {
    "AsyncClient": "clients.aggregator",
    "Catalog": "datastore.catalog",
    "Client": "clients.aggregator",
    "Datastore": "datastore.reader",
    "Document": "messages",
    "DomainOptions": "options",
    "KnnOptions": "options",
    "KnnlmError": "errors",
    "GenerationOptions": "generation",
    "LanguageModel": "lm.model",
    "MemoryOptions": "options",
    "Pipeline": "pipeline",
    "SamplingOptions": "sampling",
    "SearchOptions": "options",
    "Searcher": "index.searcher",
    "Tokenizer": "tokenizer",
    "build": "pipeline",
    "build_targets": "evaluation.memory_targets",
    "read_documents": "datastore.text",
    "train_memory": "evaluation.memory_training",
    "tune": "evaluation.search_settings",
}


if not TYPE_CHECKING:  # for type checkers, only the names above exist

    def __getattr__(name: str) -> object:
        if name == "errors":
            return import_module("knnlm.errors")
        if name not in _MODULES:
            raise AttributeError(f"module 'knnlm' has no attribute {name!r}")
        return getattr(import_module(f"knnlm.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
