from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

from allocators import ALLOCATORS, get_allocator
from globalopt.errors import UnknownNameError, UsageError
from globalopt.registry import READERS, at_least, below_one, build, read_options, variant


@dataclass(frozen=True)
class Method:
    """Do something.

    Args:
        steps: how often.

    >>> Method()
    """

    steps: int = 3
    damping: float = 0.5
    exact: bool = True
    order: str = "up"

    name: ClassVar[str] = "method"

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)


TABLE = {"method": Method}


def test_texts_become_the_types_of_their_fields():
    made = build("method", TABLE, "method", {"steps": "7", "damping": "1e-3", "exact": "No", "order": "down"})
    assert made == Method(7, 1e-3, False, "down")
    assert [type(value) for value in vars(made).values()] == [int, float, bool, str]


def test_defaults_stay():
    assert build("method", TABLE, "method") == build("method", TABLE, "method", {}) == Method()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("ON", True), ("1", True), ("off", False), ("0", False)])
def test_switches(text, value):
    assert read_options(Method, "it", {"exact": text}) == {"exact": value}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "3.5"}, "Option steps of thing 'method' must be a whole number; got '3.5'"),
        ({"damping": "much"}, "Option damping of thing 'method' must be a number; got 'much'"),
        ({"exact": "maybe"}, "Option exact of thing 'method' must be true or false; got 'maybe'"),
        ({"steps": "0"}, "Option steps must be finite and at least 1; got 0"),
    ],
)
def test_bad_values_say_what_was_expected(options, message):
    with pytest.raises(UsageError, match=message):
        build("thing", TABLE, "method", options)


def test_unknown_names_come_with_the_closest_known():
    with pytest.raises(UnknownNameError, match="No thing 'methd'; did you mean 'method'"):
        build("thing", TABLE, "methd")
    with pytest.raises(UnknownNameError, match="No option of thing 'method' 'stesp'; did you mean 'steps'"):
        build("thing", TABLE, "method", {"stesp": "1"})
    with pytest.raises(UnknownNameError, match="'name'"):
        build("thing", TABLE, "method", {"name": "other"})


@pytest.mark.parametrize("value", [0.9, float("nan"), float("inf"), -float("inf")])
def test_at_least(value):
    at_least(1, steps=1, most=1e9)
    with pytest.raises(UsageError, match="most"):
        at_least(1, steps=2, most=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_below_one(value):
    below_one(momentum=0, share=0.99)
    with pytest.raises(UsageError, match="share must be at least 0 and below 1"):
        below_one(momentum=0.5, share=value)


def test_a_variant_is_the_method_with_other_defaults():
    changed = variant(Method, "Changed", "Do it differently.", name="changed", damping=0.1, order="down")
    assert (changed.name, Method.name) == ("changed", "method")
    assert changed() == changed(3, 0.1, True, "down")
    assert issubclass(changed, Method)
    assert [field.name for field in fields(changed)] == [field.name for field in fields(Method)]
    assert build("method", {"changed": changed}, "changed", {"steps": "5"}) == changed(5, 0.1, True, "down")
    # Its values are checked as those of the method are, and its options explained.
    with pytest.raises(UsageError, match="steps"):
        changed(steps=0)
    assert changed.__doc__ == "Do it differently.\n\nArgs:\n    steps: how often."


def test_a_variant_changes_only_what_is_there():
    with pytest.raises(TypeError, match="no stesp of Method"):
        variant(Method, "Changed", "Do it differently.", stesp=5)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_can_be_made_by_name(name):
    assert get_allocator(name).name == name


def test_every_kind_of_field_has_a_reader():
    assert set(READERS) == {bool, int, float, str}
