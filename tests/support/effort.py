"""How often a test repeats an attack: as often as it can be asked to, except in CI."""

import os


def repetitions(*, full: int, ci: int) -> int:
    """Return `ci` where the environment has `CI=true`, and `full` everywhere else."""
    return ci if os.environ.get("CI") == "true" else full
