"""How both models attend, where what goes into attention is aligned, is known from the arguments alone."""

import pytest

from kava_trainer.config.parser import parse_arguments
from kava_trainer.utils.errors import BadRequest

GIVEN = ["--teacher_model_name_or_path", "quickstart", "--student_model_name_or_path", "quickstart"]
GIVEN += ["--dataset_name", "quickstart", "--use_cpu", "true"]


@pytest.mark.parametrize("target", ["kv", "attention"])
@pytest.mark.parametrize("asked", ["eager", "flash_attention_2", "flex_attention"])
def test_attention_that_cannot_be_seen_is_refused_with_the_arguments(target, asked):
    told = (
        f"alignment_target {target} reads what goes into sdpa attention, but attn_implementation is {asked}; write sdpa"
    )
    with pytest.raises(BadRequest, match=told):
        parse_arguments([*GIVEN, "--alignment_target", target, "--attn_implementation", asked])


@pytest.mark.parametrize(
    "given",
    [
        ["--alignment_target", "kv"],
        ["--alignment_target", "attention", "--attn_implementation", "sdpa"],
        ["--alignment_target", "hidden", "--attn_implementation", "eager"],
        ["--alignment_target", "relations", "--attn_implementation", "eager"],
        ["--alignment_target", "attention", "--attention_weight", "0", "--attn_implementation", "eager"],
    ],
)
def test_any_other_attention_is_not(given):
    parse_arguments([*GIVEN, *given])
