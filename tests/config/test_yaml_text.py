"""YAML 1.2 scalars, exact decimals, repeated keys."""

from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_mode.config.yaml_text import parse_yaml, write_value, write_yaml
from megatron_mode.errors import ConfigError

# From the core schema of the YAML 1.2.2 specification, section 10.3.2.
SCALARS = [
    ("3e-4", Decimal("3e-4")),
    ("1e6", Decimal("1e6")),
    ("0.1", Decimal("0.1")),
    (".5", Decimal("0.5")),
    ("-1.5E+3", Decimal("-1500")),
    ("014", 14),
    ("+12", 12),
    ("no", "no"),
    ("on", "on"),
    ("1:30", "1:30"),
    ("1_000", "1_000"),
    ("2001-01-01", "2001-01-01"),
    (".inf", ".inf"),
    ("TRUE", True),
    ("false", False),
    ("~", None),
    ("", None),
    ("'0.1'", "0.1"),
    ("125m", "125m"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = parse_yaml(text, "text")
    assert parsed == value
    assert type(parsed) is type(value)


def test_decimals_are_exact_where_floats_are_not():
    third = parse_yaml("0.1", "x") + parse_yaml("0.2", "x")
    assert third == Decimal("0.3")
    assert 0.1 + 0.2 != 0.3


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a: 1\nb: 2\na: 3", "key 'a' is given again on line 3"),
        ("x: {a: 1, a: 2}", "key 'a' is given again on line 1"),
        ("a: [", "is not YAML on line"),
        ("a: !!python/object:os.system x", "is not YAML on line 1"),
        ("a: &a [*a]", "it has an alias"),
        ("a: 1e400", "beyond"),
        ("a: 1e-99999999999999999999", "beyond"),
        ("? [1]\n: 2", "a key must be plain text"),
        ("a: \x00", "is not text"),
        ("a: !!bool x", "it has a tag"),
        ("a: !!binary aGk=", "it has a tag"),
        (f"a: {'9' * 5000}", f"{'9' * 40} is beyond"),
        ('a: "b\\0"', "the text holds the character U+0000"),
        ('"\\ud800": 1', "the text holds the character U+D800"),
        ("[" * 100_000, "nested deeper than 40"),
        ("{a: " * 100_000, "nested deeper than 40"),
        (" ".join("-" * 60), "nested deeper than 40"),
        # Thirty lines that name 10^30 values.
        ("a0: &a0 [1]\n" + "".join(
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 31)),
         "it has an alias"),
    ],
)  # fmt: skip
def test_bad_text_is_one_sentence(text, fragment):
    with pytest.raises(ConfigError, match="the file") as caught:
        parse_yaml(text, "the file")
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_repeated_key_is_reported():
    with pytest.raises(ConfigError) as caught:
        parse_yaml("a: 1\na: 2\nb: {c: 1, c: 2}", "f")
    assert len(str(caught.value).splitlines()) == 2


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.decimals(allow_nan=False, allow_infinity=False, places=6)
    | st.text(st.characters(codec="utf-8", exclude_characters="\x00")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc:# -'1", max_size=5), inner),
    max_leaves=8,
)


@given(PLAIN)
@example("\x85")
@example("\u2028")
def test_written_values_read_back_equal(value):
    assert parse_yaml(write_yaml(value), "x") == value
    assert "\n" not in write_value(value)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-300, max_value=1e300))
def test_floats_read_back_to_the_bit(value):
    assert float(parse_yaml(write_yaml(value), "x")) == value
