"""How clients are spread over processes: each trains once for the round, and no process is ever without a batch."""

import numpy as np
import pytest

from fslora_hf.data.clients import ClientIndex
from fslora_hf.rounds.layout import Layout
from fslora_hf.rounds.plan import plan_round


def plan(clients: int):
    return plan_round(
        0,
        seed=0,
        index=ClientIndex.from_column(np.repeat(np.arange(clients), 3)),
        ranks=np.arange(clients) % 4 + 1,
        global_rank=4,
        clients_per_round=clients,
        local_steps=2,
        examples_per_step=4,
        learning_rate=lambda round: 0.1,
        client_weighting="uniform",
    )


CASES = [(5, 2, 2), (5, 1, 3), (1, 1, 4), (2, 4, 3), (7, 3, 2), (6, 2, 3), (9, 2, 4)]  # clients, block, processes


@pytest.mark.parametrize("clients, block_size, processes", CASES)
def test_a_process_without_a_block_borrows_the_last_one_that_trains_in_this_wave(clients, block_size, processes):
    layouts = [Layout(clients, 2, block_size, processes, process) for process in range(processes)]
    own = [[layout.block(plan(clients), wave) for layout in layouts] for wave in range(layouts[0].waves)]
    trained = [client.client_id for wave in own for block in wave for client in block]
    assert sorted(trained) == list(range(clients))
    for wave, blocks in enumerate(own):
        lent = [block for block in blocks if block][-1]
        for layout, block in zip(layouts, blocks, strict=True):
            seated = [client.client_id for client in layout.seated(plan(clients), wave)]
            assert seated == [client.client_id for client in block or lent]
        assert sum(len(block) for block in blocks) == layouts[0].clients_in_wave(wave)


@pytest.mark.parametrize("clients, block_size, processes", CASES)
def test_all_processes_have_as_many_batches_none_of_them_empty(clients, block_size, processes):
    layouts = [Layout(clients, 2, block_size, processes, process) for process in range(processes)]
    batches = [list(layout.batches(plan(clients), 2)) for layout in layouts]
    assert {len(each) for each in batches} == {layouts[0].steps_per_round * 2}
    for layout, each in zip(layouts, batches, strict=True):
        sizes = [2 * len(layout.seated(plan(clients), wave)) for wave in range(layout.waves) for _ in range(4)]
        assert [len(batch) for batch in each] == sizes and min(sizes) > 0
