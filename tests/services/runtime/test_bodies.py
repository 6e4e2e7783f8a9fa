import json
import random

import pytest

from services.runtime.bodies import has_more_values


def values(document: object) -> int:
    """Keys, and values but for the first of each list and object."""
    keys = len(document) if isinstance(document, dict) else 0
    parts = list(document.values()) if isinstance(document, dict) else document
    return keys + max(len(parts) - 1, 0) + sum(map(values, parts)) if isinstance(parts, list) else 0


def drawn(rng: random.Random, depth: int) -> object:
    """A document whose texts are full of what could be taken for something else."""
    text = "".join(rng.choices('",\\[]{}:n/u é\n', k=rng.randrange(8)))
    if depth == 0 or rng.random() < 0.4:
        return rng.choice([text, 1, -2.5, None, True, ""])
    parts = [drawn(rng, depth - 1) for _ in range(rng.randrange(5))]
    return parts if rng.random() < 0.5 else {f"{text}{i}": part for i, part in enumerate(parts)}


@pytest.mark.parametrize("ascii_only", [True, False])
def test_values_are_counted_without_parsing(ascii_only: bool) -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        document = drawn(rng, 4)
        body = json.dumps(document, ensure_ascii=ascii_only).encode()
        count = values(document)
        assert not has_more_values(body, count), body
        assert count == 0 or has_more_values(body, count - 1), body
        seen.add(count)
    assert len(seen) > 20


@pytest.mark.parametrize("body", [b'["a","b","c"]', b'{"a":1,"b":2,"c":3}', b"[[1],[2],[3]]", b"[1,2,3", b'[1,2,3,"'])
def test_more_are_found_in_any_shape(body: bytes) -> None:
    assert has_more_values(body, 1)
    assert not has_more_values(body, 5)


def test_commas_of_a_text_are_no_values() -> None:
    assert not has_more_values(json.dumps({"text": 'a,"b",\\,' * 10_000, "k": 3}).encode(), 3)
