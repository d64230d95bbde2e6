from engine.ranks.parallel import Parallel


def test_a_process_alone_is_a_world_of_one(parallel: Parallel):
    assert (parallel.rank, parallel.world_size, parallel.dp) == (0, 1, 1)
    assert parallel.is_writer
    assert parallel.is_first_stage
    assert parallel.is_last_stage
    assert parallel.last_stage_rank == 0
