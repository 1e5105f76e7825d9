"""How many parts a control message has, counted on its bytes before protobuf makes an object of each; knows no meaning.

Two bytes on the wire can ask for an object of 500 in memory: an empty element of a repeated field. So the elements are
counted first, at a microsecond each, and a message with too many is refused before anything is allocated for them.
"""

from __future__ import annotations

import functools

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from swarm_core.wire.errors import BadFrame

# The largest honest ones: a report with 20,000 rows of the ledger, a vote of 100 stages with 200 numbers each. So many
# of the most expensive element, a stage's vote, are 40 MB.
MOST_PARTS = 1 << 16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10


class _Unreadable(Exception):
    """The bytes are no message, or ask for too much; says why."""


def check_parts(data: bytes, descriptor: Descriptor) -> None:
    """Raises BadFrame for more than MOST_PARTS elements of repeated fields and maps, at all depths together, and for
    bytes that are no message. Packed numbers count nothing: they take no more room than they have bytes."""
    try:
        _count(data, 0, len(data), descriptor, 0)
    except _Unreadable as error:
        raise BadFrame(
            f"a {descriptor.name} message does not parse ({error}); the peer runs another version?"
        ) from None


@functools.cache
def _elements(descriptor: Descriptor) -> dict[int, tuple[bool, Descriptor | None]]:
    """By tag, of fields worth a look: whether each is a part, and what to look into for more."""
    found: dict[int, tuple[bool, Descriptor | None]] = {}
    for field in descriptor.fields:
        child = field.message_type
        inner = child if child is not None and _elements(child) else None
        for wire in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            packed = wire == _BYTES and child is None and field.type != FieldDescriptor.TYPE_STRING
            part = field.is_repeated and not packed
            if part or inner:
                found[field.number << 3 | wire] = part, inner if wire == _BYTES else None
    return found


def _count(data: bytes, at: int, end: int, descriptor: Descriptor, parts: int) -> int:
    elements = _elements(descriptor)
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        if wire == _BYTES:
            size, at = _varint(data, at, end)
        elif wire == _VARINT:
            size, (_, at) = 0, _varint(data, at, end)
        elif (size := _SIZES.get(wire, 0)) == 0:
            raise _Unreadable("it has a group, as no message of ours")
        if size > end - at:
            raise _Unreadable("it ends inside a field")
        if tag in elements:
            part, inner = elements[tag]
            parts += part
            if parts > MOST_PARTS:
                raise _Unreadable(f"it has more than {MOST_PARTS} parts")
            if inner is not None:
                parts = _count(data, at, at + size, inner, parts)
        at += size
    return parts


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(value, where it ends)."""
    if at < end and (value := data[at]) < 0x80:
        return value, at + 1
    value = 0
    for place in range(min(_LONGEST_VARINT, end - at)):
        byte = data[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise _Unreadable("it ends inside a number, or has one of more than 64 bits")
