"""The links of the documents, and their tables, which are those of the measurements."""

import csv
import json
import re
import sys

from helpers.documents import DOCUMENTS, blocks
from helpers.places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bf16_table
import effectiveness
import on_policy
import pair_kinds
import performance
import real_pair
import scaling


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_to_a_file_leads_somewhere():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^):]+))?\)", text):
            target = path.parent / link if link else path
            assert target.exists(), f"{path.name}: {link}"
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path.name}: {link}#{anchor}"


def test_every_example_saves_into_a_folder_of_its_own():
    folder = re.compile(r"""--output_dir (\S+)|"?output_dir"?[=:] ?"([^"]+)\"""")
    found: dict[str, list[str]] = {}
    for path in DOCUMENTS:
        if path.name in ("README.md", "quickstart.zh-CN.md"):  # what is there is in quickstart.md as well
            continue
        for text in (block.text for block in blocks(path) if "resume_from_checkpoint" not in block.text):
            for names in folder.findall(text.replace("\\\n", " ")):
                found.setdefault("".join(names), []).append(path.name)
    assert len(found) >= 8
    assert not {name: places for name, places in found.items() if len(places) > 1}
    assert not [name for name in found if not name.startswith("checkpoints/")]


def test_the_tables_of_effectiveness_are_those_of_its_measurements():
    text, rows = effectiveness.DOCUMENT.read_text(), effectiveness.read_rows(effectiveness.CSV_FILE)
    assert effectiveness.document(text, rows) == text
    assert len(rows) > 40


def test_the_tables_of_where_own_answers_pay_are_those_of_its_measurements():
    text = on_policy.DOCUMENT.read_text(encoding="utf-8")
    assert on_policy.document(text, effectiveness.read_rows(on_policy.CSV_FILE)) == text


def test_the_tables_of_a_real_pair_are_those_of_its_measurements():
    text = real_pair.DOCUMENT.read_text(encoding="utf-8")
    assert real_pair.document(text, effectiveness.read_rows(real_pair.CSV_FILE)) == text


def test_the_tables_of_every_kind_of_pair_are_those_of_its_measurements():
    text = pair_kinds.DOCUMENT.read_text(encoding="utf-8")
    assert pair_kinds.document(text, effectiveness.read_rows(pair_kinds.CSV_FILE)) == text


def test_the_tables_of_performance_are_those_of_its_measurements():
    text = performance.DOCUMENT.read_text(encoding="utf-8")
    assert performance.document(text) == text
    assert "step-real-hidden" in text


def test_the_students_own_answers_are_written_much_faster_than_one_at_a_time():
    rows = {(row["part"], row["way"]): float(row["ratio"]) for row in performance.read("rollouts-quickstart")}
    for part in ("full", "ending"):
        assert rows[part, "all together"] > max(4, rows[part, "continuous"])


def test_the_tables_of_scaling_are_those_of_its_runs_and_of_its_arithmetic():
    text = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert scaling.document(text) == text
    with scaling.MATRIX.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [row for row in rows if row["outcome"].startswith("failed")]
    assert {row["resume"] for row in rows if row["outcome"] == "run"} == {"resumed"}
    assert {row["elsewhere"] for row in rows if row["outcome"] == "run" and row["engine"] != "one process"} == {
        "goes on"
    }


def test_the_memory_of_a_stream_is_flat_over_a_million_examples():
    rows = performance.read("streaming-memory")
    memory = {int(row["examples"]): float(row["resident_mb"]) for row in rows}
    assert max(memory) >= 1_000_000
    settled = [size for examples, size in memory.items() if examples >= 100_000]
    assert max(settled) < 1.1 * min(settled)


def test_the_tables_of_numbers_are_those_of_its_measurements():
    text = bf16_table.DOCUMENT.read_text(encoding="utf-8")
    assert bf16_table.document(text) == text


def test_every_recipe_saves_into_a_folder_of_its_own():
    for path in ROOT.glob("training_args/*.json"):
        assert json.loads(path.read_text())["output_dir"] == f"checkpoints/{path.stem}"
