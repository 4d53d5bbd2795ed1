import pytest
import torch

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.distillation.rollouts.examples import Rollout
from kava_trainer.distillation.token_means import TokenMeans
from kava_trainer.trainer.rollouts.figures import note_figures, warnings_of

SOUND = {
    "rollout_entropy": 0.4,
    "rollout_limit_share": 0.1,
    "rollout_repetition": 0.1,
    "rollout_length": 30.0,
    "rollout_empty_share": 0.0,
}


@pytest.fixture
def args(tmp_path):
    return KavaTrainingArguments(str(tmp_path), use_cpu=True, on_policy_fraction=0.5, on_policy_max_new_tokens=64)


def test_figures_are_means_over_answers_and_the_entropy_over_their_tokens():
    rollouts = [
        Rollout([1], [5, 6, 0], ended=True),
        Rollout([1], [7] * 8, ended=False),
        Rollout([1], [0], ended=True),
    ]
    entropies = [torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.full((8,), 0.5), torch.tensor([4.0])]
    means = TokenMeans()
    note_figures(means, rollouts, entropies, torch.device("cpu"))
    assert means.drain(lambda sums: sums) == pytest.approx(
        {
            "rollout_length": 5.5,
            "rollout_limit_share": 0.5,
            "rollout_empty_share": 1 / 3,
            "rollout_repetition": 0.4,
            "rollout_entropy": (1 + 2 + 3 + 8 * 0.5 + 4) / 12,
        }
    )


def test_a_rank_without_rollouts_notes_the_same_names():
    some, none = TokenMeans(), TokenMeans()
    note_figures(some, [Rollout([1], [5, 0], ended=True)], [torch.ones(2)], torch.device("cpu"))
    note_figures(none, [], [], torch.device("cpu"))
    assert list(none.state()) == list(some.state())
    assert none.drain(lambda sums: sums) == {}


def test_sound_answers_give_no_warning(args):
    assert warnings_of(SOUND, 0.5, args) == {}
    assert warnings_of({}, None, args) == {}


def test_a_student_that_is_as_sure_as_its_teacher_has_lost_nothing(args):
    sure = {**SOUND, "rollout_entropy": 0.01}
    assert warnings_of({**sure, "rollout_agreement": 0.99}, 0.5, args) == {}
    assert list(warnings_of({**sure, "rollout_agreement": 0.6}, 0.5, args)) == ["rollout_entropy"]


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        (
            {"rollout_entropy": 0.04},
            "rollout_entropy",
            "have lost their variety: 0.04 nats a token, where the first ones had 0.5. Raise on_policy_temperature "
            "(now 1), or lower kd_beta (now 0).",
        ),
        (
            {"rollout_limit_share": 0.75},
            "rollout_limit",
            "75 % of the student's own answers did not end within on_policy_max_new_tokens 64, so it hardly learns "
            "when to stop. Raise that, or lower on_policy_fraction (now 0.5).",
        ),
        (
            {"rollout_repetition": 0.6},
            "rollout_repetition",
            "repeat themselves: 60 % of their runs of 4 tokens stood in the same answer before. Lower "
            "on_policy_fraction (now 0.5)",
        ),
    ],
)
def test_each_way_to_go_wrong_is_one_sentence_with_what_to_change(args, changes, kind, told):
    found = warnings_of({**SOUND, **changes}, 0.5, args)
    assert list(found) == [kind]
    assert told in found[kind]
