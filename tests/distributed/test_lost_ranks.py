"""A slow rank is waited for, a lost one ends the others in time; ranks agree on what to go on from and when to stop."""

from __future__ import annotations

import launch_work


def test_a_slow_rank_is_waited_for(gloo) -> None:
    for outcome, seconds in gloo.run(2, launch_work.wait_for_slow_rank, 2.0, 30.0):
        assert outcome == "sum 2" and seconds >= 2.0


def test_a_collective_waits_no_longer_than_its_timeout(gloo) -> None:
    (outcome, seconds), _ = gloo.run(2, launch_work.wait_for_slow_rank, 6.0, 1.5)
    assert outcome == "lost" and seconds < 1.5 + 5


def test_all_ranks_stop_where_one_is_told_to(gloo) -> None:
    assert gloo.run(2, launch_work.agree) == [[False, True, True, True]] * 2


def test_the_first_rank_judges_a_folder_for_all(gloo) -> None:
    assert gloo.run(2, launch_work.found, True) == ["checkpoint-4"] * 2
    assert gloo.run(2, launch_work.found, False) == ["FileNotFoundError: no checkpoint here"] * 2
