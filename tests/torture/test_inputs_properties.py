"""Properties of whatever is read or asked for, with inputs that hypothesis makes."""

import contextlib
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from qubes_storage import InvalidInput, StoragePoolException, adminapi, conf, registry, values

from tests.r32.machine import XML
from tests.torture import reading_conf, reading_xml

EVERYTHING = bool(os.environ.get("TORTURE"))
LARGE = 10_000_000 if EVERYTHING else 500_000
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=20_000 if EVERYTHING else 100,
    suppress_health_check=list(HealthCheck),
)
LINES = st.one_of(
    st.sampled_from(reading_conf._LINES),
    st.text(max_size=20).map(lambda line: line.encode("utf-8", "surrogatepass")),
    st.binary(max_size=20),
)
TEXTS = st.lists(LINES, max_size=12).map(b"\n".join)
NAMES = st.text("abé_.:", min_size=1, max_size=4)
VALUES = st.one_of(
    st.text(max_size=8), st.sampled_from(["0", "1", "253", "none", "None", "9" * 20])
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=5,
)


@st.composite
def collections(draw):
    """A qubes.xml of odd elements, mostly well-formed."""

    def tag(name):
        attrs = draw(
            st.dictionaries(st.sampled_from(reading_xml._KEYS) | NAMES, VALUES, max_size=4)
        )
        shown = "".join(f' {key}="{_escaped(value)}"' for key, value in attrs.items())
        return f"<{name}{shown}"

    children = [
        f"{tag(draw(st.sampled_from(reading_xml._TAGS)))}/>{draw(st.sampled_from(['', ' ', 'x']))}"
        for _ in range(draw(st.integers(0, 4)))
    ]
    whole = f"{tag('QubesVmCollection')}>{''.join(children)}</QubesVmCollection>"
    return whole.encode("utf-8", "surrogatepass")


def _escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


@SETTINGS
@given(data=TEXTS | st.binary(max_size=60), chance=st.randoms(use_true_random=False))
def test_any_storage_conf_reads_as_r32_reads_it_and_is_edited_in_place(data, chance):
    reading_conf.check(data, chance, None)


@SETTINGS
@given(
    section=st.text(max_size=8),
    options=st.dictionaries(st.text(max_size=6), st.none() | st.text(max_size=12), max_size=3),
    data=TEXTS,
)
def test_whatever_is_set_in_any_storage_conf_is_read_back_or_refused(section, options, data):
    try:
        conf.loads(data)
        options = {key.lower(): value for key, value in options.items()}
        reading_conf.check_edit(data, section, options)
    except (conf.ConfError, UnicodeEncodeError):
        return


@SETTINGS
@given(data=collections() | st.binary(max_size=60), chance=st.randoms(use_true_random=False))
@example(data=b"<a>" * 100_000 + b"</a>" * 100_000, chance=None)
@example(data=b"<QubesVmCollection>" + b"<a>" * 100_000, chance=None)
def test_any_qubes_xml_is_read_or_refused_and_left_alone(scratch, data, chance):
    reading_xml.check(data, chance, _root(scratch))


_roots = []


def _root(scratch):
    if not _roots or not os.path.isdir(_roots[0]):
        _roots[:] = [str(scratch(template=False).root)]
    return _roots[0]


BOMB = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
HOSTILE = {
    "a bomb": f'<!DOCTYPE a [<!ENTITY a0 "ha">{BOMB}]><QubesVmCollection b="&a11;"/>'.encode(),
    "quadratic": b'<!DOCTYPE a [<!ENTITY a "%s">]><QubesVmCollection>%s</QubesVmCollection>'
    % (b"x" * 50_000, b"&a;" * 50_000),
    "a file": b'<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><QubesVmCollection b="&a;"/>',
    "a parameter": b'<!DOCTYPE a [<!ENTITY % a SYSTEM "file:///etc/passwd"> %a;]><a/>',
    "a DTD": b'<!DOCTYPE a SYSTEM "file:///dev/zero"><QubesVmCollection/>',
    "one large element": b'<QubesVmCollection><a b="' + b"x" * LARGE + b'"/>',
    "many elements": b"<QubesVmCollection>" + b'<QubesAppVm name="x"/>' * (LARGE // 22),
    "depth": b"<QubesVmCollection>" + b"<a>" * (LARGE // 3),
    "NULs": bytes(LARGE),
    "UTF-16": "<QubesVmCollection/>".encode("utf-16"),
    "UTF-32": "<QubesVmCollection/>".encode("utf-32"),
    "another encoding": b'<?xml version="1.0" encoding="utf-7"?><QubesVmCollection/>',
    "half a character": b'<QubesVmCollection a="\xc3"/>',
    "a reference to nothing": b'<QubesVmCollection a="&#0;"/>',
    "a reference to a surrogate": b'<QubesVmCollection a="&#xd800;"/>',
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_qubes_xml_stops_every_verb_and_is_left_alone(data, scratch):
    made = scratch()
    system = made.connect()
    made.write(XML, data)
    before = made.tree()
    for verb in (
        system.list_vms,
        lambda: system.pool_info("default"),
        lambda: system.add_pool("new", dir_path="/mnt/new"),
        lambda: system.create_vm("new", klass="StandaloneVM"),
        lambda: system.remove_vm("fedora-23", purge=True),
        lambda: registry.lock(system.root).__enter__(),
    ):
        with pytest.raises(StoragePoolException, match=f"{XML}: .*(restore|take|save)"):
            verb()
        assert made.tree() == before
    assert made.xml == data


@SETTINGS
@given(ANYTHING)
def test_any_value_is_a_size_or_refused(value):
    try:
        assert 0 < values.parse_size(value) < 2**63
    except InvalidInput as err:
        assert "size" in str(err)


@SETTINGS
@given(ANYTHING)
def test_any_value_is_a_name_or_refused(value):
    for check in (values.check_vm_name, values.check_pool_name, adminapi.check_pool_name):
        with contextlib.suppress(InvalidInput):
            assert check(value) == value and value.isascii() and value.isprintable()


@SETTINGS
@given(st.binary() | st.text().map(lambda text: b"0\0" + text.encode("utf-8", "surrogatepass")))
def test_any_answer_of_qubesd_is_read_or_refused(data):
    try:
        content = adminapi.parse(data).content
        adminapi.pairs(content, "x")
        adminapi.properties(content, "x")
    except StoragePoolException as err:
        assert "cut off" in str(err) or "no property" in str(err)
