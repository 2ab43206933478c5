from __future__ import annotations

import pytest

from edge_teacher.contract import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.Malformed, 400),
        (errors.NotAllowed, 403),
        (errors.NotFound, 404),
        (errors.Expired, 408),
        (errors.TooLarge, 413),
        (errors.Busy, 429),
        (errors.RuntimeFailed, 500),
        (errors.Draining, 503),
    ],
)
def test_every_code_comes_back_as_its_error(kind: type[errors.RpcError], code: int) -> None:
    error = errors.error_from_code(code, "why", 2.5)
    assert type(error) is kind
    assert (error.code, str(error), error.retry_after_s) == (code, "why", 2.5)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (418, errors.Malformed),
        (499, errors.Malformed),
        (502, errors.RuntimeFailed),
        (0, errors.RuntimeFailed),
        (-1, errors.RuntimeFailed),
    ],
)
def test_an_unknown_code_keeps_its_class(code: int, kind: type[errors.RpcError]) -> None:
    assert type(errors.error_from_code(code, "why")) is kind


def test_exit_codes_are_the_documented_ones() -> None:
    assert errors.UsageError.exit_code == 2
    assert errors.CheckFailed.exit_code == 1
    assert errors.Unreachable("gone").exit_code == 1
    assert all(
        issubclass(kind, errors.FedsaError)
        for kind in (errors.UsageError, errors.CheckFailed, errors.RpcError)
    )
