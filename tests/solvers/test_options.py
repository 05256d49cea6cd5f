from __future__ import annotations

from dataclasses import fields, replace

import pytest

from globalopt.errors import UnknownNameError, UsageError
from globalopt.protocols import Outputs
from solvers import SOLVERS, get_solver
from solvers.oats import OATS
from solvers.three_basil import ThreeBASiL


def test_options_are_read_by_annotation():
    assert get_solver("3basil", {"damping": "0.02", "steps": "300"}) == ThreeBASiL(damping=0.02, steps=300)
    assert get_solver("oats", {"per_row": "false"}) == OATS(per_row=False)


@pytest.mark.parametrize("name", SOLVERS)
def test_table_names_are_the_solvers_names(name):
    assert SOLVERS[name].name == get_solver(name).name == name


def test_unknown_names_come_with_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean '3basil'"):
        get_solver("3basel")
    with pytest.raises(UnknownNameError, match=r"option of solver '3basil' 'dampin'; did you mean 'damping'"):
        get_solver("3basil", {"dampin": "1"})


@pytest.mark.parametrize(
    ("name", "option", "text"),
    [
        ("3basil", "steps", "3.5"),
        ("3basil", "steps", "-1"),
        ("3basil", "preset", "slow"),
        ("3basil", "outputs", "columns"),
        ("oats", "outputs", "full"),
        ("3basil", "damping", "-1"),
        ("3basil", "damping", "nan"),
        ("hassle-free", "tolerance", "inf"),
        ("sparsegpt", "column_block", "0"),
        ("oats", "per_row", "maybe"),
        ("oats", "steps", ""),
    ],
)
def test_bad_values_name_the_option(name, option, text):
    with pytest.raises(UsageError, match=option):
        get_solver(name, {option: text})


def test_a_variant_has_the_options_of_its_solver():
    alps = get_solver("alps", {"preset": "fast"})
    assert isinstance(alps, ThreeBASiL)
    assert replace(alps, outputs=Outputs.FULL).outputs is Outputs.FULL
    assert [field.name for field in fields(alps)] == [field.name for field in fields(ThreeBASiL)]
    with pytest.raises(UnknownNameError, match="option of solver 'alps' 'dampin'"):
        get_solver("alps", {"dampin": "1"})


def test_class_attributes_are_no_options():
    with pytest.raises(UnknownNameError):
        get_solver("3basil", {"low_rank": "false"})
