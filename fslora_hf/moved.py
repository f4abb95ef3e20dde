"""Names that modules had before they lay in rooms, which scripts and notebooks may still import."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# What the README and the docs ever named, and what recipes and benchmarks import whole. What lay inside a round is in
# several modules now, and has no old name.
MOVED = {
    "adapter": "models.adapter",
    "callbacks": "trainers.callbacks",
    "checkpoint": "storage.checkpoint",
    "clients": "data.clients",
    "evaluation.entries": "reports.entries",
    "evaluation.leaderboard": "reports.leaderboard",
    "evaluation.page": "reports.leaderboard_page",
    "evaluation.report": "reports.accuracy",
    "evaluation.tables": "reports.leaderboard_tables",
    "folding": "models.folding",
    "host_memory": "common.host_memory",
    "layout": "rounds.layout",
    "ledger": "storage.ledger",
    "partition": "data.partition",
    "plan": "rounds.plan",
    "processes": "common.processes",
    "recipe": "config.recipe",
    "report": "reports.ledger",
    "scoring": "evaluation.scoring",
    "server": "rounds.server",
    "settings": "common.settings",
    "sketch": "methods.sketch",
    "subjects": "evaluation.subjects",
    "trainer": "trainers.sft",
}


class _Finder(MetaPathFinder, Loader):
    """Finds a module by its old name: the same module object, not a second one."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__package__}.{MOVED[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # the import machinery has just put the old name's there


def find_moved() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
