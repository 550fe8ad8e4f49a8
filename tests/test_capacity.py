"""When to stop waiting for spot machines, solved by hand with a clock of its own."""

import pytest

from bgray.capacity import Demand, Patience, machines
from bgray.resources import Group

GROUPS = {
    "cpu_worker": Group({"CPU": 16, "cpu_worker": 1}, 8),
    "gpu_worker": Group({"CPU": 8, "GPU": 1, "gpu_worker": 1, "memory": 2e10}, 4),
    "gpu_worker_ondemand": Group({"CPU": 8, "GPU": 1, "gpu_worker_ondemand": 1}, 3),
    "gpu_worker_8x": Group({"CPU": 96, "GPU": 8, "gpu_worker_8x": 1, "memory": 1e9}, 2),
    "gpu_worker_8x_ondemand": Group({"CPU": 96, "GPU": 8, "gpu_worker_8x_ondemand": 1}, 2),
}
GPU = {"CPU": 4.0, "GPU": 1.0}
REFUSED = {"gpu_worker": "InsufficientInstanceCapacity"}


@pytest.mark.parametrize(
    ("bundles", "expected"),
    [
        ([GPU], {"gpu_worker": 1}),
        ([GPU] * 3, {"gpu_worker": 3}),
        ([{"CPU": 1, "GPU": 0.5}] * 3, {"gpu_worker": 2}),  # two share a GPU, one has its own
        ([{"GPU": 8}], {"gpu_worker_8x": 1}),
        ([{"GPU": 8}, {"GPU": 1}], {"gpu_worker_8x": 1, "gpu_worker": 1}),
        ([{"CPU": 9, "GPU": 1}], {"gpu_worker_8x": 1}),  # more CPUs than the small one has
        ([{"CPU": 1, "cpu_worker": 0.001}], {}),  # has no on-demand twin
        ([{"CPU": 1}] * 20, {}),  # goes to a CPU machine, not to a GPU one that has a twin
        ([{"GPU": 16}], {}),  # nothing holds that
        ([], {}),
    ],
)
def test_each_bundle_goes_to_the_smallest_type_that_holds_it(bundles, expected):
    assert machines(tuple(bundles), GROUPS) == expected


def test_on_demand_is_asked_for_once_spot_has_stayed_away_for_the_time_stated():
    patience = Patience(120, GROUPS)
    waiting = Demand((GPU, GPU), refused=REFUSED)
    assert patience.wanted(waiting, 0) == {}
    assert patience.wanted(waiting, 119) == {}
    assert patience.wanted(waiting, 120) == {"gpu_worker": 2}


def test_a_second_machine_is_bought_when_the_first_one_is_busy():
    patience = Patience(120, GROUPS)
    waiting = Demand((GPU,), refused=REFUSED)
    patience.wanted(waiting, 0)
    assert patience.wanted(waiting, 120) == {"gpu_worker": 1}
    joined = Demand((GPU,), {"gpu_worker_ondemand": 1}, refused=REFUSED)
    assert patience.wanted(joined, 125) == {}  # it takes what waits in a moment
    assert patience.wanted(Demand((), {"gpu_worker_ondemand": 1}), 130) == {}
    assert patience.wanted(joined, 135) == {}  # something else waits now
    assert patience.wanted(joined, 255) == {"gpu_worker": 2}  # beside the one that is there


def test_no_more_are_asked_for_than_the_cluster_allows():
    patience = Patience(0, GROUPS)
    assert patience.wanted(Demand((GPU,) * 9, refused=REFUSED), 0) == {"gpu_worker": 3}


def test_a_machine_that_is_being_set_up_is_waited_for():
    patience = Patience(120, GROUPS)
    coming = Demand((GPU,), coming=frozenset({"gpu_worker"}))
    for now in range(0, 600, 60):
        assert patience.wanted(coming, now) == {}
    gone = Demand((GPU,), refused=REFUSED)  # it died on the way
    assert patience.wanted(gone, 600) == {}
    assert patience.wanted(gone, 600 + 120) == {"gpu_worker": 1}


def test_a_machine_that_is_set_up_for_ever_is_given_up():
    patience = Patience(120, GROUPS)
    coming = Demand((GPU,), coming=frozenset({"gpu_worker"}))
    found = {now: patience.wanted(coming, now) for now in range(0, 1200, 60)}
    assert [now for now, wanted in found.items() if wanted][0] == 840 + 120


def test_the_clock_begins_anew_once_nothing_has_waited():
    patience = Patience(120, GROUPS)
    patience.wanted(Demand((GPU,), refused=REFUSED), 0)
    patience.wanted(Demand(), 100)
    assert patience.wanted(Demand((GPU,), refused=REFUSED), 130) == {}
    assert patience.wanted(Demand((GPU,), refused=REFUSED), 250) == {"gpu_worker": 1}


def test_what_waits_its_turn_beside_working_spot_machines_is_not_bought_on_demand():
    patience = Patience(0, GROUPS)
    assert patience.wanted(Demand((GPU,), there={"gpu_worker": 1}), 0) == {}
    # ... nor where the cluster has all the spot machines it may have
    assert patience.wanted(Demand((GPU,), {"gpu_worker": 4}, refused=REFUSED), 0) == {}
    # ... nor beside one that was bought on demand
    assert patience.wanted(Demand((GPU,), there={"gpu_worker_ondemand": 1}), 0) == {}
    # but with one there and a second one refused, it is
    some = Demand((GPU,), {"gpu_worker": 1}, refused=REFUSED)
    assert patience.wanted(some, 0) == {"gpu_worker": 1}
