"""The model card of a finished student, rendered from `run_summary.json` alone."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.alignment.teachers import teacher_names
from ..config.checks import is_aligned
from ..config.model_arguments import QUICKSTART
from ..data.files import is_file_name
from ..utils.redaction import without_secrets
from .card_snippets import exports_adapter, projector_code, usage_code
from .charts import number_text
from .findings.alignment import Measured, told_of_pairs
from .recipe import recipe_text
from .summary import REPORT_PICTURE, Summary
from .tables import LONG_NAMES, figure_text

_METRICS = {"perplexity": "Answer perplexity", "exact_match": "Exact match"}

_SEAL = re.compile(r"\n<!-- written by KAVA, sha256 ([0-9a-f]{64}) -->\n\Z")

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"

_ALIGNED = {
    "cos_sim": "CosSim",
    "centred_cos_sim": "CosSim, centred",
    "shuffled_cos_sim": "CosSim with other tokens' targets",
    "margin": "margin between the two",
    "cka": "CKA to the teacher",
    "student_effective_rank": "effective rank of the student's states",
    "target_effective_rank": "effective rank of the targets",
    "teacher_effective_rank": "effective rank of the teacher's states",
}

_VERDICTS = {True: "**Success.**", False: "**No success.**", None: "**None**: the run measured too little to tell."}


def _number(value: Measured) -> str:
    return "not measured" if value is None else number_text(value)


def local_sources(arguments: dict[str, Any]) -> list[str]:
    """The arguments that name a local file or folder as model or data set, for a card that is rendered elsewhere."""
    names = ("teacher_model_name_or_path", "student_model_name_or_path", "dataset_name")
    named = {name: arguments[name] for name in names}
    named |= {f"teachers[{number}]": own for number, own in enumerate(teacher_names(arguments)) if number}
    return [name for name, own in named.items() if own and Path(own).expanduser().exists()]


def hub_id(name: str | None, argument: str, summary: Summary) -> str | None:
    """A name as it is where it is that of a repository on the hub; None for a local path and for the quickstart.

    Args:
        name: of a model or data set.
        argument: that names it.
        summary: of the run; it may say which names were local paths where the run was.
    """
    if name is None or name == QUICKSTART or argument in summary.environment.get("local_sources", []):
        return None
    if "://" in name or is_file_name(name) or Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _named(name: str | None, argument: str, summary: Summary, kind: str = "") -> str:
    """A model or data set in the text: with a link where the hub has it."""
    if name == QUICKSTART:
        return "its embedded word problems" if kind else "its embedded teacher"
    known = hub_id(name, argument, summary)
    return f"[{known}](https://huggingface.co/{kind}{known})" if known else as_code(str(name))


def _teachers(summary: Summary) -> str:
    """All teachers in the text."""
    first, *others = teacher_names(summary.arguments) or ["unknown"]
    named = [
        _named(first, "teacher_model_name_or_path", summary),
        *(_named(own, f"teachers[{number}]", summary) for number, own in enumerate(others, start=1)),
    ]
    return " and ".join(named)


def as_code(text: str) -> str:
    """Text for Markdown in which nothing of it has a meaning: it may be any path."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _ancestor(summary: Summary) -> str | None:
    """The model on the hub whose weights the student's come from.

    That is the student it started from, or the teacher whose layers it was made of. A teacher that was only read is no
    base model: the hub would show the student as a finetuned copy of it.
    """
    arguments = summary.arguments
    role = {"pretrained": "student", "teacher_layers": "teacher"}.get(arguments["student_init"])
    argument = f"{role}_model_name_or_path"
    return hub_id(arguments[argument], argument, summary) if role else None


def _start(summary: Summary) -> str:
    arguments = summary.arguments
    if arguments["student_init"] == "pretrained":
        return _named(arguments["student_model_name_or_path"], "student_model_name_or_path", summary)
    if (cut := summary.cut) is not None:
        return f"{len(cut['kept'])} of the {cut['teacher_layers']} layers of the teacher"
    return {"random": "random weights", "teacher_layers": "layers of the teacher"}[arguments["student_init"]]


def parameters_text(count: int) -> str:
    """A number of parameters for people."""
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _one_line(name: str) -> str:
    """A name for the metadata, where YAML would end a line at whatever Unicode calls the end of one."""
    return " ".join(name.split())


def _eval_results(summary: Summary) -> list[EvalResult]:
    arguments, measured = summary.arguments, summary.evaluation.student_after
    dataset = arguments["dataset_name"]
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=hub_id(dataset, "dataset_name", summary) or "custom",
            dataset_name="arithmetic word problems of KAVA's quickstart"
            if dataset == QUICKSTART
            else _one_line(Path(dataset).name),
            dataset_config=_one_line(arguments["dataset_config_name"] or "") or None,
            dataset_split=_one_line(arguments["dataset_test_split"] or "")
            or ("test" if dataset == QUICKSTART else "held-out"),
            dataset_args={"num_examples": count} if (count := summary.held_out_examples) else None,
            metric_type=metric,
            metric_name=title,
            metric_value=value,
            verified=False,
        )
        for metric, title in _METRICS.items()
        if (value := getattr(measured, metric, None)) is not None and math.isfinite(value)
    ]


def card_metadata(name: str, summary: Summary) -> ModelCardData:
    """The metadata of the card of a student, named by its repository or folder, as the hub reads it."""
    arguments = summary.arguments
    ancestor, adapter = _ancestor(summary), exports_adapter(arguments)
    dataset = hub_id(arguments["dataset_name"], "dataset_name", summary)
    return ModelCardData(
        model_name=name,
        base_model=ancestor,
        base_model_relation=("adapter" if adapter else "finetune") if ancestor else None,
        datasets=[dataset] if dataset else None,
        language=["en"] if arguments["dataset_name"] == QUICKSTART else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["kava", "knowledge-distillation", *(["lora"] if arguments["use_peft"] else [])],
        eval_results=_eval_results(summary) or None,
    )


def render_model_card(
    name: str, summary: Summary, revision: str | None = None, picture: bool = False, projector: bool = False
) -> str:
    """The text of `README.md` for a finished student, sealed so that `is_untouched` knows it again.

    Args:
        name: repository or folder of the student.
        summary: of the run.
        revision: the branch it is on, where that is not the main one.
        picture: whether `report.png` is beside the card.
        projector: whether `projector/` is beside the card.
    """
    arguments, environment, speed = summary.arguments, summary.environment, summary.throughput.tokens_per_second
    card = ModelCard.from_template(
        card_metadata(name, summary),
        str(_TEMPLATE),
        name=name,
        summary=summary,
        arguments=arguments,
        aligns=is_aligned(arguments),
        picture=REPORT_PICTURE if picture else None,
        teacher=_teachers(summary),
        dataset=_named(arguments["dataset_name"], "dataset_name", summary, "datasets/"),
        start=_start(summary),
        is_adapter=exports_adapter(arguments),
        usage=usage_code(name, revision, summary),
        verdict=_VERDICTS[summary.verdict.success],
        speed="not measured" if speed is None else f"{speed:,.0f} tokens per second",
        software=", ".join(f"{of} {environment[of]}" for of in ("torch", "transformers") if environment.get(of)),
        projector=projector_code(name, revision) if projector else None,
        recipe=recipe_text(summary),
        models=LONG_NAMES,
        alignment=_ALIGNED,
        told_of_pairs=told_of_pairs(summary.final.pairs or []),
        code=as_code,
        figure=figure_text,
        number=_number,
        size=parameters_text,
    )
    return _sealed(without_secrets(f"{card}\n"))


def _sealed(text: str) -> str:
    return f"{text}\n<!-- written by KAVA, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a card is as `render_model_card` wrote it; one that somebody has changed is theirs."""
    seal = _SEAL.search(card)
    return seal is not None and _sealed(card[: seal.start()]) == card
