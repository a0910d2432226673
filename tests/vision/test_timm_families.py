"""The smallest model of every timm family: what docs/models.md says of it holds, before and after training."""

import pytest
import timm

from bench import families
from bench.lib.results import read

ROWS = read(families.FILE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # timm's own, of old-fashioned models
@pytest.mark.parametrize("row", ROWS, ids=[row["family"] for row in ROWS])
def test_a_family(row):
    """Accepted and right, or refused for the reason given; `python -m bench.families` writes the rows anew."""
    assert families.row_of(row["family"], row["model"], row["image_size"]) == row


def test_no_family_is_left_out():
    wanted = {family for family in timm.list_modules() if timm.list_models(module=family)}
    assert wanted <= {row["family"] for row in ROWS}, "run python -m bench.families with the new families"
