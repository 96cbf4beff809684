"""Recipes of SCFM that several studies train, and the budgets at which they do."""

from experiments.budgets import PAIR_STEPS

# two grids of changes of the paper's recipe: on the plane, and what differs on the tiny Flux, which samples
# at shift 3
DAMPED = {"ema_target_scale": 0.5, "teacher_ratio": 0.2}
SCFM = {
    "SCFM, Algorithm 2": {},
    "SCFM, Algorithm 1": {"algorithm": "one_ema"},
    "SCFM, self grid 2": {"self_grids": (2,)},
    "SCFM, damped": DAMPED,
    "SCFM, tuned": {
        "ema_target_scale": 0.5,
        "teacher_ratio": 0.1,
        "self_grids": (4, 8, 16),
        "shift": (1.0, 3.0),
    },
}  # by the study `variants`
SCFM_ON_FLUX = {"SCFM, Algorithm 2": {}, "SCFM, damped": {}, "SCFM, tuned": {"shift": (2.0, 6.0)}}

SMALL, SMALL_FLUX = 10_000 * PAIR_STEPS, 750 * PAIR_STEPS
# name -> (network evaluations on the plane, on the tiny Flux)
BUDGETS = {
    "small": (SMALL, SMALL_FLUX),
    "medium": (3 * SMALL, 3 * SMALL_FLUX),
    "large": (10 * SMALL, 6 * SMALL_FLUX),
}
SMOKE_BUDGETS = {"small": (500, 80), "medium": (600, 0), "large": (700, 0)}  # 0: nothing is trained there


def short_decay(steps: int) -> float:
    """Of the EMA of a student whose scale is the step size: its memory grows with the root of the training, 5
    steps of 200, 10 of 800.
    """
    return 1 - 1 / max(1.0, 0.36 * steps**0.5)
