"""How many training steps a budget of network evaluations buys a method, and what it then really spends."""

from collections.abc import Sequence

from scfm.method.baselines import network_evaluations, train_steps_for

PAIR_STEPS = 32  # of the teacher, for a pair of Reflow
STAGES = (16, 8, 4, 2, 1)  # of progressive distillation: steps of the student


def search_cost(noises: int, steps: Sequence[int], scales: Sequence[float], goal_steps: int) -> int:
    """Evaluations that it takes to find a scale for each number of steps on so many noises."""
    return noises * (sum(steps) * len(scales) + goal_steps)


def plan(method: str, budget: int, batch: int, search: int = 0, lora: bool = False) -> tuple[int, int]:
    """(training steps, pairs) that a budget of evaluations buys.

    Reflow spends half of it on pairs, SCFM `search` of it on its scales. ValueError where it buys no step.
    """
    if method == "reflow":
        pairs = budget // 2 // PAIR_STEPS
        return train_steps_for(method, budget, batch, pairs=pairs, pair_steps=PAIR_STEPS, lora=lora), pairs
    return train_steps_for(method, budget - (search if method == "scfm" else 0), batch, lora=lora), 0


def spent(method: str, budget: int, batch: int, search: int = 0, lora: bool = False) -> int:
    """The evaluations that a run with this budget really takes."""
    steps, pairs = plan(method, budget, batch, search, lora)
    if method == "progressive":
        steps = len(STAGES) * (steps // len(STAGES))
    search = search if method == "scfm" else 0
    return network_evaluations(method, steps * batch, pairs, PAIR_STEPS, lora) + search
