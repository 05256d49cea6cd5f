import pytest

from reports import formats


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.424, "0.42 s"), (9.996, "10.0 s"), (59.97, "1 min 00 s"), (125, "2 min 05 s"), (3599.7, "1 h 00 min")],
)
def test_a_duration_never_shows_sixty(seconds: float, text: str) -> None:
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(("n", "text"), [(940, "940"), (65536, "65.5k"), (999_960, "1.00M"), (8 * 10**9, "8.00G")])
def test_compact_keeps_three_digits(n: int, text: str) -> None:
    assert formats.compact(n) == text


def test_all_but_one_is_not_a_hundred_percent() -> None:
    assert formats.percent(10**7 - 1, 10**7) == "99.99 %"
    assert formats.percent(10**7, 10**7) == "100.00 %"


def test_a_column_has_one_number_of_decimals_and_exact_zeros() -> None:
    assert formats.aligned([0.0123, 0.00004, 0.0]) == ["0.01230", "0.00004", "0"]
    assert formats.aligned([2.5e-6, 1e-9]) == ["2.50e-06", "1.00e-09"]
    assert formats.aligned([12345.6, 7.0]) == ["12346", "7"]


def test_a_measured_value_stops_at_its_standard_error() -> None:
    assert formats.measured(67.9012, 0.881) == "67.9 ±0.9"
    assert formats.measured(0.058913, 0.0012, "+-") == "0.0589 +-0.0012"
    assert formats.measured(67.9012, 0.00881) == "67.901 ±0.009"
    assert formats.measured(0.0, 0.0012) == "0.000 ±0.001"
    assert formats.measured(0.058913, None) == "0.0589"
    assert formats.measured(float("inf"), 1.0) == "inf"


@pytest.mark.parametrize(
    ("predicted", "bound", "text"),
    [
        (1.0, None, "no certificate"),
        (1.0, 1.0, "the optimum of the surrogate, proved"),
        (0.0, 0.0, "the optimum of the surrogate, proved"),
        (1.0, 0.0, "no certificate (the proved bound is 0)"),
        (1.0012, 1.0, "within 0.12 % of the optimum of the surrogate (bound 1.00)"),
        # Relative to the optimum, not to the prediction, and rounded up.
        (3.0, 2.0, "within 50 % of the optimum of the surrogate (bound 2.00)"),
        (1.01231, 1.0, "within 1.3 % of the optimum of the surrogate (bound 1.00)"),
    ],
)
def test_a_certificate_claims_no_more_than_is_proved(predicted: float, bound: float | None, text: str) -> None:
    assert formats.certificate(predicted, bound) == text


def test_a_share_has_two_digits_and_names_what_is_too_small() -> None:
    fractions = (0.0, 3e-9, 0.0042, 0.123, 1.0)
    assert [formats.share(f) for f in fractions] == ["0 %", "under 0.001 %", "0.42 %", "12 %", "100 %"]


def test_a_range_that_looks_like_one_figure_is_one() -> None:
    assert formats.between(1.91, 2.34) == "1.9 to 2.3"
    assert formats.between(3.58, 3.62) == "3.6"
