"""Values of many libraries for the fields of records and questions, and what they must become."""

import enum
import re
import uuid
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from http import HTTPStatus

import numpy as np
import pendulum

AT = 1_750_000_000_000
"""2025-06-15T15:06:40Z in epoch milliseconds."""

EAST = timezone(timedelta(hours=5, minutes=30))
NOON = 1_767_182_400_123
"""2025-12-31T12:00:00.123Z in epoch milliseconds."""

_ID = uuid.UUID("12345678-1234-4678-9234-567812345678")


class Tier(enum.StrEnum):
    SIMPLE = "SIMPLE"


class Provider(str, enum.Enum):  # noqa: UP042 - as enumerations were written before StrEnum
    OLLAMA = "ollama"

    def __str__(self):
        return "another text"


class Plain(enum.Enum):
    TEXT = "a text"
    NUMBER = 12
    HALF = 0.5
    YES = True
    INSTANT = datetime(2025, 12, 31, 12, 0, 0, 123_000, tzinfo=UTC)
    NOTHING = None
    TUPLE = (1, 2)
    DECIMAL = Decimal("0.25")


class Number(enum.IntEnum):
    SEVEN = 7


class Bits(enum.IntFlag):
    FOUR = 4


class OtherText(str):
    """A text that says that it is another one."""

    __slots__ = ()

    def __str__(self):
        return "a lie"

    def __eq__(self, other):
        return False

    def __hash__(self):
        return 5

    def __len__(self):
        return 10**9


class OtherInt(int):
    def __int__(self):
        return 99

    __index__ = __int__

    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


class OtherFloat(float):
    def __float__(self):
        return 99.0

    def is_integer(self):
        return True

    def __eq__(self, other):
        return True

    __hash__ = float.__hash__


class Index:
    """A whole number of another library."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number


class Float:
    """A number of another library."""

    def __init__(self, number):
        self.number = number

    def __float__(self):
        return self.number

    def __eq__(self, other):
        return self.number == other

    __hash__ = None


class Heavy(Float):
    """A number that holds much."""

    def __init__(self, number):
        super().__init__(number)
        self.held = [bytes([n]) * 9 for n in range(200)]


class OtherUuid:
    """A UUID of another library."""

    def __init__(self, urn):
        self.urn = urn

    urn = None


class OwnArithmetic(datetime):
    """A datetime whose arithmetic is its own, and works with nothing else."""

    def _fail(self, *_):
        raise TypeError("not with the standard library's")

    __sub__ = __rsub__ = __add__ = astimezone = isoformat = timestamp = utctimetuple = _fail
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = _fail
    __hash__ = datetime.__hash__


class OwnDuration(timedelta):
    """A duration whose arithmetic is its own."""

    def _fail(self, *_):
        raise TypeError("not with the standard library's")

    __lt__ = __le__ = __gt__ = __ge__ = __floordiv__ = __truediv__ = __divmod__ = _fail


class Moment:
    """An instant of a library whose instants are no datetimes, but become one by this method."""

    def __init__(self, instant):
        self._instant = instant

    def to_stdlib(self):
        return self._instant


class OlderMoment:
    def __init__(self, instant):
        self._instant = instant

    def py_datetime(self):
        return self._instant


class Arrow:
    """As arrow's: the datetime is a property."""

    def __init__(self, instant):
        self.instant = instant

    @property
    def datetime(self):
        return self.instant


class NamedZone(tzinfo):
    """A zone of its own that holds much."""

    def __init__(self):
        self.rules = [bytes(1) for _ in range(500)]

    def utcoffset(self, _):
        return OwnDuration(hours=2)

    def dst(self, _):
        return None

    def tzname(self, _):
        return "own"


def noon(kind=datetime, zone=UTC, hour=12, minute=0):
    return kind(2025, 12, 31, hour, minute, 0, 123_000, tzinfo=zone)


def _texts():
    """Fields of texts."""
    yield "tier", Tier.SIMPLE, "SIMPLE"
    yield "provider", Provider.OLLAMA, "ollama"
    yield "model", Plain.TEXT, "a text"
    yield "request_id", _ID, str(_ID)
    yield "session_id", _ID, str(_ID)
    yield "trace_id", OtherUuid(_ID.urn), str(_ID)
    yield "request_type", np.str_("numpy's"), "numpy's"
    yield "routing_method", OtherText("the text"), "the text"
    yield "provider", OtherText("a\0b\ud800"), "a\ufffdb\ufffd"
    for value in (5, 5.0, True, b"bytes", Plain.NUMBER, HTTPStatus.OK, Plain.TUPLE, np.int64(5)):
        yield "tier", value, "wrong_type"
    yield "model", np.bytes_(b"bytes"), "wrong_type"
    yield "session_id", Moment(noon()), "wrong_type"
    yield "provider", None, "no_provider"
    yield "provider", Plain.NOTHING, "no_provider"
    yield "provider", ["a", "b"], "wrong_type"


def _whole_numbers():
    """Fields of whole numbers."""
    yield "input_tokens", 200.0, 200
    yield "output_tokens", np.int32(-3), -3
    yield "tool_count", np.uint8(7), 7
    yield "message_count", np.float64(8.0), 8
    yield "input_tokens", np.float32(9.0), 9
    yield "input_tokens", np.array(10), 10
    yield "output_tokens", Decimal("11.00"), 11
    yield "retry_count", Decimal("1E+3"), 1000
    yield "tool_calls_made", Fraction(24, 2), 12
    yield "reasoning_tokens", Number.SEVEN, 7
    yield "cache_read_tokens", Bits.FOUR, 4
    yield "attempt_index", Plain.NUMBER, 12
    yield "input_tokens", OtherInt(13), 13
    yield "input_tokens", OtherFloat(14.0), 14
    yield "output_tokens", Index(15), 15
    yield "output_tokens", Float(16.0), 16
    yield "output_tokens", np.float64("nan"), None
    yield "output_tokens", Decimal("NaN"), None
    yield "status_code", HTTPStatus.NOT_FOUND, 404
    yield "status_code", "503", 503
    yield "status_code", OtherText("504"), 504
    yield "status_code", np.str_("505"), 505
    yield "status_code", 506.0, 506
    for value in (
        *(1.5, "12", True, Decimal("1.5"), Fraction(1, 2), np.float64(1.5), OtherFloat(1.5)),
        *(Decimal("1.00000000000000000000001"), Decimal("1e-999999999"), np.float32(0.1)),
        *(np.True_, np.ones((), bool), np.array([5]), np.array([5, 6]), np.complex128(1), 1 + 0j),
        *(np.timedelta64(5, "ns"), timedelta(5), np.datetime64(5, "ns"), Plain.YES, Plain.HALF),
        *(_ID, Tier.SIMPLE, Plain.TUPLE, np.array(5, dtype=object), [5]),
    ):
        yield "input_tokens", value, "wrong_type"
    for value in ("2xx", "", " 200", "+200", "2_00", "٢٠٠", "200.0", "9" * 30, True, b"200", 1.5):
        yield "status_code", value, "wrong_type"
    yield "input_tokens", Index(10**30), "out_of_domain"
    yield "input_tokens", np.uint64(2**63), "out_of_domain"
    yield "status_code", "9999999999999", "out_of_domain"


def _real_numbers():
    """Fields of numbers."""
    yield "cost_usd", Decimal("0.1"), 0.1
    yield "cost_usd", Decimal(1) / 3, 1 / 3
    yield "cost_usd", Decimal("0.1000000000000000055511151231257827"), 0.1
    yield "latency_ms", Decimal(5), 5.0
    yield "latency_ms", np.float32(0.1), 0.10000000149011612
    yield "latency_ms", np.float16(0.5), 0.5
    yield "latency_ms", np.longdouble(0.5), 0.5
    yield "latency_ms", np.array(1.5), 1.5
    yield "quality_score", np.int64(80), 80.0
    yield "quality_score", Fraction(1, 4), 0.25
    yield "quality_score", Plain.HALF, 0.5
    yield "quality_score", Plain.DECIMAL, 0.25
    yield "quality_score", Number.SEVEN, 7.0
    yield "latency_ms", OtherFloat(2.5), 2.5
    yield "latency_ms", OtherInt(3), 3.0
    yield "cost_usd", Float(0.75), 0.75
    yield "cost_usd", Index(2), 2.0
    yield "cost_usd", Heavy(0.125), 0.125
    yield "input_tokens", Heavy(125.0), 125
    yield "ttft_ms", np.float32("inf"), None
    yield "latency_ms", Decimal("NaN"), None
    yield "cost_usd", Decimal("-Infinity"), None
    for value in (
        *(
            "1",
            True,
            np.True_,
            np.zeros((), bool),
            Plain.YES,
            1 + 0j,
            np.complex128(1),
            np.array([1]),
        ),
        *(Fraction(1, 3), np.longdouble(1) / 3, Decimal("sNaN"), np.timedelta64(5, "s")),
        *(timedelta(seconds=1), pendulum.duration(seconds=1), b"1", _ID, Tier.SIMPLE),
    ):
        yield "latency_ms", value, "wrong_type"
    for value in (
        Decimal("1e400"),
        Decimal("1e999999999"),
        Fraction(10**400),
        10**400,
        Index(10**9),
    ):
        yield "cost_usd", value, "out_of_domain"


def _flags():
    for value in (True, 1, 1.0, np.True_, np.int8(1), np.ones((), bool), Decimal(1), Plain.YES):
        yield "was_fallback", value, 1
    for value in (False, 0, -0.0, np.False_, OtherInt(0), Index(0)):
        yield "stream", value, 0
    for value in (2, -1, 0.5, "yes", "1", b"", np.int8(2), Decimal("0.5"), np.array([True]), []):
        yield "was_fallback", value, "wrong_type"


def _instants():
    for value in (
        *(noon(), noon(zone=EAST, hour=17, minute=30), noon(zone=NamedZone(), hour=14)),
        *(noon(OwnArithmetic), noon(OwnArithmetic, NamedZone(), 14), Plain.INSTANT),
        *(pendulum.instance(noon()), pendulum.instance(noon()).in_timezone("America/New_York")),
        *(Moment(noon()), OlderMoment(noon()), Arrow(noon()), Moment(noon(OwnArithmetic))),
        *("2025-12-31T12:00:00.123Z", "2025-12-31t12:00:00.123z", "2025-12-31 17:30:00.123+05:30"),
        *(
            "2025-12-31T12:00:00.123000000+00:00",
            "20251231T120000.123Z",
            OtherText(noon().isoformat()),
        ),
        *(NOON, float(NOON), np.int64(NOON), np.float64(NOON), Decimal(NOON), OtherInt(NOON)),
    ):
        yield "timestamp", value, NOON
    naive = noon(zone=None)
    for value in (
        *(
            naive,
            pendulum.naive(2025, 12, 31),
            Moment(naive),
            Arrow(naive),
            noon(OwnArithmetic, None),
        ),
        *("2025-12-31T12:00:00", "2025-12-31T12:00"),
    ):
        yield "timestamp", value, "naive_datetime"
    for value in (
        *("noon", "", "2025-12-31", "1750000000000", "12:00Z", "2025-12-31T12:00:60Z", "now"),
        *(True, np.True_, NOON + 0.5, date(2025, 12, 31), np.datetime64("2025-12-31", "ms")),
        *(timedelta(days=20_000), Moment("no datetime"), b"2025-12-31T12:00Z", {"a": 1}, [NOON]),
        *(Decimal("1750000000000.5"), float("inf"), pendulum.date(2025, 12, 31), _ID),
    ):
        if value != float("inf"):  # it is None in a record, as everywhere
            yield "timestamp", value, "wrong_type"
    yield "timestamp", "1999-12-31T23:59:59Z", "out_of_domain"
    yield "timestamp", datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), "out_of_domain"
    yield "timestamp", "9999-12-31T23:59:59-14:00", "out_of_domain"


def _json():
    yield "attributes", {"tier": Tier.SIMPLE, "id": _ID}, f'{{"tier":"SIMPLE","id":"{_ID}"}}'
    yield "attributes", {"n": np.int64(1), "x": Decimal("0.1")}, '{"n":1,"x":0.1}'
    yield "attributes", {Plain.TEXT: [np.float32(0.5), (np.True_,)]}, '{"a text":[0.5,[true]]}'
    yield "candidates", [Plain.NUMBER, np.float32("nan"), Number.SEVEN], "[12,null,7]"
    yield "cache_decision", OtherText('{"kept": 1}'), '{"kept": 1}'
    for value in ({"a": object()}, {"a": Fraction(1, 3)}, 5, {1}, {(1, 2): 1}, {"a": noon()}):
        yield "attributes", value, "wrong_type"


TABLE = [*_texts(), *_whole_numbers(), *_real_numbers(), *_flags(), *_instants(), *_json()]
"""A field, a value, and what is stored of it or, a text in another field than one of texts, the
cause for which it is refused."""

CAUSES = {"wrong_type", "no_provider", "naive_datetime", "out_of_domain"}


def is_refused(wanted):
    return isinstance(wanted, str) and wanted in CAUSES


def named(case):
    """A name of a case, for the tests' report."""
    field, value, wanted = case
    try:
        shown = re.sub(r" object at 0x\w+", "", ascii(value))  # the same in each process
    except Exception:  # noqa: BLE001 - a value whose own methods fail
        shown = type(value).__name__
    return f"{field}={shown[:60]} {wanted!a}"


def _raising(error):
    def fail(self, *_args, **_options):
        raise error

    return fail


_RAISED = (RuntimeError("own"), ValueError("own"), TypeError("own"), RecursionError(), KeyError(1))

HOSTILE = [
    *(
        type(f"{name}{type(error).__name__}", (base,), {name: _raising(error)})
        for error in _RAISED
        for base, name in (
            (object, "__index__"),
            (object, "__float__"),
            (object, "to_stdlib"),
            (object, "datetime"),
            (object, "urn"),
            (object, "__getattribute__"),
            (object, "__iter__"),
        )
    ),
    type("Lies", (), {"__index__": lambda _: "five"}),
    type("Lied", (), {"__float__": lambda _: "five"}),
    type("Says", (), {"__float__": lambda _: 5.0}),  # and is equal to no number
    type("Bool", (), {"__float__": lambda _: 1.0, "__eq__": lambda *_: True, "dtype": "bool_"}),
    type("Urn", (), {"urn": "urn:isbn:0451450523"}),
    type("Text", (), {"__class__": property(lambda _: str)}),
    type("Endless", (), {"datetime": property(lambda self: self)}),
]
"""Classes, made without arguments, of values that are none."""
