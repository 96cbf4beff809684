"""The settings that the study `ablations` changes, and the values that it tries: family -> label ->
change."""

from collections.abc import Iterable

from experiments.testbeds.plane import PlaneSizes
from scfm.method.ema import shorten

DECAYS = (0.95, 0.99, 0.999, 0.9995)
ONE_EMA = {"algorithm": "one_ema"}
Changes = dict[str, dict]  # label -> change


def jumps(steps: int) -> Changes:
    """label -> change: examples that jump more steps of their grid cost a forward for each, so there are
    fewer training steps.
    """
    fewer = {n: {"max_train_steps": max(1, steps * 5 // (3 + n))} if n > 2 else {} for n in (2, 4, 8)}
    return {f"{n}": {"t_skip": n, **change} for n, change in fewer.items()}


def each(setting: str, values: Iterable[float]) -> Changes:
    """label -> change: one setting at each of its values."""
    return {f"{value:g}": {setting: value} for value in values}


def shifts(ranges: Iterable[tuple[float, float]]) -> Changes:
    return {f"{low:g} to {high:g}": {"shift": (low, high)} for low, high in ranges}


def decays_of_one_ema() -> Changes:
    return {label: ONE_EMA | change for label, change in each("ema_decay_slow", DECAYS).items()}


def averages(steps: int) -> Changes:
    parts, stalled = [steps // 8, steps // 4, steps // 2], {"restart_when_stalled": True}
    return {
        "dual": {},
        **{f"dual, restart {n}": {"restart_every": n} for n in parts},
        "dual, when stalled": stalled,
        "one EMA": ONE_EMA,
        **{f"one EMA, restart {n}": ONE_EMA | {"restart_every": n} for n in parts},
        "one EMA, when stalled": ONE_EMA | stalled,
        "dual pure": {"algorithm": "dual_pure"},
        "dual, shortened": {"ema_decay_fast": shorten(0.99, steps), "ema_decay_slow": shorten(0.999, steps)},
    }


def families(steps: int) -> dict[str, Changes]:
    """family -> label -> change of the default, for the plane. steps: of training."""
    ranks = {f"{rank}": {"rank": rank, "learning_rate": 1e-3} for rank in (1, 4, 16, 64)}
    return {
        "k/N": each("teacher_ratio", (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)),
        "averages": averages(steps),
        "decay of one EMA": decays_of_one_ema(),
        "EMA scale": each("ema_target_scale", (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)),
        "learning rate": each("learning_rate", (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
        "shift": shifts(((0.5, 1.0), (1.0, 1.0), (1.0, 2.0), (1.0, 3.0), (2.5, 4.5))),
        "t_skip": jumps(steps),
        "loss": {name: {"loss": name} for name in ("mse", "huber", "cosine")},
        "rank": ranks | {"all weights": {}, "all weights, 1e-3": {"learning_rate": 1e-3}},
        "read-out": {name: {"read_out": name} for name in ("student", "ema_fast", "ema_slow")},
        "seed": {f"{seed}": {"seed": seed} for seed in range(3)},
    }


# what may stand on an axis of the grid of two settings
COARSE: dict[str, Changes] = {
    "k/N": each("teacher_ratio", (0.1, 0.2, 0.4, 0.8)),
    "EMA scale": each("ema_target_scale", (0.25, 0.5, 0.75, 1.0)),
    "learning rate": each("learning_rate", (1e-4, 3e-4, 1e-3, 3e-3)),
    "shift": shifts(((1.0, 1.0), (1.0, 2.0), (1.0, 3.0), (2.5, 4.5))),
    "t_skip": jumps(PlaneSizes().updates),
    "decay of one EMA": decays_of_one_ema(),
}


def flux_families(steps: int) -> dict[str, Changes]:
    """The same for the tiny Flux."""
    restart = 3 * steps // 10
    return {
        "k/N": each("teacher_ratio", (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        "averages": {
            "dual": {},
            f"dual, restart {restart}": {"restart_every": max(1, restart)},
            "one EMA": ONE_EMA,
            "dual, not shortened": {"ema_decay_fast": 0.99, "ema_decay_slow": 0.999},
        },
        "rank": {f"{rank}": {"rank": rank} for rank in (4, 16, 48)},
        "learning rate": each("learning_rate", (3e-4, 1e-3, 3e-3)),
        "EMA scale": each("ema_target_scale", (0.5, 1.0)),
    }
