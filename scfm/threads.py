"""How torch's threads wait for each other. Has to run before torch is imported."""

import os

SPINS = "20000"
KNOWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def bound_spinning() -> None:
    """Lets OpenMP's threads spin only briefly at a barrier, unless the user has chosen a policy.

    By default they spin for long, and take the processor from the thread that they wait for as soon as
    anything else runs on the machine. What it costs and gains is measured by `benchmarks/openmp_policy.py`.
    """
    if not any(name in os.environ for name in KNOWN):
        os.environ["GOMP_SPINCOUNT"] = SPINS
