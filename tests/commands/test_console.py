"""Warnings of a command: those about numbers are shown on one line, the advice of libraries is not."""

from __future__ import annotations

import warnings

import numpy
import pytest

from globalopt.commands.console import errors


def test_a_numerical_warning_is_one_line_and_said_once(capsys):
    with errors():
        for _ in range(3):
            _ = numpy.float32(1e38) * numpy.array([1e38], dtype=numpy.float32)
            warnings.warn("The fit did\n not converge.", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == (
        "warning: overflow encountered in multiply\nwarning: The fit did not converge.\n"
    )


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, ResourceWarning])
def test_advice_to_programmers_is_not_shown(capsys, category):
    with errors():
        warnings.warn("call it in another way", category, stacklevel=1)
        warnings.warn_explicit("this tokenizer is slow", UserWarning, "x.py", 1, module="transformers.tokenization")
    assert capsys.readouterr().err == ""


def test_the_filters_of_the_process_come_back():
    before = warnings.filters[:]
    with errors():
        pass
    assert warnings.filters == before
