"""The model card of a finished student, rendered from `run_summary.json` alone."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.model_arguments import QUICKSTART
from ..data.files import BUILDERS
from ..utils.redaction import without_secrets
from .card_snippets import exports_adapter, projector_code, usage_code
from .charts import number_text
from .recipe import recipe_text
from .summary import REPORT_PICTURE
from .tables import LONG_NAMES, figure_text

_MEASURED = {"perplexity": "Answer perplexity", "exact_match": "Exact match"}

_SEAL = re.compile(r"\n<!-- written by KAVA, sha256 ([0-9a-f]{64}) -->\n\Z")

_CARD = """---
{metadata}
---

# {name}
{picture}
Distilled with KAVA from {teacher} on {dataset}: a frozen teacher's hidden states are aligned
with the student's through a projector that is not part of this model. The student started from {start}.{trained}{size}

```python
{usage}
```

KAVA itself, the Python package `kava-trainer`, is not needed for that, only for the projector and to run the recipe
again; `pip install -c constraints.txt -e .` installs it from a checkout.

## Verdict of the run

{verdict}

## Results

On {examples}held-out examples{split}; perplexity and cross-entropy (nats) are those of the answer's tokens.

| model | answer perplexity | cross-entropy | exact match |
|---|---|---|---|
{results}

## Alignment

{alignment}

## Cost

{cost}

{projector}## Recipe

<details>
<summary>The arguments that differ from KAVA's defaults; save them as recipe.json and run
<code>accelerate launch run_kava.py recipe.json</code></summary>

```json
{recipe}```

</details>

## Licence

{licence}
"""

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


def _figure(value: float | None) -> str:
    return "not measured" if value is None else number_text(value)


def local_sources(arguments: dict[str, Any]) -> list[str]:
    """The arguments that name a local file or folder as model or data set, for a card that is rendered elsewhere.

    Args:
        arguments: all of a run, as in its summary.
    """
    names = ("teacher_model_name_or_path", "student_model_name_or_path", "dataset_name")
    return [name for name in names if arguments[name] and Path(arguments[name]).expanduser().exists()]


def hub_id(name: str | None, argument: str, summary: dict[str, Any]) -> str | None:
    """A name as it is where it is that of a repository on the hub; None for a local path and for the quickstart.

    Args:
        name: of a model or data set.
        argument: that names it.
        summary: of the run; it may say which names were local paths where the run was.
    """
    if name is None or name == QUICKSTART or argument in summary["environment"].get("local_sources", []):
        return None
    if "://" in name or Path(name).suffix in BUILDERS or Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _named(name: str | None, argument: str, summary: dict[str, Any], kind: str = "") -> str:
    """A model or data set in the text: with a link where the hub has it."""
    if name == QUICKSTART:
        return "its embedded word problems" if kind else "its embedded teacher"
    known = hub_id(name, argument, summary)
    return f"[{known}](https://huggingface.co/{kind}{known})" if known else as_code(str(name))


def as_code(text: str) -> str:
    """Text for Markdown in which nothing of it has a meaning: it may be any path."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _ancestor(summary: dict[str, Any]) -> str | None:
    """The model on the hub whose weights the student's come from.

    That is the student it started from, or the teacher whose layers it was made of. A teacher that was only read is no
    base model: the hub would show the student as a finetuned copy of it.
    """
    arguments = summary["arguments"]
    role = {"pretrained": "student", "teacher_layers": "teacher"}.get(arguments["student_init"])
    argument = f"{role}_model_name_or_path"
    return hub_id(arguments[argument], argument, summary) if role else None


def _start(summary: dict[str, Any]) -> str:
    arguments = summary["arguments"]
    if arguments["student_init"] == "pretrained":
        return _named(arguments["student_model_name_or_path"], "student_model_name_or_path", summary)
    return {"random": "random weights", "teacher_layers": "layers of the teacher"}[arguments["student_init"]]


def _size(summary: dict[str, Any]) -> str:
    """How large the student is, as a sentence with a space before it; nothing where an older run does not tell."""
    count = summary.get("student_parameters")
    return "" if count is None else f" The student has {parameters_text(count)} parameters."


def parameters_text(count: int) -> str:
    """A number of parameters for people."""
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _licence(summary: dict[str, Any]) -> str:
    """Whose licences apply; the hub does not tell a run which they are, so that the metadata name none."""
    arguments = summary["arguments"]
    teacher = arguments["teacher_model_name_or_path"]
    whose = [] if arguments["student_init"] != "pretrained" else [f"the base model's ({_start(summary)})"]
    whose += [f"the teacher's ({_named(teacher, 'teacher_model_name_or_path', summary)})", "the data set's"]
    told = f"{', '.join(whose[:-1])} and {whose[-1]}"
    return f"No licence is named here: {told} apply. Name one as `license` in the metadata once you know that you may."


def _training_of(arguments: dict[str, Any]) -> str:
    """What of the student was trained, where that is not all of it; a sentence with a space before it."""
    if not arguments["use_peft"]:
        return ""
    bits = arguments["student_quantization"]
    base = "" if bits == "none" else f" in {bits.replace('bit', ' bit')}"
    now = "this is the adapter alone" if exports_adapter(arguments) else "it is merged into this model"
    return f" A LoRA adapter of rank {arguments['lora_r']} was trained on the frozen student{base}; {now}."


def _eval_results(summary: dict[str, Any]) -> list[EvalResult]:
    arguments, measured = summary["arguments"], summary["evaluation"]["student_after"] or {}
    dataset = arguments["dataset_name"]
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=hub_id(dataset, "dataset_name", summary) or "custom",
            dataset_name="arithmetic word problems of KAVA's quickstart"
            if dataset == QUICKSTART
            else Path(dataset).name,
            dataset_config=arguments["dataset_config_name"],
            dataset_split=arguments["dataset_test_split"] or ("test" if dataset == QUICKSTART else "held-out"),
            dataset_args={"num_examples": count} if (count := summary.get("held_out_examples")) else None,
            metric_type=metric,
            metric_name=title,
            metric_value=measured[metric],
            verified=False,
        )
        for metric, title in _MEASURED.items()
        if measured.get(metric) is not None and math.isfinite(measured[metric])
    ]


def card_metadata(name: str, summary: dict[str, Any]) -> ModelCardData:
    """The metadata of a student's card, as the hub reads it.

    Args:
        name: repository or folder of the student.
        summary: the content of `run_summary.json`.
    """
    arguments = summary["arguments"]
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


def _verdict(summary: dict[str, Any]) -> str:
    verdict = summary["verdict"]
    return "\n".join([_VERDICTS[verdict["success"]], "", *(f"- {reason}" for reason in verdict["reasons"])]).rstrip()


def _results(summary: dict[str, Any]) -> str:
    rows = [
        f"| {LONG_NAMES[who]} | {_figure(figures['perplexity'])} | {_figure(figures.get('cross_entropy'))} | "
        f"{figure_text('exact_match', figures['exact_match'])} |"
        for who, figures in summary["evaluation"].items()
        if figures is not None
    ]
    return "\n".join(rows) or "| none | not measured | not measured | not measured |"


def _alignment(summary: dict[str, Any]) -> str:
    """What was aligned and how well, as a paragraph and a table."""
    arguments, final = summary["arguments"], summary["final"]
    if not (arguments["mercator_weight"] > 0 or arguments["mse_weight"] > 0):
        return "No hidden states were aligned."
    direction = arguments["projector_direction"].replace("_", " ")
    anchor = "" if arguments["projector_anchor"] == "none" else f", held by {arguments['projector_anchor']}"
    where = "on held-out tokens" if summary["evaluation"]["student_after"] else "in the last training steps"
    rows = [f"| {title} | {_figure(final[name])} |" for name, title in _ALIGNED.items()]
    return "\n".join(
        [
            f"Layers: {as_code(str(arguments['layer_mapping']))}; projector: {direction}{anchor}. Measured {where}:",
            "",
            "| | |\n|---|---|",
            *rows,
            "",
            "CosSim is the mean cosine between the student's states and their targets. It tells something only where "
            "it is well above that with other tokens' targets; the margin is the difference.",
        ]
    )


def _cost(summary: dict[str, Any]) -> str:
    spent, environment = summary["throughput"], summary["environment"]
    speed, peak = spent["tokens_per_second"], spent["peak_memory_bytes"]
    speed = "not measured" if speed is None else f"{speed:,.0f} tokens per second"
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers") if environment.get(name))
    return "\n".join(
        [
            "| | |\n|---|---|",
            f"| Steps | {summary['global_step']} |",
            f"| Whole run, with its evaluations | {figure_text('duration_seconds', summary['duration_seconds'])} |",
            f"| Training speed | {speed} |",
            f"| Peak memory, measured (on a CPU: the whole process) | {figure_text('peak_memory_bytes', peak)} |",
            f"| Device | {str(environment.get('device')).replace('|', ' ')} |",
            f"| Software | {versions} |",
        ]
    )


def render_model_card(
    name: str, summary: dict[str, Any], revision: str | None = None, picture: bool = False, projector: bool = False
) -> str:
    """The text of `README.md` for a finished student, sealed so that `is_untouched` knows it again.

    Args:
        name: repository or folder of the student.
        summary: the content of `run_summary.json`.
        revision: the branch it is on, where that is not the main one.
        picture: whether `report.png` is beside the card.
        projector: whether `projector/` is beside the card.
    """
    arguments = summary["arguments"]
    split = f" (split {as_code(arguments['dataset_test_split'])})" if arguments["dataset_test_split"] else ""
    card = _CARD.format(
        metadata=card_metadata(name, summary).to_yaml(),
        name=name,
        picture=f"\n![Curves and results of the run]({REPORT_PICTURE})\n" if picture else "",
        teacher=_named(arguments["teacher_model_name_or_path"], "teacher_model_name_or_path", summary),
        dataset=_named(arguments["dataset_name"], "dataset_name", summary, "datasets/"),
        start=_start(summary),
        trained=_training_of(arguments),
        usage=usage_code(name, revision, summary),
        size=_size(summary),
        licence=_licence(summary),
        verdict=_verdict(summary),
        split=split,
        examples=f"{count} " if (count := summary.get("held_out_examples")) else "",
        results=_results(summary),
        alignment=_alignment(summary),
        cost=_cost(summary),
        projector=f"## The projector\n\n```python\n{projector_code(name, revision)}\n```\n\n" if projector else "",
        recipe=recipe_text(summary),
    )
    return _sealed(without_secrets(card))


def _sealed(text: str) -> str:
    return f"{text}\n<!-- written by KAVA, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a card is as `render_model_card` wrote it; one that somebody has changed is theirs."""
    seal = _SEAL.search(card)
    return seal is not None and _sealed(card[: seal.start()]) == card
