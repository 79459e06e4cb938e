"""Ranks stay between jobs, which see nothing of each other; what goes wrong is told, and ends the ranks."""

import pytest

from tests.distributed import pool_jobs
from tests.support.rank_pool import RankPool, on_ranks


def test_jobs_run_on_the_same_processes_which_talk_to_each_other():
    with RankPool(2) as pool:
        first, second = pool.run(pool_jobs.where), pool.run(pool_jobs.where)
    assert first == second
    assert [rank for _, rank, _ in first] == [0, 1] and {total for *_, total in first} == {2.0}


def test_every_rank_gets_what_the_first_one_found_or_its_error():
    assert on_ranks(2, pool_jobs.from_first_rank) == [({"rank": 0}, "key=0: is wrong. Change it.")] * 2


def test_a_job_finds_nothing_of_the_one_before():
    fresh = on_ranks(2, pool_jobs.found)
    on_ranks(2, pool_jobs.leave_everything_behind)
    assert on_ranks(2, pool_jobs.found) == fresh
    assert fresh[0] == fresh[1] and fresh[0]["groups"] == 1 and not fresh[0]["layout"]


@pytest.mark.parametrize(
    "job, timeout, told",
    [
        (pool_jobs.raise_on_rank_1, 60, "pool_jobs.raise_on_rank_1 on rank 1 of 2 raised\nTraceback"),
        (pool_jobs.end_rank_1, 60, "pool_jobs.end_rank_1 on rank 1 of 2 ended with 9"),
        (pool_jobs.hang, 0.5, "pool_jobs.hang on rank 0 of 2 gave no answer and was killed"),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_job_gets_new_ranks(job, timeout, told):
    before = on_ranks(2, pool_jobs.where)
    with pytest.raises(AssertionError) as caught:
        on_ranks(2, job, timeout=timeout)
    assert told in str(caught.value)
    after = on_ranks(2, pool_jobs.where)
    assert [total for *_, total in after] == [2.0, 2.0]
    assert not {process for process, *_ in before} & {process for process, *_ in after}
