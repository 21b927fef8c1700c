"""How long to look: some fixed examples, the same every time, or new ones for as long as was asked for."""

import os
import time

import hypothesis
from hypothesis.internal.conjecture import engine

SECONDS = float(os.environ.get("NUMBA_ATTENTION_FUZZ_SECONDS", 0))

engine.MAX_SHRINKING_SECONDS = 20  # of five minutes: a few dozen numbers can be read as well as two
# Shrinks a failure, but does not look for the parts of it that matter, which takes minutes.
PHASES = [hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink]


def fuzz(examples):
    """Run a test on so many fixed examples, or with NUMBA_ATTENTION_FUZZ_SECONDS on new ones for that long."""

    def decorate(test):
        shared = {
            "deadline": None,
            "suppress_health_check": list(hypothesis.HealthCheck),
            "database": None,
            "phases": PHASES,
        }
        if not SECONDS:
            return hypothesis.settings(max_examples=examples, derandomize=True, **shared)(test)
        test = hypothesis.settings(max_examples=200, print_blob=False, derandomize=False, **shared)(test)

        def rounds():
            end, number = time.monotonic() + SECONDS, time.time_ns() % 2**32
            while time.monotonic() < end:
                print(f"seed {number}")
                hypothesis.seed(number)(test)()
                number += 1

        rounds.__name__ = test.__name__
        return rounds

    return decorate
