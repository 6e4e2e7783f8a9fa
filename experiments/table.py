"""The experiments, in the order in which `make paper` runs them: a file with `EXPERIMENT` each."""

from importlib import import_module

from experiments.experiment import Experiment

__all__ = ["NAMES", "experiment"]

NAMES = (
    "knn_table4", "knn_figure4", "knn_figure5", "knn_figure2", "knn_table1", "knn_figure7", "knn_precision",
    "knn_inner_product", "knn_probes", "knn_examples", "knn_table5", "knn_figure8", "knn_table2", "knn_table3",
    "knn_cost",
    "knn_introduction", "knn_figure1", "mem_table1", "mem_table3", "mem_table6", "mem_table7",
    "mem_table8", "mem_table9", "mem_table19", "mem_figure4",
)  # fmt: skip


def experiment(name: str) -> Experiment:
    """Raises SystemExit for a name that is none of NAMES."""
    if name not in NAMES:
        raise SystemExit(f"no experiment {name!r}: there are {', '.join(NAMES)}")
    found: Experiment = import_module(f"experiments.{name}").EXPERIMENT
    return found
