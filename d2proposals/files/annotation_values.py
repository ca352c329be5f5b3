"""The values of annotations and images as they should be, whatever type a file has for them."""

from typing import Any

# Coordinates beyond this are no pixels; their products stay within 32-bit floats.
_LARGEST = 1e15
_TRUE = ("1", "true", "yes")


def read_number(value: Any) -> float | int | None:
    """A number, also out of text ("12.5"); None for anything else."""
    if type(value) in (int, float):
        return value
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy's
        value = value.item()
        return value if type(value) in (int, float) else None
    return None


def read_whole(value: Any) -> int | None:
    """A whole number, also out of 12.0, "12" and "12.0"; None for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, str):
        try:
            return int(value)  # of any length
        except ValueError:
            pass
    number = read_number(value)
    if number is None or not is_finite(number) or number != int(number):
        return None
    return int(number)


def read_flag(value: Any) -> int:
    """0 or 1; text is 1 if it says so."""
    if isinstance(value, str):
        number = read_number(value)
        return int(value.strip().lower() in _TRUE or bool(number))
    try:
        return int(bool(value))
    except (TypeError, ValueError):  # an array of several
        return 0


def is_flag(value: Any) -> bool:
    """Whether a value is one that :func:`read_flag` need not interpret."""
    return value is None or not isinstance(value, (str, list, tuple, dict))


def read_id(value: Any) -> int | str | None:
    """An image's id: an integer or text; a float that is whole is an integer; None without one."""
    return value if isinstance(value, str) else read_whole(value)


def is_finite(value: float) -> bool:
    """Whether a number is neither NaN, nor infinite, nor too large for a number of pixels."""
    # A comparison, because an integer may be too large for any float.
    return -_LARGEST <= value <= _LARGEST


def read_side(value: Any) -> int | None:
    """The height or width of an image, in pixels; None if it is no positive whole number."""
    side = read_whole(value)
    return side if side is not None and 0 < side < 2**31 else None
