import threading

import pytest
import torch

from kava_trainer.distillation.bridge.agreement import Agreement, held_back_tokens, hold_back, measure_agreement
from kava_trainer.evaluation.diagnostics import centred_cosine, mean_cosine, shuffled_cosine
from kava_trainer.utils.errors import BadRequest


def sides(count=60, full=7, noise=0.5, seed=0):
    """The coordinates of teacher and student, which agree but for noise and a common offset."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(count, full, generator=generator) * torch.linspace(3, 0.5, full) + 0.3
    return teacher + noise * torch.randn(count, full, generator=generator), teacher


def alone(sums):
    return sums


def test_each_rank_has_the_cosines_of_its_first_coordinates():
    student, teacher = sides()
    found = measure_agreement(student, teacher, alone)
    assert (found.full, found.tokens) == (7, 60)
    for rank in range(1, 8):
        cut = student[:, :rank], teacher[:, :rank]
        assert found.cos_sim[rank - 1] == pytest.approx(mean_cosine(*cut), abs=1e-6)
        assert found.centred[rank - 1] == pytest.approx(centred_cosine(*cut), abs=1e-6)
        assert found.shuffled[rank - 1] == pytest.approx(shuffled_cosine(*cut), abs=1e-5)


def test_the_shuffled_cosine_is_the_mean_over_all_other_tokens():
    student, teacher = sides(count=5, full=3)
    found = measure_agreement(student, teacher, alone)
    others = [torch.cosine_similarity(student[i], teacher[j], dim=0) for i in range(5) for j in range(5) if i != j]
    assert found.shuffled[-1] == pytest.approx(torch.stack(others).mean().item(), abs=1e-6)


@pytest.mark.parametrize("cut", [23, 60])
def test_the_tokens_of_two_processes_count_as_those_of_one(cut):
    """With 60 the second one has none."""
    whole, barrier, given, found = sides(), threading.Barrier(2), {}, {}

    def measure(process):
        def add_up(sums):
            given[process] = sums
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return total

        part = slice(0, cut) if process == 0 else slice(cut, None)
        found[process] = measure_agreement(whole[0][part], whole[1][part], add_up)

    threads = [threading.Thread(target=measure, args=(process,)) for process in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    expected = measure_agreement(*whole, alone)
    assert found[0] == found[1]
    assert found[0].tokens == 60
    for name in ("cos_sim", "centred", "shuffled"):
        assert getattr(found[0], name) == pytest.approx(getattr(expected, name), abs=1e-9)


@pytest.mark.parametrize(("centred", "rank"), [
    ([0.95, 0.99, 0.91, 0.89], 3),
    ([0.80, 0.85, 0.90, 0.70], 3),
    ([0.95, 0.80, 0.95, 0.95], 4),
    ([0.95], 1),
    ([0.89, 0.899], None),
])  # fmt: skip
def test_the_highest_rank_that_agrees(centred, rank):
    assert Agreement(centred, centred, centred, 10).highest() == rank


@pytest.mark.parametrize(("full", "chosen", "ranks"), [
    (7, None, [1, 2, 4, 7]), (8, 3, [1, 2, 3, 4, 8]), (1, 1, [1]), (20, 20, [1, 2, 4, 8, 16, 20]), (4, 9, [1, 2, 4]),
])  # fmt: skip
def test_the_table_has_the_powers_of_two_the_full_rank_and_the_chosen_one(full, chosen, ranks):
    figures = [rank / 100 for rank in range(1, full + 1)]
    head, *rows = Agreement(figures, [-f for f in figures], [f / 2 for f in figures], 10).lines(chosen)
    assert head.split() == ["rank", "CosSim", "centred", "shuffled"]
    expected = [[f"{rank}", f"{rank / 100:.4f}", f"{-rank / 100:.4f}", f"{rank / 200:.4f}"] for rank in ranks]
    assert [row.split()[:4] for row in rows] == expected
    assert [int(row.split()[0]) for row in rows if row.endswith("<- taken")] == [r for r in ranks if r == chosen]


def examples(*lengths):
    return [{"input_ids": [1] * length} for length in lengths]


@pytest.mark.parametrize(("lengths", "held"), [
    ([10] * 16, 2), ([10] * 17, 2), ([100, 1, 1], 2), ([10, 10], 1), ([1, 50], 1), ([100] * 400, 20),
])  # fmt: skip
def test_one_token_in_eight_is_held_back_and_one_example_at_least(lengths, held):
    given = examples(*lengths)
    fitted_to, held_back = hold_back(given)
    assert (fitted_to, held_back) == (given[:-held], given[-held:])


def test_no_more_is_held_back_than_a_measurement_needs():
    assert [held_back_tokens(tokens) for tokens in (80, 32_768, 10**6)] == [10, 2048, 2048]


def test_a_single_example_cannot_be_held_back():
    with pytest.raises(BadRequest, match="needs two calibration examples, of which one is held back"):
        hold_back(examples(50))
