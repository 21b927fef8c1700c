"""The gate for slowdowns, on a clock that only calls move: nobody's speed is asserted."""

import pytest
from benchmarks import gate


class _Clock:
    """Nanoseconds that go by when a call says so."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def work(self, duration):
        def call():
            self.now += duration

        return call


@pytest.mark.parametrize(("duration", "yardstick"), [(30_000, 10_000), (700, 40_000), (2_000_000, 1_000)])
def test_a_ratio_is_that_of_the_durations(duration, yardstick):
    clock = _Clock()
    assert gate.ratio(clock.work(duration), clock.work(yardstick), rounds=5, clock=clock) == duration / yardstick


def test_turns_that_were_disturbed_do_not_count():
    clock = _Clock()
    calls = 0

    def disturbed():
        nonlocal calls
        calls += 1
        clock.now += 100_000 if calls % 60 < 45 else 900_000

    assert gate.ratio(disturbed, clock.work(50_000), rounds=60, clock=clock) == pytest.approx(2)


def test_a_planted_slowdown_is_an_alarm_and_nothing_is_none():
    clock = _Clock()
    call, yardstick = clock.work(30_000), clock.work(10_000)
    before = gate.ratio(call, yardstick, rounds=5, clock=clock)
    after = gate.ratio(gate.slower(call), yardstick, rounds=5, clock=clock)
    assert after == pytest.approx(1.2 * before)
    assert gate.is_slower(before, after)
    assert not gate.is_slower(before, before)
    assert not gate.is_slower(after, before), "faster"


def test_the_median_is_taken_of_each_figure():
    found = [{"forward": x, "call": y} for x, y in ((1.0, 9.0), (5.0, 8.0), (2.0, 7.0))]
    assert gate.median_of(found) == {"forward": 2.0, "call": 8.0}


def test_asv_gets_every_figure():
    tracked = {name.removeprefix("track_") for name in dir(gate.Gate) if name.startswith("track_")}
    assert tracked == set(gate.UNITS) == set(gate.works())
    figures = {name: float(n) for n, name in enumerate(gate.UNITS)}
    for name, figure in figures.items():
        track = getattr(gate.Gate(), f"track_{name}")
        assert track(figures) == figure
        assert track.unit == gate.UNITS[name]
