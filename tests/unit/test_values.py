"""Sizes, options and names: each form that people write, and each that is refused."""

import pytest
from qubes_storage import values
from qubes_storage.exc import InvalidInput
from qubes_storage.values import (
    as_text,
    check_pool_name,
    check_vm_name,
    format_size,
    normalise,
    parse_size,
    shown,
)

KIB = 1024


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("1", 1),
        ("10737418240", 10 * KIB**3),
        (10737418240, 10 * KIB**3),
        ("10GiB", 10 * KIB**3),
        ("10 GiB", 10 * KIB**3),
        (" 10GiB ", 10 * KIB**3),
        ("1K", KIB),
        ("1M", KIB**2),
        ("1G", KIB**3),
        ("1T", KIB**4),
        ("1KiB", KIB),
        ("1MiB", KIB**2),
        ("1TiB", KIB**4),
        ("1kB", 1000),
        ("1MB", 1000**2),
        ("1GB", 1000**3),
        ("1TB", 1000**4),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_a_size_is_whole_bytes_with_or_without_a_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", 0, "0", "0GiB", -1, "-1", "-1G", "+1", "1.5GiB", 1.5, "1e9", "1_000", "GiB",
     "10 Gi B", "10gib", "10g", "10KB", "10kib", "10PiB", "10B", "ten", None, True, False, [],
     "1,000", "0x10", "\u0661\u0660", "10\nGiB x", 2**63, "8388608TiB", "9" * 30, b"10"],
    ids=repr,
)  # fmt: skip
def test_anything_else_is_no_size(text):
    with pytest.raises(InvalidInput, match="private: "):
        parse_size(text, "private")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (10 * KIB**3, "10.0 GiB"),
     (1536 * KIB**2, "1.5 GiB"), (5 * KIB**4, "5.0 TiB"), (2048 * KIB**4, "2048.0 TiB")],
)  # fmt: skip
def test_a_size_is_shown_in_the_unit_that_fits(size, text):
    assert format_size(size) == text


def test_many_names_are_cut_short_and_counted():
    assert shown(["b", "a"]) == "a, b"
    assert shown(["c", "b", "a"], most=2) == "a, b and 1 more"


@pytest.mark.parametrize(
    ("option", "one", "other", "type_"),
    [
        ("size", 17, "17", None),
        ("size", 17, " 17", int),
        ("flag", True, "true", None),
        ("flag", True, "yes", bool),
        ("flag", False, 0, bool),
        ("dir_path", "/opt/x", "/opt/x/", None),
        ("dir_path", "/opt/x", "//opt//x/.", None),
    ],
)
def test_values_that_mean_the_same_compare_as_equal(option, one, other, type_):
    assert normalise(option, one, type_) == normalise(option, other, type_)


@pytest.mark.parametrize(
    ("option", "one", "other", "type_"),
    [
        ("size", "17", "017", None),
        ("word", "Xen", "xen", None),
        ("dir_path", "/opt/x", "/opt/X", None),
        ("dir_path", "/opt/x", "", None),
        ("flag", "true", "false", bool),
    ],
)
def test_values_that_mean_something_else_do_not(option, one, other, type_):
    assert normalise(option, one, type_) != normalise(option, other, type_)


@pytest.mark.parametrize(("value", "type_"), [("maybe", bool), ("", bool), ("x", int), (True, int)])
def test_a_value_of_the_wrong_type_is_named(value, type_):
    with pytest.raises(InvalidInput, match="pool foo: opt"):
        normalise("opt", value, type_, "pool foo: opt")


@pytest.mark.parametrize("value", [None, [], {}, b"x", len, "\ud800"], ids=repr)
def test_only_text_numbers_and_truth_values_are_written(value):
    with pytest.raises(InvalidInput, match="opt"):
        as_text("opt", value, "pool foo")


@pytest.mark.parametrize(
    "name",
    [
        "foo",
        "default",
        "a b",
        "a ; b",
        "a/b",
        "1a",
        "a1",
        "x" * 200,
        "my-pool_2.0",
        "nonesuch",
        "#a",
    ],
)
def test_a_name_that_r32_reads_back_is_a_pools(name):
    assert check_pool_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", " foo", "foo ", "a\nb", "a\n", "a\r", "\ta", "[a", "a]", "[", "123", "0", "true", "True",
     "FALSE", "none", "None", "DEFAULT", "Default", "dEfAuLt", "ą", "a\x00", "a\x7f", "\udce9",
     5, None, True, b"foo", []],
    ids=repr,
)  # fmt: skip
def test_a_name_that_r32_reads_otherwise_is_refused(name):
    with pytest.raises(InvalidInput, match="pool "):
        check_pool_name(name)


@pytest.mark.parametrize("name", ["work", "a", "Work-2", "a.b_c", "x" * 31, "dm", "lostfound"])
def test_a_name_of_letters_first_is_a_vms(name):
    assert check_vm_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "1a", "-a", "_a", ".a", "a b", "a\n", "a/b", "a\x00", "x" * 32, "work-dm", "none", "True",
     "default", "lost+found", "ą", "a:b", 5, None, True],
    ids=repr,
)  # fmt: skip
def test_any_other_name_is_no_vms(name):
    with pytest.raises(InvalidInput, match="VM "):
        check_vm_name(name)


@pytest.mark.parametrize("value", ["perhaps", "", 2, [], {}, b"no", 1.0])
def test_a_flag_is_true_or_false_and_no_text_is_true_by_itself(value):
    with pytest.raises(InvalidInput, match="neither true nor false"):
        values.to_flag(value, "VM work: purge")
    assert values.to_flag("no", "x") is values.to_flag(None, "x") is values.to_flag(0, "x") is False
    assert values.to_flag("yes", "x") is True


@pytest.mark.parametrize("name", [None, 17, ["ssd"], {}, b"ssd", "\ud800"])
def test_every_verb_refuses_a_name_that_is_no_text(name, scratch):
    system = scratch(template=False).connect()
    for verb in ("pool_info", "add_pool", "remove_pool", "vm_info", "create_vm", "verify_vm"):
        with pytest.raises(InvalidInput, match="name"):
            getattr(system, verb)(name)
