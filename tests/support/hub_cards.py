"""The test Hub's check of a card's metadata, which the client asks for before it uploads a README.md."""

import re
from typing import TYPE_CHECKING, Any

import yaml

from tests.support.hub_messages import Answer, Request

if TYPE_CHECKING:
    from tests.support.hub_server import HubServer


def validate_yaml(hub: "HubServer", request: Request) -> Answer:
    """Errors and warnings about the metadata of a card; a 400 if there are errors."""
    asked = request.json()
    block = re.match(r"---\r?\n(.*?)\r?\n?---(?:\r?\n|$)", asked["content"], re.DOTALL)
    if block is None:
        return Answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    try:
        errors = list(_errors(yaml.safe_load(block[1]) or {}))
    except yaml.YAMLError as error:
        errors = [f"the metadata is no YAML: {error}"]
    return Answer({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)


def _errors(metadata: Any):
    """A sentence for each thing of a wrong kind."""
    if not isinstance(metadata, dict):
        yield "the metadata must be an object"
        return
    for key in ("library_name", "pipeline_tag", "license", "license_name"):
        if not isinstance(metadata.get(key, ""), str):
            yield f'"{key}" must be a string'
    for key in ("base_model", "tags", "datasets", "metrics", "language"):
        value = metadata.get(key, [])
        if not isinstance(value, str) and not _is_list_of(str, value):
            yield f'"{key}" must be a string or a list of strings'
    if not _is_list_of(dict, metadata.get("model-index", [])):
        yield '"model-index" must be an array'
        return
    for m, model in enumerate(metadata.get("model-index", [])):
        yield from _model_errors(f"model-index[{m}]", model)


def _model_errors(at: str, model: dict):
    if not isinstance(model.get("name"), str):
        yield f'"{at}.name" is required'
    if not _is_list_of(dict, model.get("results")):
        yield f'"{at}.results" must be an array'
        return
    for r, result in enumerate(model["results"]):
        here = f"{at}.results[{r}]"
        for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
            for key in keys:
                if not isinstance((result.get(part) or {}).get(key), str):
                    yield f'"{here}.{part}.{key}" is required'
        if not _is_list_of(dict, result.get("metrics")):
            yield f'"{here}.metrics" must be an array'
            continue
        for n, metric in enumerate(result["metrics"]):
            for key in ("type", "value"):
                if metric.get(key) is None:
                    yield f'"{here}.metrics[{n}].{key}" is required'


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
