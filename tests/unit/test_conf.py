"""storage.conf is changed in its text: what was not asked for stays to the byte."""

import random
import time

import pytest
from qubes_storage.conf import Conf, ConfError, loads
from qubes_storage.exc import InvalidInput

SHIPPED = (
    b"[default] ; the pool that is always there\n"
    b"driver=xen ; images as files\n"
    b"; class = qubes.storage.xen.XenStorage ; class beats driver\n"
    b"; \n"
    b"; [pool-b]\n"
    b"; class = my.own.Pool\n"
    b"\n"
)
RICH = (
    b"# head\n"
    b"[default]\n"
    b"driver = xen\n"
    b"\n"
    b"; about foo\n"
    b"[foo] ; trailing words\n"
    b"# inside\n"
    b"DRIVER : xen ; inline\n"
    b"dir_path=/opt/foo\n"
    b"long = one\n"
    b" two\n"
    b"# between\n"
    b"\tthree\n"
    b"k = 1\n"
    b"K = 2 ; the last one counts\n"
    b"\n"
    b"rem a remark\n"
    b"[bar]\n"
    b"empty =\n"
    b'quoted = ""\n'
)


def edited(text, section, **options):
    conf = Conf(text)
    conf.edit(section, options)
    return conf.dumps()


def as_crlf(text):
    return text.replace(b"\n", b"\r\n")


ENDINGS = pytest.mark.parametrize("ending", [bytes, as_crlf], ids=["lf", "crlf"])
TEXTS = pytest.mark.parametrize(
    "text",
    [b"", b"\n", b"# c\n", SHIPPED, RICH, RICH.rstrip(b"\n"), b"[a]\n[a]\nx=1\n[b]\n[a]\ny=2\n"],
    ids=["empty", "blank", "comment", "shipped", "rich", "no newline", "scattered"],
)


@ENDINGS
@TEXTS
def test_reading_and_writing_gives_the_same_bytes(text, ending):
    assert Conf(ending(text)).dumps() == ending(text)


@ENDINGS
@TEXTS
def test_setting_what_is_there_changes_not_one_byte(text, ending):
    text = ending(text)
    for section, options in loads(text).items():
        assert edited(text, section, **options) == text


@ENDINGS
@TEXTS
def test_a_new_section_leaves_all_that_was_there(text, ending):
    text = ending(text)
    new = edited(text, "new", driver="xen", dir_path="/opt/new")
    assert new.startswith(text)
    assert loads(new) == {**loads(text), "new": {"driver": "xen", "dir_path": "/opt/new"}}
    assert list(loads(new))[-1] == "new"
    if b"\r\n" in text:
        assert new.count(b"\n") == new.count(b"\r\n")


@ENDINGS
@TEXTS
def test_removing_what_was_added_gives_the_same_bytes(text, ending):
    text = ending(text)
    conf = Conf(text)
    conf.edit("new", {"driver": "xen", "dir_path": "/opt/new"})
    conf.remove("new")
    if text and not text.endswith(b"\n"):
        text += b"\r\n" if b"\r\n" in text else b"\n"
    assert conf.dumps() == text


@pytest.mark.parametrize(
    ("section", "options", "old", "new"),
    [
        ("default", {"driver": "other"}, b"driver = xen", b"driver = other"),
        ("foo", {"driver": "other"}, b"DRIVER : xen ; inline", b"DRIVER : other ; inline"),
        ("foo", {"dir_path": "/opt/x"}, b"dir_path=/opt/foo", b"dir_path=/opt/x"),
        ("foo", {"k": "3"}, b"K = 2 ; the", b"K = 3 ; the"),
        ("foo", {"k": None}, b"k = 1\nK = 2 ; the last one counts\n", b""),
        ("foo", {"driver": None}, b"DRIVER : xen ; inline\n", b""),
        ("foo", {"long": "short"}, b"one\n two\n# between\n\tthree\n", b"short\n# between\n"),
        ("foo", {"long": None}, b"long = one\n two\n# between\n\tthree\n", b"# between\n"),
        ("foo", {"new": "1"}, b"one counts\n", b"one counts\nnew = 1\n"),
        ("foo", {"driver": ""}, b"DRIVER : xen ; inline\n", b"; inline\nDRIVER : \n"),
        ("foo", {"driver": "a;b"}, b"DRIVER : xen ; inline\n", b"; inline\nDRIVER : a;b\n"),
        ("bar", {"empty": "full"}, b"empty =\n", b"empty = full\n"),
        ("bar", {"quoted": "x"}, b'quoted = ""\n', b"quoted = x\n"),
        ("bar", {"new": "1"}, b'quoted = ""\n', b'quoted = ""\nnew = 1\n'),
    ],
)
@ENDINGS
def test_an_edit_changes_its_line_alone(section, options, old, new, ending):
    old, new, text = ending(old), ending(new), ending(RICH)
    assert text.count(old) == 1
    assert edited(text, section, **options) == text.replace(old, new)


def test_a_comment_that_stood_for_the_value_is_kept_beside_it():
    text = b"[foo]\nk = ;x \n"
    assert loads(text)["foo"]["k"] == ""
    assert edited(text, "foo", k="v") == b"[foo]\n;x\nk = v\n"


def test_removing_a_section_keeps_the_comments_around_it():
    conf = Conf(RICH)
    conf.remove("foo")
    start, stop = RICH.index(b"[foo]"), RICH.index(b"\nrem a remark")
    assert conf.dumps() == RICH[:start] + RICH[stop:]
    assert set(loads(conf.dumps())) == {"default", "bar"}


def test_removing_a_section_takes_each_of_its_pieces():
    conf = Conf(b"[a]\nx = 1\n\n[b]\ny = 2\n\n[a]\nz = 3\n")
    conf.remove("a")
    assert conf.dumps() == b"\n[b]\ny = 2\n"


def test_removing_a_section_that_is_not_there_changes_nothing():
    conf = Conf(RICH)
    conf.remove("nope")
    assert conf.dumps() == RICH


def test_an_option_goes_to_the_last_piece_of_its_section():
    text = b"[a]\nx = 1\n[b]\ny = 2\n[a]\nz = 3\n[c]\n"
    assert edited(text, "a", w="4") == text.replace(b"z = 3\n", b"z = 3\nw = 4\n")


def test_an_option_after_a_last_line_without_an_end_gets_a_line_of_its_own():
    assert edited(b"[a]\nx = 1", "a", y="2") == b"[a]\nx = 1\ny = 2\n"
    assert edited(b"[a]\r\nx = 1", "a", y="2") == b"[a]\r\nx = 1\r\ny = 2\r\n"


def test_values_of_DEFAULT_are_in_each_section_after_its_own():  # noqa: N802
    text = b"[DEFAULT]\na = 1\nb = 2\n[foo]\nc = 3\nb = 4\n[default]\n"
    found = loads(text)
    assert list(found["foo"].items()) == [("c", "3"), ("b", "4"), ("a", "1")]
    assert found["default"] == {"a": "1", "b": "2"}
    assert "DEFAULT" not in found


def test_a_value_of_DEFAULT_is_written_only_where_it_differs():  # noqa: N802
    text = b"[DEFAULT]\na = 1\n[foo]\nc = 3\n"
    assert edited(text, "foo", a="1") == text
    assert edited(text, "foo", a="2") == text + b"a = 2\n"


def test_what_DEFAULT_gives_cannot_be_removed_from_a_section():  # noqa: N802
    conf = Conf(b"[DEFAULT]\na = 1\n[foo]\nc = 3\n")
    before = conf.dumps()
    with pytest.raises(InvalidInput, match=r"\[DEFAULT\] gives a.*remove it there"):
        conf.edit("foo", {"a": None})
    assert conf.dumps() == before


@pytest.mark.parametrize(
    "options",
    [
        {"k": "a ; b"},
        {"k": "a\n"},
        {"k": "a\nb"},
        {"k": "a\n[bar]\nclass = x.Y"},
        {"k": " a"},
        {"k": "a "},
        {"k": "a\t;b"},
        {"k": '""'},
        {"k": "a\r"},
        {"": "v"},
        {" k": "v"},
        {"k ": "v"},
        {"a:b": "v"},
        {"a=b": "v"},
        {"#k": "v"},
        {";k": "v"},
        {"rem": "v"},
        {"rem k": "v"},
        {"[k]": "v"},
        {"k\nl": "v"},
        {"K": "v"},
        {"__name__": "v"},
        {"good": "1", "k": "a ; b"},
    ],
    ids=repr,
)
@ENDINGS
@TEXTS
def test_what_would_not_be_read_back_is_refused_and_leaves_the_text(text, options, ending):
    conf = Conf(ending(text))
    before = conf.dumps()
    with pytest.raises(InvalidInput, match="new"):
        conf.edit("new", options)
    assert conf.dumps() == before


@pytest.mark.parametrize("section", ["", "a\n", "a\nb", "a]b", "]", "DEFAULT"], ids=repr)
@TEXTS
def test_a_name_that_no_section_takes_is_refused_and_leaves_the_text(text, section):
    conf = Conf(text)
    with pytest.raises(InvalidInput):
        conf.edit(section, {"driver": "xen"})
    assert conf.dumps() == text


PIECES = ["a", "B", "0", "/", " ", "\t", ";", " ;", "#", '"', "'", "[", "]", "=", ":", "%", "\\",
          "\n", "\r", "\x0b", "\x00", "\x85", "\xa0", "rem ", "ą", "\udce9", "$", "~"]  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_set_is_read_back_or_refused(seed):
    chance = random.Random(seed)
    text = chance.choice([b"", SHIPPED, RICH, as_crlf(RICH), b"[DEFAULT]\nd = 1\n[foo]\n"])
    conf = Conf(text)
    written = 0
    for _ in range(50):
        section = chance.choice(["foo", "bar", "default", "new one"])
        key = chance.choice(["k", "driver", "long", "empty", "dir_path", "d", "new key"])
        value = "".join(chance.choices(PIECES, k=chance.randrange(6)))
        value = chance.choice([value, value, value, None])
        before, pools = conf.dumps(), conf.pools()
        try:
            conf.edit(section, {key: value})
        except InvalidInput:
            assert conf.dumps() == before
            continue
        written += 1
        wanted = {**pools, section: {**pools.get(section, Conf(before).own("DEFAULT"))}}
        wanted[section][key] = value
        if value is None:
            del wanted[section][key]
        assert loads(conf.dumps()) == wanted
        assert set(kept(before)) <= set(kept(conf.dumps())), "a comment was lost"
    assert written


def kept(text):
    """The lines that are comments of their own."""
    return [line.strip() for line in text.splitlines() if line[:1] in (b"#", b";")]


@pytest.mark.parametrize("seed", range(40))
def test_text_of_random_lines_survives_an_edit_or_names_its_line(seed):
    chance = random.Random(seed)
    lines = ["[foo]", "[DEFAULT]", "[bar] x", "k = 1", " more", "K: 2 ; c", "# c", "", "; d", "rem",
             "e =", "no option", "\tx ; y", "a;b = ;c "]  # fmt: skip
    for _ in range(50):
        text = "\n".join(["[foo]", *chance.choices(lines, k=8)]).encode()
        try:
            before = loads(text)
        except ConfError as err:
            assert "line " in str(err)
            continue
        conf = Conf(text)
        conf.edit("new", {"driver": "xen"})
        inherited = Conf(text).own("DEFAULT")
        assert loads(conf.dumps()) == {**before, "new": {**inherited, "driver": "xen"}}
        assert conf.dumps().startswith(text)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("driver = xen\n", "line 1"),
        ("\n# c\n  x = 1\n[foo]\n", "line 3"),
        ("[foo]\n x = 1\n", "line 2"),
        ("[foo]\nx = 1\nbad\nworse\n", "line 3.*line 4"),
        ("[foo]\n= v\n", "line 2"),
        ("[foo]\n[bar\n", "line 2"),
        ("[]\n", "line 1"),
    ],
)
def test_text_that_r32_cannot_parse_is_an_error_with_line_and_cure(text, lines):
    with pytest.raises(ConfError, match=rf"/etc/qubes/storage.conf.*{lines}.*(mend|put)"):
        loads(text)


def test_bytes_that_are_not_utf_8_are_kept_and_read_back():
    text = b"[foo]\ndir_path = /opt/caf\xe9 ; \xff\n"
    assert loads(text)["foo"]["dir_path"] == "/opt/caf\udce9"
    assert edited(text, "foo", dir_path="/opt/\udce9") == b"[foo]\ndir_path = /opt/\xe9 ; \xff\n"


def test_what_utf_8_cannot_hold_is_refused():
    conf = Conf(SHIPPED)
    with pytest.raises(InvalidInput, match="UTF-8"):
        conf.edit("foo", {"k": "\ud800"})
    assert conf.dumps() == SHIPPED


def refused(text):
    with pytest.raises(ConfError):
        loads(text)


@pytest.mark.parametrize(
    "work",
    [
        lambda: loads(b"[s]\nx" + b" " * 100_000 + b"= 1\n"),
        lambda: refused(b"[s]\nx" + b" " * 100_000 + b"\n"),
        lambda: Conf(b"[s]\ndriver = xen\n" * 500).remove("s"),
        lambda: Conf(b"[s]\ndriver = xen\n" * 500).edit("s", {"driver": "btrfs", "new": "1"}),
        lambda: Conf(b"[s]\nx = 1\n" + b" and more\n" * 50_000).edit("s", {"x": "2"}),
    ],
)
def test_a_file_that_somebody_made_to_be_slow_is_not(work):
    began = time.process_time()
    work()
    assert time.process_time() - began < 2
