"""What judge and candidate say to each other: length (4 bytes), then JSON. Values of plain types only, by their names.

None, bool, str and float are themselves, everything else is [type, content]. What is read is rebuilt as exactly these
types, whatever the sender is: no value brings methods of its own, and none is longer than MESSAGE_BYTES.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

MESSAGE_BYTES = 1 << 20
_SEQUENCES: dict[str, type[Iterable[Any]]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MAKE: dict[str, Callable[[Iterable[Any]], Any]] = {**_SEQUENCES, "iterator": iter}


class UnsendableError(Exception):
    """A value that is no plain data."""


def send(descriptor: int, message: object) -> None:
    """Write one message. Raises UnsendableError for a value of another type, ValueError if it is too long."""
    body = json.dumps(encode(message)).encode()
    if len(body) > MESSAGE_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is longer than {MESSAGE_BYTES}")
    data = len(body).to_bytes(4, "little") + body
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Read one message. Raises EOFError if the other side has gone, ValueError if it is not one."""
    size = int.from_bytes(_exactly(descriptor, 4), "little")
    if size > MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes is longer than {MESSAGE_BYTES}")
    return decode(json.loads(_exactly(descriptor, size)))


def encode(value: object) -> object:
    """The JSON of a value; of a subclass's, that of the plain type."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int):
        return ["int", int.__format__(value, "x")]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, Decimal):
        return ["Decimal", Decimal.__str__(value)]
    if isinstance(value, Fraction):
        return ["Fraction", [encode(value.numerator), encode(value.denominator)]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(one)] for key, one in value.items()]]
    if isinstance(value, Iterator):
        return ["iterator", [encode(one) for one in value]]
    for name, type_ in _SEQUENCES.items():
        if isinstance(value, type_):
            return [name, [encode(one) for one in value]]
    raise UnsendableError(f"a value of type {type(value).__name__} cannot be sent to another process")


def decode(message: object) -> Any:
    """The value of some JSON. Raises ValueError for anything that `encode` does not make."""
    match message:
        case None | bool() | str() | float():
            return message
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["complex", [float(real), float(imaginary)]]:
            return complex(real, imaginary)
        case ["Decimal", str(digits)]:
            return Decimal(digits)
        case ["Fraction", [["int", str(numerator)], ["int", str(denominator)]]]:
            return Fraction(int(numerator, 16), int(denominator, 16))
        case ["dict", list(items)]:
            return dict(_pair(item) for item in items)
        case [str(name), list(items)] if name in _MAKE:
            return _MAKE[name]([decode(item) for item in items])
    raise ValueError("this is no value")


def _pair(item: object) -> tuple[Any, Any]:
    match item:
        case [key, value]:
            return decode(key), decode(value)
    raise ValueError("this is no pair of key and value")


def _exactly(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (piece := os.read(descriptor, size - len(data))):
            raise EOFError
        data += piece
    return bytes(data)
