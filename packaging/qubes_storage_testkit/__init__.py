"""
What every driver has to do, as a pytest class. A driver's author subclasses it with one fixture::

    from qubes_storage_testkit import DriverTests

    class TestMine(DriverTests):
        @pytest.fixture
        def pool(self, tmp_path):
            return Pool("test", dir_path=str(tmp_path / "pool"))

The pool is new and its directory is not there yet; its parent is.
"""

import os

import pytest
from qubes_storage import Pool, files, image
from qubes_storage.finding import schema

MIB = 1024**2
SIZE = 64 * MIB


class DriverTests:
    """Subclass it with a fixture ``pool``."""

    @pytest.fixture
    def pool(self):
        raise NotImplementedError("give the class a fixture named pool")

    @pytest.fixture
    def vmdir(self, pool):
        """An open directory of a VM, as the core makes one."""
        pool.create()
        with files.closing(pool.open_subdir("appvms")) as fd:
            with files.closing(pool.make_vmdir(fd, "work")) as made:
                yield made
            files.remove_tree(fd, "work")

    @staticmethod
    def write(fd, name, parts):
        with open(files.at(fd, name), "r+b") as file:
            for offset, data in parts:
                file.seek(offset)
                file.write(data)

    @staticmethod
    def content(fd, name):
        with open(files.at(fd, name), "rb") as file:
            return file.read()

    def test_its_options_are_keywords_of_known_types(self, pool):
        types, anything, needed = schema(type(pool))
        assert "dir_path" in types
        assert not anything
        assert needed <= {"dir_path"} | set(vars(pool))

    def test_making_the_object_touches_nothing_and_create_makes_what_is_missing(self, pool):
        assert isinstance(pool, Pool)
        assert not os.path.exists(pool.dir_path)
        missing = pool.missing()
        assert missing[0] == pool.dir_path
        pool.create()
        assert all(os.path.isdir(path) for path in missing)
        assert pool.missing() == []
        pool.create()
        with files.closing(pool.open()) as fd:
            before = os.listdir(fd)
            pool.check_setup(fd, False)
            pool.check_setup(fd, True)
            assert os.listdir(fd) == before

    def test_usage_is_in_bytes(self, pool):
        pool.create()
        usage = pool.usage()
        assert set(usage) >= {"size", "used", "free"}
        assert 0 <= usage["free"] <= usage["size"]

    def test_an_image_has_its_size_and_is_zeros(self, pool, vmdir):
        pool.create_image(files.at(vmdir, "private.img"), SIZE)
        assert image.measure(vmdir, "private.img")[0] == SIZE
        assert not any(self.content(vmdir, "private.img"))

    def test_what_is_there_is_never_written_over(self, pool, vmdir):
        path = files.at(vmdir, "private.img")
        pool.create_image(path, SIZE)
        self.write(vmdir, "private.img", [(0, b"mine")])
        with pytest.raises(FileExistsError):
            pool.create_image(path, SIZE)
        with files.closing(image.open_image(path)) as source, pytest.raises(FileExistsError):
            pool.clone_image(source, path)
        assert self.content(vmdir, "private.img")[:4] == b"mine"

    def test_a_clone_has_the_content_and_is_apart(self, pool, vmdir):
        parts = [(0, b"head"), (20 * MIB, b"x" * MIB), (SIZE - 5, b"tail!")]
        pool.create_image(files.at(vmdir, "root.img"), SIZE)
        self.write(vmdir, "root.img", parts)
        with files.closing(image.open_image(files.at(vmdir, "root.img"))) as source:
            pool.clone_image(source, files.at(vmdir, "private.img"))
        before = self.content(vmdir, "root.img")
        assert self.content(vmdir, "private.img") == before
        self.write(vmdir, "root.img", [(0, b"HEAD")])
        assert self.content(vmdir, "private.img") == before

    def test_an_image_grows_and_never_shrinks(self, pool, vmdir):
        path = files.at(vmdir, "private.img")
        pool.create_image(path, SIZE)
        self.write(vmdir, "private.img", [(0, b"mine")])
        for size in (2 * SIZE, SIZE):
            pool.resize_image(path, size)
            assert image.measure(vmdir, "private.img")[0] == 2 * SIZE
        assert self.content(vmdir, "private.img")[:5] == b"mine\0"

    def test_revisions_come_back_or_it_says_that_it_keeps_none(self, pool, vmdir):
        pool.create_image(files.at(vmdir, "private.img"), SIZE)
        self.write(vmdir, "private.img", [(0, b"old")])
        if not pool.can_revisions:
            assert pool.snapshot(vmdir, ["private.img"]) == {}
            with pytest.raises(Exception, match=pool.name):
                pool.revisions(vmdir, "private.img")
            return
        if not pool.revisions_to_keep:
            pytest.skip("revisions_to_keep is 0")
        kept = pool.snapshot(vmdir, ["private.img"])["private.img"]
        assert pool.revisions(vmdir, "private.img") == [kept]
        self.write(vmdir, "private.img", [(0, b"new")])
        pool.revert(vmdir, "private.img", kept)
        assert self.content(vmdir, "private.img")[:3] == b"old"
        assert all(pool.owns(n) for n in os.listdir(vmdir) if n != "private.img")
