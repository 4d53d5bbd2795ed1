"""Exact match of final answers, as a metric of the `evaluate` library.

`evaluate.load` copies this file elsewhere before it imports it, so it imports nothing of its own package.
"""

import re
from fractions import Fraction

import datasets
import evaluate

FINAL_ANSWER = "####"
"""What GSM8K writes before the final answer."""

_MINUS = r"(?<![\d)])-"

_DIGITS = r"\d{1,40}"  # Python refuses to read thousands of digits, which a looping model writes

_AMOUNT = rf"(?:\d{{1,3}}(?:,\d{{3}})+|{_DIGITS})(?:\.{_DIGITS}|/[1-9]\d{{0,39}})?|\.{_DIGITS}"

_NUMBER = re.compile(rf"(?P<sign>{_MINUS})?\s*\$?\s*(?P<inner_sign>{_MINUS})?(?P<amount>{_AMOUNT})")


def _numbers(text: str) -> list[Fraction]:
    """All numbers of a text as people mean them: `$1,800`, `18.`, `18.0`, `-3`, `1/2`."""
    found = []
    for match in _NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):
        amount = Fraction(match["amount"].replace(",", ""))
        found.append(-amount if match["sign"] or match["inner_sign"] else amount)
    return found


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def is_exact_match(prediction: str, reference: str) -> bool:
    """Whether a generated answer ends in the reference's final answer.

    The final answer stands behind the first `####`. A prediction without that mark is read by its last number. Numbers
    are compared as numbers (`#### 18.`, `$18` and `18.0` are one answer), other answers as text without case.
    """
    is_problem = FINAL_ANSWER in reference
    expected = reference.split(FINAL_ANSWER, 1)[1].split("\n")[0] if is_problem else reference
    marked = FINAL_ANSWER in prediction
    given = prediction.split(FINAL_ANSWER, 1)[1].split("\n")[0] if marked else prediction
    wanted = _numbers(expected)
    if len(wanted) != 1 or (not is_problem and re.search(r"[^\W\d_]{2,}", expected)):
        return _plain(given) == _plain(expected)
    numbers = _numbers(given)
    return bool(numbers) and (numbers[0] if marked else numbers[-1]) == wanted[0]


class FinalAnswerMatch(evaluate.Metric):
    """`exact_match`: the share of predictions whose final answer is the reference's, see `is_exact_match`.

    Use it as any `evaluate` metric: `FinalAnswerMatch().compute(predictions=[...], references=[...])`.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of generated answers whose final answer equals the reference's.",
            citation="Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168.",
            inputs_description="predictions and references: full answers as text, the final one behind ####.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        if not predictions:
            raise ValueError("There are no predictions, so there is no share of them that matches.")
        matches = [is_exact_match(p, r) for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": sum(matches) / len(matches)}
