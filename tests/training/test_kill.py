"""A short run of kill.py, which takes more kills from the command line."""

import pytest

from tests.kill import kill

pytestmark = pytest.mark.slow


def test_kills_at_random_moments_change_nothing(capsys):
    assert kill(2)
    said = capsys.readouterr().out
    for verb in ("pairs", "distill"):
        assert f"{verb}: 2 kills" in said, said
