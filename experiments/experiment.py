"""One experiment, as its file declares it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.lab import Lab, Learner, Sight
from experiments.memories import Memory
from experiments.records import Findings
from experiments.scale import Scale
from experiments.texts import Texts

__all__ = ["KNN_LM", "MEMORY_DECODER", "Experiment", "Need"]

KNN_LM = "Khandelwal et al. 2020 (arXiv 1911.00172)"
MEMORY_DECODER = "Cao et al. 2025 (arXiv 2508.09874)"

Need = Sight | Learner | Memory


@dataclass(frozen=True)
class Experiment:
    """title: what it is about. paper: where it stands there. needs: what it asks the lab for, which is made before it,
    and what a plan is reckoned from. run: mixes it. about: the docstring of its file: what the paper found, and what
    must hold here. made: seconds of its own work beyond mixing, at a scale; 0 mostly. quotes: whether its tables hold
    passages of the text, which not everybody may publish."""

    title: str
    paper: str
    about: str
    needs: Callable[[Texts, Scale], Sequence[Need]]
    run: Callable[[Lab], Findings]
    made: Callable[[Scale], float] = lambda _scale: 0.0
    quotes: bool = False
