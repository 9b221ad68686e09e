"""The JSON schema of every document that `--json` prints, made from the types of the reports.

`python -m tests.cli.report_schema --write` writes it into the package; a test compares. The diff of
that file is the change as programs see it: where a key goes away or comes to mean something else,
`SCHEMA` in shardsurgeon/reports.py counts up.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import shardsurgeon
from shardsurgeon.layerwise.estimate import CalibrationEstimate
from shardsurgeon.layerwise.request import CalibrationReport
from shardsurgeon.operations.evaluation_report import EvaluationReport
from shardsurgeon.operations.families import FamiliesReport
from shardsurgeon.operations.fit import FitReport
from shardsurgeon.operations.materialize import MaterializeReport
from shardsurgeon.operations.page import PageReport
from shardsurgeon.operations.plots import PlotReport
from shardsurgeon.operations.probe_report import ProbeReport
from shardsurgeon.operations.reports import (
    ApplyReport,
    BaselineReport,
    BlendReport,
    EnvReport,
    InspectReport,
    PushReport,
    RouterScoresReport,
    RunReport,
    ScoresReport,
    WrittenScoresReport,
)
from shardsurgeon.pruning.agreement import ComparisonReport
from shardsurgeon.pruning.report import PlansReport
from shardsurgeon.reports import SCHEMA, Report
from shardsurgeon.verification.findings import VerifyReport

SCHEMA_FILE = Path(shardsurgeon.__file__).parent / "operations" / "report.schema.json"
COMMANDS: dict[str, type[Report]] = {
    "inspect": InspectReport,
    "fit": FitReport,
    "plan": PlansReport,
    "apply": ApplyReport,
    "materialize": MaterializeReport,
    "verify": VerifyReport,
    "push": PushReport,
    "scores show": ScoresReport,
    "scores plot": PlotReport,
    "scores compare": ComparisonReport,
    "scores convert": WrittenScoresReport,
    "scores merge": WrittenScoresReport,
    "scores blend": BlendReport,
    "scores from-router": RouterScoresReport,
    "scores from-weights": BaselineReport,
    "scores random": BaselineReport,
    "calibrate": CalibrationReport,
    "calibrate --dry-run": CalibrationEstimate,
    "evaluate": EvaluationReport,
    "probe": ProbeReport,
    "report": PageReport,
    "run": RunReport,
    "families": FamiliesReport,
    "env": EnvReport,
}
# The reports that may be among the steps of a recipe.
_STEPS = (CalibrationReport, PlansReport, ApplyReport, PushReport)
_PLAIN = {bool: "boolean", int: "integer", str: "string", type(None): "null"}
_HEAD = {
    "schema": {"const": SCHEMA, "description": "Version of these documents."},
    "version": {"type": "string", "description": "Version of shardsurgeon."},
}
_ERROR = {
    "type": "object",
    "description": "Why a command failed; where and remedy may be empty.",
    "properties": {
        "where": {"type": "string", "description": "The file, folder or option concerned."},
        "problem": {"type": "string", "description": "What is wrong."},
        "remedy": {"type": "string", "description": "What can be done about it."},
        "status": {"type": "integer", "description": "The exit status."},
    },
    "required": ["where", "problem", "remedy", "status"],
}


def report_schema() -> dict[str, Any]:
    """The schema of all documents; a command's own is `#/$defs/<command>`, or `failure`."""
    defs: dict[str, Any] = {"error": _ERROR}
    documents = {name: _document(_object(kind, defs)) for name, kind in COMMANDS.items()}
    failed = {"type": "object", "properties": {}, "required": []}
    documents["failure"] = _document(failed, ["error"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What shardsurgeon prints with --json",
        "description": "One document per command, of the command or of its failure. Keys may be "
        "added; where one goes away or changes its meaning, `schema` counts up.",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in documents],
        "$defs": {**documents, **dict(sorted(defs.items()))},
    }


def require_valid(document: Any, name: str) -> None:
    """Held to the schema of one command, and to no key more."""
    import jsonschema

    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    jsonschema.validate(document, {**closed(schema), "anyOf": [{"$ref": f"#/$defs/{name}"}]})


def closed(schema: Any) -> Any:
    """The schema without room for keys that it does not name."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(item) for key, item in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        found["additionalProperties"] = False
    return found


def _document(body: dict[str, Any], more: list[str] | None = None) -> dict[str, Any]:
    """What is printed of a report, or of a failure: `error` stands beside a report that it has."""
    properties = {**_HEAD, **body["properties"], "error": {"$ref": "#/$defs/error"}}
    required = [*_HEAD, *body["required"], *(more or [])]
    return {**body, "properties": properties, "required": required}


def _object(kind: type[Any], defs: dict[str, Any]) -> dict[str, Any]:
    """A dataclass; those below it become definitions."""
    hints = get_type_hints(kind)
    properties = {each.name: _schema(hints[each.name], defs) for each in fields(kind)}
    for name in kind.figures if issubclass(kind, Report) else ():
        getter = getattr(kind, name).fget
        schema = _schema(get_type_hints(getter)["return"], defs)
        properties[name] = {**schema, "description": inspect.getdoc(getter)}
    said = (inspect.getdoc(kind) or "").partition("\n>>>")[0]
    return {
        "type": "object",
        "description": " ".join(said.split()),
        "properties": properties,
        "required": list(properties),
    }


def _schema(hint: Any, defs: dict[str, Any]) -> dict[str, Any]:
    origin, of = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if hint is float:
        return {"type": ["number", "null"]}  # inf and NaN, which JSON lacks
    if origin in (Union, types.UnionType):
        kinds = [_schema(each, defs) for each in of]
        names = [name for each in kinds for name in _names(each)]
        if all(set(each) == {"type"} for each in kinds):
            return {"type": list(dict.fromkeys(names))}
        return {"anyOf": kinds}
    if origin is tuple:
        return {"type": "array", "items": _schema(of[0], defs)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema(of[1], defs)}
    if hint is Report:
        return {"anyOf": [_schema(each, defs) for each in _STEPS]}
    if is_dataclass(hint):
        assert isinstance(hint, type)
        if hint.__name__ not in defs:
            defs[hint.__name__] = {}
            defs[hint.__name__] = _object(hint, defs)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    assert hint is object, hint
    return {}


def _names(schema: dict[str, Any]) -> list[str]:
    named = schema.get("type", [])
    return [named] if isinstance(named, str) else named


def as_file() -> str:
    """The file in the package."""
    return json.dumps(report_schema(), indent=1) + "\n"


if __name__ == "__main__" and "--write" in sys.argv:
    SCHEMA_FILE.write_text(as_file(), encoding="utf-8")
