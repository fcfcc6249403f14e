"""TokenBudgetSampler: every row once, within the budget, a pure function of seed, epoch and position."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader

from trainers.data.budget import TokenBudgetSampler, packed_tokens, token_lengths

LENGTHS = np.random.default_rng(0).integers(20, 400, size=311)


def test_every_row_comes_once_and_batches_keep_the_budget():
    sampler = TokenBudgetSampler(LENGTHS, 1000, seed=3, processes=2)
    for epoch in range(12):
        batches = sampler.batches(epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(311))
        assert all(batch and LENGTHS[batch].sum() <= 1000 for batch in batches)
        assert len(batches) == len(sampler) and len(batches) % 8 == 0


def test_batches_are_full_enough_to_be_worth_it():
    lengths = np.tile(LENGTHS, 10)
    sampler = TokenBudgetSampler(lengths, 4000)
    assert lengths.sum() / (len(sampler) * 4000) > 0.9


def test_rows_of_like_length_share_a_batch():
    sampler = TokenBudgetSampler(LENGTHS, 2000)
    within = np.mean([np.ptp(LENGTHS[batch]) for batch in sampler.batches(0)])
    assert within < 0.3 * np.ptp(LENGTHS)


def test_epochs_and_seeds_differ_and_repeat():
    sampler = TokenBudgetSampler(LENGTHS, 1000, seed=3)
    assert sampler.batches(0) == TokenBudgetSampler(LENGTHS, 1000, seed=3).batches(0)
    assert sampler.batches(0) != sampler.batches(1)
    assert sampler.batches(0) != TokenBudgetSampler(LENGTHS, 1000, seed=4).batches(0)
    assert {frozenset(b) for b in sampler.batches(0)} != {frozenset(b) for b in sampler.batches(1)}


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_global_order_does_not_depend_on_the_number_of_processes(processes):
    alone = TokenBudgetSampler(LENGTHS, 1000, seed=3).batches(5)
    sampler = TokenBudgetSampler(LENGTHS, 1000, seed=3, processes=processes)
    sampler.set_epoch(5)
    shards = [list(BatchSamplerShard(sampler, processes, p, even_batches=False)) for p in range(processes)]
    dealt = [batch for step in zip(*shards, strict=True) for batch in step]
    assert dealt == alone


def test_skipping_the_first_batches_goes_on_where_the_epoch_stopped():
    sampler = TokenBudgetSampler(LENGTHS, 1000)
    loader = DataLoader(list(range(311)), batch_sampler=sampler, collate_fn=list)
    sampler.set_epoch(2)
    assert list(skip_first_batches(loader, 7)) == sampler.batches(2)[7:]


def test_a_row_beyond_the_budget_is_a_batch_of_its_own_and_counted():
    sampler = TokenBudgetSampler([50, 500, 50, 50], 100)
    assert [1] in sampler.batches(0) and sampler.oversized == 1


def test_few_rows_give_one_batch_per_row_at_most_and_too_few_are_refused():
    assert len(TokenBudgetSampler([10] * 5, 1000, processes=2)) == 4
    assert sorted(sum(TokenBudgetSampler([10] * 5, 1000, processes=2).batches(0), [])) == [0, 1, 2, 3, 4]
    alone = TokenBudgetSampler([10] * 5, 10, processes=2)
    assert len(alone) == 4 == len(alone.batches(0)) and alone.batches(0) != alone.batches(1)
    with pytest.raises(ValueError, match="processes"):
        TokenBudgetSampler([10], 1000, processes=2)


def test_lengths_are_read_off_the_rows_and_count_the_prompt_once():
    rows = Dataset.from_list([
        {"prompt_ids": [1, 2, 3], "response_ids": [[4], [5, 6]]},
        {"prompt_ids": [1], "response_ids": [[4], [5, 6], [7, 8, 9]]},
    ])  # fmt: skip
    assert token_lengths(rows) == [(3, [1, 2]), (1, [1, 2, 3])]
    assert token_lengths(rows.select([1])) == [(1, [1, 2, 3])]
    assert [packed_tokens(row) for row in token_lengths(rows)] == [2 + 3, 6]
