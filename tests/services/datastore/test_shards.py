"""The datastore service opens a version of shards as any other: warm, with the memory of all shards counted."""

from pathlib import Path

import numpy as np

from knnlm.index.searcher import Searcher
from knnlm.testing import toy_datastore
from services.datastore.loaded import Loaded, opener
from services.datastore.settings import DatastoreSettings
from tests.searching import search
from tests.sharding import sharded


def test_a_version_of_shards_is_loaded_and_answers(tmp_path: Path) -> None:
    whole = toy_datastore(tmp_path)
    loaded = Loaded(sharded(whole, 3, version="v2"), opener(DatastoreSettings(store=tmp_path)))
    assert loaded.version == "v2"
    request = search("toy", Searcher.open(whole).datastore.keys[:5].astype(np.float32), 7, ids=True, passages=1)
    found, expected = loaded.search(request), Searcher.open(whole).search(request)
    np.testing.assert_array_equal(found.neighbors.distances, expected.neighbors.distances)
    assert [row[0].entry for row in found.passages] == [row[0].entry for row in expected.passages]
    assert loaded.searcher.info(()).version == "v2"
    assert loaded.held_bytes == Searcher.open(whole).held_bytes
    loaded.close()
