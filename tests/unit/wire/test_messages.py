"""Messages: every dataclass survives the wire, and names and numbers are those of the .proto file."""

from __future__ import annotations

import enum
import typing
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.wire import messages
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import FrameKind, Mode, Outcome, Report, from_bytes, to_bytes
from swarm_proto.v1 import swarm_pb2

CLASSES = [c for c in vars(messages).values() if is_dataclass(c) and isinstance(c, type)]
BY_HAND = {"Frame", "FrameHeader"}  # frames.py reads these


def values(kind: Any, field: Any) -> st.SearchStrategy[Any]:
    """Values that a field of this Python type and this protobuf type can hold."""
    origin = typing.get_origin(kind)
    if origin is list:
        (inner,) = typing.get_args(kind)
        return st.lists(values(inner, field), max_size=4)
    if origin is dict:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        left, right = typing.get_args(kind)
        return st.dictionaries(values(left, key), values(right, value), max_size=4)
    if is_dataclass(kind):
        return instances(kind)
    if kind is bool:
        return st.booleans()
    if kind is int:
        wide = field.cpp_type in (field.CPPTYPE_UINT64, field.CPPTYPE_INT64)
        return st.integers(0, 2**64 - 1 if wide else 2**32 - 1)
    if kind is float:
        return st.floats(allow_nan=False)
    if kind is str:
        return st.text(max_size=20)
    assert kind is bytes, kind
    return st.binary(max_size=20)


def instances(kind: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind, vars(messages) | {"bytes": bytes})
    described = swarm_pb2.DESCRIPTOR.message_types_by_name[kind.__name__].fields_by_name
    return st.builds(kind, **{f.name: values(hints[f.name], described[f.name]) for f in fields(kind)})


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
@settings(max_examples=40, derandomize=True)
@given(data=st.data())
def test_any_message_comes_back(kind: type, data: st.DataObject) -> None:
    message = data.draw(instances(kind))
    sent = to_bytes(message)
    back = from_bytes(kind, memoryview(sent))
    assert back == message
    assert to_bytes(back) == sent
    assert all(type(getattr(back, f.name)) is type(getattr(message, f.name)) for f in fields(kind))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_defaults_come_back(kind: type) -> None:
    assert from_bytes(kind, to_bytes(kind())) == kind()


def test_nan_and_infinity_come_back() -> None:
    back = from_bytes(Report, to_bytes(Report(numbers={"a": float("nan"), "b": float("-inf")})))
    assert back.numbers["a"] != back.numbers["a"] and back.numbers["b"] == float("-inf")


def test_equal_maps_give_equal_bytes_whatever_their_order() -> None:
    names = [f"n{i}" for i in range(50)]
    first, second = ({name: float(name[1:]) for name in order} for order in (names, names[::-1]))
    assert list(first) != list(second)
    assert to_bytes(Report(numbers=first)) == to_bytes(Report(numbers=second))


def test_every_message_of_the_contract_has_a_class_with_the_same_fields() -> None:
    contract = swarm_pb2.DESCRIPTOR.message_types_by_name
    assert {c.__name__ for c in CLASSES} == set(contract) - BY_HAND
    for kind in CLASSES:
        assert [f.name for f in fields(kind)] == [f.name for f in contract[kind.__name__].fields], kind.__name__


@pytest.mark.parametrize("kind", [FrameKind, Mode, Outcome])
def test_enums_have_the_names_and_numbers_of_the_contract(kind: type[enum.IntEnum]) -> None:
    contract = swarm_pb2.DESCRIPTOR.enum_types_by_name[kind.__name__]
    named = {v.name: v.number for v in contract.values if not v.name.endswith("_UNSPECIFIED")}
    assert {item.name: item.value for item in kind} == named


def test_all_calls_carry_frames_both_ways() -> None:
    calls = {
        f"{service.name}/{method.name}": (method.input_type.name, method.output_type.name)
        for service in swarm_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    members = ("Anchor/Attend", "Anchor/Sample", "Stage/Link", "Stage/Feed")
    assert calls == dict.fromkeys((*members, "Anchor/Status", "Anchor/Probe"), ("Frame", "Frame"))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "data",
    [
        b"\xff",  # a tag that does not end
        b"\x00\x01",  # field number 0
        b"\x0b",  # a group that does not end
        b"\xfa\x3e\x05ab",  # an unknown field, cut short
    ],
)
def test_bytes_that_do_not_parse_are_a_bad_frame(kind: type, data: bytes) -> None:
    with pytest.raises(BadFrame, match=f"{kind.__name__} message does not parse"):
        from_bytes(kind, data)


def test_text_that_is_no_utf8_is_a_bad_frame() -> None:
    with pytest.raises(BadFrame):
        from_bytes(messages.Hello, b"\x0a\x02\xff\xfe")


@settings(max_examples=200, derandomize=True)
@given(st.sampled_from(CLASSES), st.binary(max_size=60))
def test_noise_is_a_message_or_a_bad_frame(kind: type, noise: bytes) -> None:
    try:
        message = from_bytes(kind, noise)
    except BadFrame as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(message, kind)
