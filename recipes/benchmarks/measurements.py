"""What every benchmark writes: its settings, its results, and what it ran with."""

import argparse
import json
import os
import platform
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fslora_hf.storage.files import make_folder, write_text


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def write_result(
    options: argparse.Namespace,
    results: Any,
    packages: Collection[str],
    *,
    hidden: Collection[str] = (),
    **more: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `options.output`, a JSON file, making its folder; returns what it holds.

    Args:
        options: of the command line; all but `output`, `worker` and those `hidden` become the settings, folders of
            a model or of rows as their names.
        packages: whose versions are noted, beside Python's.
        more: further parts of the file.
    """
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "worker", *hidden)}
    for name in settings.keys() & {"model", "rows"}:
        settings[name] = Path(settings[name]).name
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    result = {"settings": settings, "results": results, **more, "versions": versions}
    output = Path(options.output)
    make_folder(output.parent)
    write_text(output, json.dumps(result, indent=1) + "\n")
    print(f"Written: {output}")
    return result
