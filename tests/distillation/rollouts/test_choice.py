import pytest

from kava_trainer.distillation.rollouts.choice import choose, count_chosen, derived_seed, turn_of


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1 / 3, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("examples", [1, 3, 8])
def test_the_share_is_exact_over_many_turns_and_near_it_in_each(fraction, examples):
    counts = [count_chosen(examples, fraction, turn) for turn in range(3000)]
    assert abs(sum(counts) - 3000 * examples * fraction) < 1
    assert all(abs(count - examples * fraction) < 1 for count in counts)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (1.0, 5)])
def test_none_and_all(fraction, count):
    assert {count_chosen(5, fraction, turn) for turn in range(50)} == {count}


def test_half_of_one_example_is_every_other_one():
    assert [count_chosen(1, 0.5, turn) for turn in range(6)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_has_its_share_and_all_together_have_it_in_each_step(ranks):
    counts = [[count_chosen(1, 0.5, turn_of(step, rank, ranks)) for rank in range(ranks)] for step in range(60)]
    assert {sum(step) for step in counts} <= {ranks // 2, (ranks + 1) // 2}
    assert {sum(own) for own in zip(*counts, strict=True)} == {30}


def test_a_choice_is_the_same_again_and_another_with_another_seed():
    assert choose(50, 20, 7) == choose(50, 20, 7) != choose(50, 20, 8)
    assert sorted(choose(6, 6, 1)) == list(range(6))
    assert choose(6, 0, 1) == []


def test_every_step_of_every_rank_has_a_seed_of_its_own():
    seeds = {derived_seed(seed, step, rank) for seed in range(3) for step in range(100) for rank in range(4)}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**63 for seed in seeds)
