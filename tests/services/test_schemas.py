"""What each service says of itself in /openapi.json holds for requests drawn from it, right ones and wrong ones."""

from pathlib import Path

import pytest

from tests.faults.schemas import explored
from tests.faults.systems import SERVICES, system
from tests.faults.threads import in_a_thread


@pytest.mark.parametrize("name", SERVICES)
def test_answers_are_what_the_service_says_of_itself(name: str, tmp_path: Path) -> None:
    with in_a_thread(lambda: system(name, tmp_path)) as host:
        seen = explored(f"http://127.0.0.1:{host.port}", examples=4)
    assert seen["GET /livez 200"] == 1
    assert sum(count for answer, count in seen.items() if answer.startswith("POST")) >= 8
    assert not [answer for answer in seen if answer.rpartition(" ")[2] >= "500"], seen
