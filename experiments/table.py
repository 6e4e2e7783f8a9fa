"""The experiments, in the order in which `make paper` runs them: a file with `EXPERIMENT` each."""

from importlib import import_module

from experiments.experiment import Experiment

__all__ = ["NAMES", "experiment"]

NAMES = (
    "knn_table4",
)  # fmt: skip


def experiment(name: str) -> Experiment:
    """Raises SystemExit for a name that is none of NAMES."""
    if name not in NAMES:
        raise SystemExit(f"no experiment {name!r}: there are {', '.join(NAMES)}")
    found: Experiment = import_module(f"experiments.{name}").EXPERIMENT
    return found
