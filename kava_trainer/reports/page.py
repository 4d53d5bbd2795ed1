"""`report.html` and `report.png`: one run on a page that opens without a network, and in one picture."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..utils.atomic_files import write_atomically
from ..utils.redaction import without_secrets
from .charts import Chart, charts_of
from .plots import COLOURS, DASHES, Bars, bars_svg, chart_svg, write_png
from .run_reader import RunRecord
from .summary import REPORT_PAGE, REPORT_PICTURE, Summary, write_text
from .tables import (
    EVALUATED,
    NOT_MEASURED,
    WHO,
    alignment_figures,
    cost_figures,
    evaluation_rows,
    headline_figures,
    model_names,
    verdict_of,
)

TEMPLATES = Path(__file__).parent / "templates"

_IN_PICTURE = ("cos_sim", "terms", "margin", "ranks")

_VERDICT_COLOURS = {"good": "#177245", "bad": "#b42318", "open": "#7a5b00"}


def render(template: str, **context: Any) -> str:
    """A page from a template, everything in it escaped that is not `Markup`, without secrets."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "css": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "not_measured": NOT_MEASURED,
        "dashes": DASHES,
        "colours": len(COLOURS),
    }
    return without_secrets(environment.get_template(template).render(context))


def drawn(found: list[Chart]) -> list[dict[str, Any]]:
    """Charts beside their pictures."""
    return [{"chart": chart, "svg": Markup(chart_svg(chart))} for chart in found]


def flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of arguments or of an environment, as text."""
    return [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in values.items()
    ]


def bars_of(summary: Summary) -> dict[str, Bars]:
    """What is drawn as bars, by title."""
    titles = {"Cross-entropy, nats: lower is better": "cross_entropy", "Exact match: higher is better": "exact_match"}
    place = list(EVALUATED).index
    rows = evaluation_rows(summary)
    return {
        title: [(label, figures[place(name)].value, figures[place(name)].text) for label, figures in rows]
        for title, name in titles.items()
    }


def _samples(summary: Summary) -> list[dict[str, Any]]:
    """The held-out problems with the answer of each model and whether it is right; None where it gave none."""
    return [
        {
            "prompt": sample.prompt,
            "reference": sample.reference,
            "answers": [(label, sample.answers.get(who), sample.matches.get(who)) for who, label in WHO.items()],
        }
        for sample in summary.samples
    ]


def report_page(record: RunRecord) -> str:
    """The page of one run as HTML."""
    summary = record.summary
    made, empty = charts_of(record.log_history)
    teacher, student, data = model_names(summary)
    bars = []
    for n, (title, rows) in enumerate(bars_of(summary).items()):
        words = f"{title}. {', '.join(f'{label} {text}' for label, _, text in rows)}."
        bars.append({"title": title, "svg": Markup(bars_svg(f"bars{n}", rows)), "words": words})
    return render(
        "report.html.j2",
        folder=str(record.folder),
        name=record.folder.resolve().name,
        summary=summary,
        teacher=teacher,
        student=student,
        data=data,
        verdict=verdict_of(record),
        note=record.note,
        headline=headline_figures(summary),
        evaluated=list(EVALUATED.values()),
        evaluation=evaluation_rows(summary),
        bars=bars,
        alignment=alignment_figures(summary),
        cost=cost_figures(summary),
        charts=drawn(made),
        empty=empty,
        samples=_samples(summary),
        fidelity=flat(summary.teacher_fidelity or {}),
        environment=flat(summary.environment),
        arguments=flat(summary.arguments),
    )


def _write_picture(record: RunRecord, path: Path) -> None:
    verdict = verdict_of(record)
    teacher, student, data = (name if len(name) < 50 else f"...{name[-46:]}" for name in model_names(record.summary))
    made = {chart.name: chart for chart in charts_of(record.log_history)[0]}
    chosen = [made.pop(name) for name in _IN_PICTURE if name in made]
    chosen = [*chosen, *made.values()][:4]
    title = f"{teacher} \N{RIGHTWARDS ARROW} {student} on {data}, {record.summary.global_step} steps"
    colour = _VERDICT_COLOURS[verdict.kind]
    lines = [without_secrets(line) for line in verdict.reasons]
    write_png(path, without_secrets(title), verdict.word, colour, lines, chosen, bars_of(record.summary))


def write_report(record: RunRecord) -> Path:
    """Write `report.html` and `report.png` into a run's folder.

    Returns:
        The page.

    Raises:
        OSError: if they cannot be written.
    """
    write_text(record.folder / REPORT_PAGE, report_page(record))
    write_atomically(record.folder / REPORT_PICTURE, lambda temporary: _write_picture(record, temporary))
    return record.folder / REPORT_PAGE
