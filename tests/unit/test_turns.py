"""The order in which VMs can go."""

import random

import pytest
from qubes_storage.turns import turns


@pytest.mark.parametrize(
    ("names", "users", "order"),
    [
        ("abc", {}, "abc"),
        ("abc", {"a": "b", "b": "c"}, "cba"),
        ("abc", {"a": "ax"}, "abc"),
        ("abcd", {"a": "b", "b": "a", "c": "d"}, "dcab"),
    ],
)
def test_those_that_use_others_go_first_and_a_circle_last(names, users, order):
    assert turns([*names], {name: [*users[name]] for name in users}) == [*order]


def test_nothing_goes_before_who_uses_it():
    choose = random.Random(8)
    names = [str(number) for number in range(200)]
    users = {name: choose.sample(names[n + 1 :], min(3, 199 - n)) for n, name in enumerate(names)}
    mixed = choose.sample(names, 200)
    order = {name: place for place, name in enumerate(turns(mixed, users))}
    assert sorted(order) == sorted(names)
    assert all(order[user] < order[name] for name in names for user in users[name])
