"""Imports go one way: a file imports only files that stand above it in this table."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

ORDER = [
    *(
        "redaction",
        "errors",
        "file_errors",
        "import_notes",
        "recipes",
        "optimizers",
        "engines",
        "layer_mapping",
        "source_arguments",
        "arguments",
        "explaining",
        "invocation",
        "parsing",
        "environment",
        "memory_errors",
        "free_memory",
        "losses",
        "alignment",
        "metrics",
        "packing",
        "capture",
        "heads",
        "console",
        "checkpoint_io",
        "finals",
        "disk",
        "ranks",
        "signals",
        "sharing",
        "fsdp",
        "nonfinite",
    ),
    *(
        "quickstart.problems",
        "quickstart",
        "quickstart.export",
        "data_files",
        "places",
        "projector",
        "loading",
        "adapters",
        "adapter_files",
        "teacher",
        "targets",
        "collating",
        "state_shards",
        "teacher_cache",
        "student",
        "calibration",
        "terms",
        "data",
        "stream_sources",
        "streaming",
        "stream_cache",
        "final_answer_match",
        "final_answer_match.final_answer_match",
        "evaluation",
        "probe",
    ),
    *(
        "callbacks",
        "callbacks.status",
        "callbacks.probe",
        "callbacks.projector_save",
        "callbacks.resume",
        "callbacks.emergency",
        "callbacks.guard",
    ),
    *(
        "hub",
        "pairing",
        "progress",
        "weights",
        "pushing",
        "saving",
        "fitting",
        "stepping",
        "probing",
        "evaluating",
        "memory",
        "fidelity",
        "trainer",
        "interruption",
        "summary",
        "identity",
        "verdict",
        "run_folder",
        "curves",
        "figures",
        "plots",
        "report",
        "comparison",
        "showing",
        "recipe",
        "finished",
        "usage",
        "card",
        "publishing",
        "preparation",
        "tracking",
        "caching",
        "control",
        "closing",
        "pipeline",
        "untrained",
        "checkup",
        "checkup.findings",
        "checkup.examples",
        "checkup.machine",
        "checkup.models",
        "checkup.folders",
        "doctor",
        "commands",
        "commands.doctor",
        "commands.train",
        "commands.report",
        "commands.push",
        "commands.cache",
        "commands.evaluate",
        "commands.explain",
        "cli",
        "__main__",
        "quickstart.train_teacher",
    ),
]
PACKAGE = ROOT / "kava_trainer"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    package = list(path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            if names == ["__version__"]:  # the package defines it before all else
                continue
            found |= {name for name in names if name in ORDER} or {module}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kava_trainer"):
            raise AssertionError(f"{path} imports its own package by its absolute name")
    return found


def test_the_table_names_every_file():
    assert sorted(ORDER) == sorted(map(name_of, FILES))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_above(path):
    own = ORDER.index(name_of(path))
    for name in imported(path):
        assert ORDER.index(name) < own, f"{name_of(path)} imports {name}"


def test_files_are_short_and_the_entry_point_holds_no_logic():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 360, path
    assert len((ROOT / "run_kava.py").read_text().splitlines()) < 120
