"""Settings: the fields, what they decide, and what cannot work."""

from importlib import import_module


def __getattr__(name: str):
    """`FederatedSketchConfig`, loaded when it is asked for: the other modules of this room need no TRL."""
    if name != "FederatedSketchConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".federation", __name__), name)
