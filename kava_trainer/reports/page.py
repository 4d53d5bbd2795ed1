"""`report.html` and `report.png`: one run on a page that opens without a network, and in one picture."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..utils.atomic_files import write_atomically
from ..utils.redaction import without_secrets
from .charts import Chart, charts_of
from .cut.table import cut_section
from .findings.rows import PAIRED, course_rows, pair_rows
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
    measured,
    model_names,
    not_measured,
    verdict_of,
)

TEMPLATES = Path(__file__).parent / "templates"

_IN_PICTURE = ("cos_sim", "terms", "margin", "ranks")

SHOWN_SAMPLES = 3
"""Held-out problems that are open on the page; the others are folded."""

MOST_LINES, MOST_CHARACTERS = 8, 400
"""Of a prompt or an answer that are open on the page; the rest of a longer one is folded: an untrained student writes
until it is stopped."""

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
    titles = {
        "Cross-entropy, nats: lower is better": "cross_entropy",
        "Exact match: higher is better": "exact_match",
        "Retained language, nats: lower is better": "retention_cross_entropy",
    }
    place = list(EVALUATED).index
    found = {
        title: [(label, figures[place(name)]) for label, figures in evaluation_rows(summary)]
        for title, name in titles.items()
    }
    drawn_bars: dict[str, Bars] = {
        title: [(label, figure.value, figure.text) for label, figure in rows if figure.value is not None]
        for title, rows in found.items()
    }
    return {title: bars for title, bars in drawn_bars.items() if bars}


def _evaluation(summary: Summary) -> dict[str, Any]:
    """The table of what the models are worth: only models and kinds of figures of which something was measured."""
    rows = [(label, figures) for label, figures in evaluation_rows(summary) if measured(figures)]
    kept = [n for n in range(len(EVALUATED)) if any(figures[n].value is not None for _, figures in rows)]
    return {
        "titles": [list(EVALUATED.values())[n] for n in kept],
        "rows": [(label, [figures[n] for n in kept]) for label, figures in rows],
        "missing": [label for label, figures in evaluation_rows(summary) if not measured(figures)],
    }


def _samples(summary: Summary) -> list[dict[str, Any]]:
    """The held-out problems with the answer of each model that gave any, and whether it is right."""
    answering = [who for who in WHO if any(sample.answers.get(who) is not None for sample in summary.samples)]
    return [
        {
            "prompt": shortened(sample.prompt),
            "reference": shortened(sample.reference),
            "answers": [
                (
                    WHO[who],
                    None if (answer := sample.answers.get(who)) is None else shortened(answer),
                    sample.matches.get(who),
                )
                for who in answering
            ],
        }
        for sample in summary.samples
    ]


def _rollouts(summary: Summary) -> list[list[tuple[str, str | None]]]:
    """Of each of the student's own answers that are shown the prompt, the first answer and the last."""
    return [[shortened(text) for text in (own.prompt, own.first, own.last)] for own in summary.rollouts or []]


def shortened(text: str) -> tuple[str, str | None]:
    """The beginning of a text that is long, and the whole of it; a short one whole, and None."""
    beginning = "\n".join(text.split("\n")[:MOST_LINES])[:MOST_CHARACTERS]
    return (text, None) if beginning == text else (beginning, text)


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
        headline=measured(headline_figures(summary)),
        evaluation=_evaluation(summary),
        bars=bars,
        cut=None if summary.cut is None else cut_section(summary.cut),
        alignment=measured(alignment_figures(summary)),
        course=course_rows(summary),
        pairs_of_layers=pair_rows(summary),
        pair_titles=list(PAIRED.values()),
        cost=measured(cost_figures(summary)),
        missing_figures={
            "alignment": not_measured(alignment_figures(summary)),
            "cost": not_measured(cost_figures(summary)),
        },
        charts=drawn(made),
        empty=empty,
        samples=_samples(summary),
        shown_samples=SHOWN_SAMPLES,
        rollouts=_rollouts(summary),
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
    control, others = (
        [without_secrets(line) for line in lines] for lines in (verdict.control, verdict.reasons + verdict.caveats)
    )
    bars = dict(islice(bars_of(record.summary).items(), 2))
    write_png(path, without_secrets(title), verdict.word, colour, control, others, chosen, bars)


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
