"""What one link does to its rows, and what that costs in bytes: pure functions of integers; no torch here.

The planner, the ledger and the receiver's checks all ask here for sizes, without having a tensor.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from codec.errors import SpecError
from codec.header import HEADER2_BYTES, HEADER_BYTES, UINT16_MAX, UINT32_MAX, Direction, Element, Kind

__all__ = [
    "Direction",
    "LinkSpec",
    "dense_bytes",
    "largest_packet_bytes",
    "most_outliers",
    "packet_bytes",
    "payload_bytes",
]

KindName = Literal["identity", "none", "lowrank"]
BackwardName = Literal["straight_through", "exact"]
ZstdName = Literal["auto", "off"]
DtypeName = Literal["fp32", "fp64"]
QuantiserName = Literal["bf16", "int8", "int4", "uniform"]
ScaleName = Literal["row", "packet"]

MAX_WIDTH: Final = 1 << 16  # above any model's hidden width; `quantise`'s bound on coefficients relies on it
OUTLIER_SHARE: Final = 16  # at most one row in so many travels exactly: more are no outliers, and cost 2 H bytes each


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One boundary between two stages: how rows of `width` numbers cross it.

    kind             `identity`: the rows as they are, bit for bit. `none`: the rows in bf16, the dense baseline.
                     `lowrank`: coefficients in a basis, forward and, according to `backward`, backward.
    rank_forward,    the most columns that the basis of a direction may have; the basis in use says how many it has.
    rank_backward
    backward         `straight_through`: gradients have their own basis of up to `rank_backward` columns.
                     `exact`: the gradient of the compressed network, on the forward basis.
    zstd             `auto`: payloads are compressed while it saves; `off`: they are stored as they are.
    dtype            the element type that `identity` carries; `fp64` is for tests in float64.
    quantiser_*      how coefficients travel: `bf16`; `int8` and `int4` with a scale for each row; `uniform`: the basis'
                     one step for all coefficients, relative to the row's rms, and entropy coded.
    gradient_scale   (backward uniform) the rms that the step is relative to: each `row`'s own, or the `packet`'s.
    stochastic       (backward uniform) round up or down at random, so that the mean is right, and not to the nearest.
    exact_step       (exact, backward uniform) the step of gradients, which have no basis that could bring one, relative
                     to the rms length of D's rows.
    outliers         (forward) rows of more than this times the median row's rms travel exactly, in fp32; at most one
                     row in `OUTLIER_SHARE`, the largest first. 0: none.
    reuse            (forward uniform) only changes travel of rows that both ends hold from an earlier pass.

    All from the ranks down, but for `zstd` and `dtype`, mean nothing unless kind is `lowrank`; the ranks are then not
    looked at. Raises `SpecError`.
    """

    kind: KindName
    width: int
    rank_forward: int = 0
    rank_backward: int = 0
    backward: BackwardName = "straight_through"
    zstd: ZstdName = "auto"
    dtype: DtypeName = "fp32"
    quantiser_forward: QuantiserName = "bf16"
    quantiser_backward: QuantiserName = "bf16"
    gradient_scale: ScaleName = "row"
    stochastic: bool = False
    exact_step: float = 0.0
    outliers: float = 0.0
    reuse: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, get_args(KindName)),
            ("backward", self.backward, get_args(BackwardName)),
            ("zstd", self.zstd, get_args(ZstdName)),
            ("dtype", self.dtype, get_args(DtypeName)),
            ("quantiser_forward", self.quantiser_forward, get_args(QuantiserName)),
            ("quantiser_backward", self.quantiser_backward, get_args(QuantiserName)),
            ("gradient_scale", self.gradient_scale, get_args(ScaleName)),
        ):
            if value not in known:
                raise SpecError(f"link {name}", repr(value), "one of " + ", ".join(known))
        _check_int("link width", self.width, 1, MAX_WIDTH)
        if self.outliers != 0 and not (1 <= self.outliers < math.inf):
            raise SpecError("link outliers", self.outliers, "0 (off), or a multiple >= 1 of the median row's rms")
        if self.kind != "identity" and self.dtype != "fp32":
            raise SpecError("link dtype", self.dtype, f"fp32, as kind {self.kind} carries bf16 and is rebuilt in fp32")
        if self.kind == "lowrank":
            self._check_lowrank()

    def _check_lowrank(self) -> None:
        most = min(self.width, UINT16_MAX)
        _check_int("link rank_forward", self.rank_forward, 1, most)
        if self.backward == "straight_through":
            _check_int("link rank_backward", self.rank_backward, 1, most)
        if self.reuse and self.quantiser_forward != "uniform":
            raise SpecError("link reuse", f"quantiser_forward {self.quantiser_forward}", "uniform")
        if not 0 <= self.exact_step < math.inf:
            raise SpecError("link exact_step", self.exact_step, "a finite number >= 0")
        if self.backward == "exact" and self.quantiser_backward == "uniform" and not self.exact_step:
            raise SpecError("link exact_step", self.exact_step, "the step of gradients, > 0, for exact and uniform")
        for name, asked in (("gradient_scale", self.gradient_scale == "packet"), ("stochastic", self.stochastic)):
            if asked and self.quantiser_backward != "uniform":
                raise SpecError(f"link {name}", f"quantiser_backward {self.quantiser_backward}", "uniform")

    def element(self, direction: Direction) -> Element:
        """The type of the numbers that travel."""
        if self.kind == "identity":
            return Element.FP64 if self.dtype == "fp64" else Element.FP32
        if self.kind == "none":
            return Element.BF16
        quantiser = self.quantiser_forward if direction == Direction.FORWARD else self.quantiser_backward
        return Element[quantiser.upper()]

    @property
    def wire_kind(self) -> Kind:
        return Kind[self.kind.upper()]

    def has_outliers(self, direction: Direction) -> bool:
        """Whether rows of this direction may travel exactly."""
        return self.kind == "lowrank" and direction == Direction.FORWARD and self.outliers > 0

    def format(self, direction: Direction) -> int:
        """The packet format: 1 for plain numbers and nothing else, 2 for all other layouts."""
        return 2 if self.element(direction) > Element.FP64 or self.has_outliers(direction) else 1

    def basis_direction(self, direction: Direction) -> Direction | None:
        """Whose basis this direction uses: FORWARD for Q_f, BACKWARD for Q_b, None where no basis is used."""
        if self.kind != "lowrank":
            return None
        return Direction.FORWARD if self.backward == "exact" else direction

    def columns(self, direction: Direction) -> int:
        """Numbers sent per row; in a basis, the most of them."""
        basis_direction = self.basis_direction(direction)
        if basis_direction is None:
            return self.width
        return self.rank_forward if basis_direction == Direction.FORWARD else self.rank_backward


def payload_bytes(
    spec: LinkSpec, direction: Direction, rows: int, columns: int | None = None, outliers: int = 0
) -> int:
    """Bytes of a payload before zstd: exact, but for the `uniform` quantiser, whose payloads have at most so many.

    `columns` is the rank of the basis in use (None: the most it may be). Raises `SpecError` if one packet cannot hold
    the rows, or for more outliers or columns than the link may have.
    """
    _check_int("packet rows", rows, 0, UINT32_MAX)
    columns = spec.columns(direction) if columns is None else columns
    _check_int("packet columns", columns, 1, spec.columns(direction))
    _check_int("packet outliers", outliers, 0, most_outliers(spec, direction, rows))
    size = {
        Element.INT8: rows * (2 + columns),
        Element.INT4: rows * 2 + columns * -(-rows // 2),
        Element.UNIFORM: _uniform_bytes(rows, columns),
    }.get(element := spec.element(direction), rows * columns * element.bytes)
    size += outliers * 4 * (1 + spec.width)  # each: its place and its numbers in fp32
    if size > UINT32_MAX:
        raise SpecError("packet payload", f"{size} bytes", f"at most {UINT32_MAX}", "use smaller microbatches")
    return size


def packet_bytes(spec: LinkSpec, direction: Direction, rows: int, columns: int | None = None, outliers: int = 0) -> int:
    """Bytes of a packet, header included: never exceeded; exact with zstd `off` where `payload_bytes` is exact."""
    header = HEADER_BYTES if spec.format(direction) == 1 else HEADER2_BYTES
    return header + payload_bytes(spec, direction, rows, columns, outliers)


def largest_packet_bytes(spec: LinkSpec, direction: Direction, rows: int) -> int:
    """The most bytes that any packet of so many rows has, whatever its basis and its outliers."""
    return packet_bytes(spec, direction, rows, outliers=most_outliers(spec, direction, rows))


def most_outliers(spec: LinkSpec, direction: Direction, rows: int) -> int:
    """How many of so many rows may travel exactly."""
    return rows // OUTLIER_SHARE if spec.has_outliers(direction) else 0


def dense_bytes(width: int, rows: int) -> int:
    """Bytes that bf16 rows would have cost: what every compression ratio is stated against."""
    _check_int("link width", width, 1, MAX_WIDTH)
    _check_int("packet rows", rows, 0, UINT32_MAX)
    return Element.BF16.bytes * rows * width


def _uniform_bytes(rows: int, columns: int) -> int:
    """Two matrices (whole rows, changes), each with a head of 8 bytes and a class a line; two bytes for a row's scale,
    two for a number, and an escape in 255 numbers (`entropy.encode_matrix`)."""
    return 2 * (8 + columns) + 2 * max(rows, 1) + 2 * rows * columns + rows * columns // 255


def _check_int(what: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SpecError(what, value, f"an integer in {low}..{high}")
