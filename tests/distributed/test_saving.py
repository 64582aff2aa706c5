"""Ranks save after the same step, although their clocks differ."""

from __future__ import annotations

import saving_work


def test_the_first_rank_says_when_minutes_are_over(gloo):
    clocks = [[30.0, 61.0, 90.0, 125.0, 130.0], [59.0, 59.5, 125.0, 126.0, 300.0]]
    assert gloo.run(2, saving_work.saved_steps, clocks) == [[2, 4], [2, 4]]
