"""What a service withstands is measured as docs/service.md says."""

import pytest

pytest.importorskip("fastapi")
from bench import service


@pytest.mark.slow
def test_wrong_requests_and_memory_are_measured():
    found = service.measure_malformed(300)
    assert sum(found["statuses"].values()) == found["requests"] == 300
    assert {"0", "405", "413", "415", "422"} <= found["statuses"].keys()
    assert found["met"]
    assert len(service.measure_memory(20)["megabytes"]) == 10
