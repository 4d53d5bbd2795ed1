import re

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.train_quickstart_teacher import build_tokenizer, student_config, teacher_config
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.data.encoding import encode_dataset
from kava_trainer.evaluation.answers import evaluate_model, longest_answer
from kava_trainer.quickstart import STUDENT_FOLDER, TEACHER_FOLDER
from kava_trainer.quickstart.problems import generate_problems


def test_problems_are_reproducible_distinct_and_split_without_overlap():
    train, test = generate_problems(3000), generate_problems(500, "test")
    assert train == generate_problems(3000)
    assert train != generate_problems(3000, seed=1)
    questions = {problem["question"] for problem in train}
    assert len(questions) == 3000
    assert not questions & {problem["question"] for problem in test}
    with pytest.raises(ValueError, match="no split 'dev'"):
        generate_problems(1, "dev")


def test_every_calculation_note_is_right_and_the_last_result_is_the_answer():
    for problem in generate_problems(2000):
        notes = re.findall(r"(\d+)([-+*/])(\d+)=<<\1\2\3=(\d+)>>\4 ", problem["answer"])
        assert len(notes) in (2, 3)
        for left, operator, right, result in notes:
            assert eval(f"{left}{operator}{right}") == int(result) >= 0
        assert problem["answer"].endswith(f"\n#### {notes[-1][3]}")


@pytest.mark.slow
def test_the_tokenizer_is_fast_reads_any_text_and_is_what_the_script_makes():
    shipped, made = AutoTokenizer.from_pretrained(STUDENT_FOLDER), build_tokenizer()
    assert shipped.is_fast
    assert shipped.get_vocab() == made.get_vocab() == AutoTokenizer.from_pretrained(TEACHER_FOLDER).get_vocab()
    text = "Zoë zahlt 3,50 € — 日本 🎯\n"
    assert shipped.decode(shipped(text)["input_ids"]) == text
    assert shipped.tokenize("123") == ["1", "2", "3"]


def test_the_shipped_files_are_small_and_of_the_scripts_shapes():
    weights = TEACHER_FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 4 * 1000**2
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER_FOLDER)
    student = AutoModelForCausalLM.from_config(student_config())
    assert teacher.config.hidden_size == teacher_config().hidden_size
    assert student.num_parameters() * 4 <= teacher.num_parameters()


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
def test_the_teacher_answers_95_percent_of_held_out_problems(count):
    tokenizer = AutoTokenizer.from_pretrained(TEACHER_FOLDER)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER_FOLDER)
    problems = Dataset.from_list(generate_problems(count, "test"))
    examples = encode_dataset(problems, tokenizer, 256, "test").dataset
    figures = evaluate_model(
        teacher, tokenizer, examples, DistillationCollator(tokenizer), 125, max_new_tokens=longest_answer(examples)
    )
    assert figures["exact_match"] >= 0.95
    assert figures["perplexity"] < 1.05
