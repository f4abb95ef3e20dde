"""A parser of command lines that may hold a token."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .masking import is_secret_name, scrub_quoted


class TokenParser(argparse.ArgumentParser):
    """argparse's, whose errors repeat neither a token nor the words beside a misspelt option for one."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else args
        self._has_token = any(is_secret_name(word.split("=")[0]) for word in words if word.startswith("--"))
        return super().parse_args(args, namespace)

    def error(self, message: str):
        if self._has_token and message.startswith("unrecognized arguments"):
            message = "unrecognized arguments, which are not repeated beside a token"
        super().error(scrub_quoted(message))
