"""What every driver has to do; the package says how it is used."""

import os
import stat

import pytest
from qubes_storage import Pool, connect, files, image, trees
from qubes_storage.finding import schema

MIB = 1024**2
SIZE = 64 * MIB


class DriverTests:
    """Subclass it with a fixture ``pool``."""

    keeps_holes = True

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
            trees.remove_tree(fd, "work")

    @pytest.fixture
    def system(self, pool):
        """A machine with the pool, besides the default one of driver xen."""
        root, name = os.path.split(pool.dir_path)
        for place in ("etc/qubes", "var/lib/qubes"):
            os.makedirs(os.path.join(root, place))
        klass = type(pool)
        options = self.options(pool)
        options.update(
            {"class": f"{klass.__module__}.{klass.__qualname__}", "dir_path": f"/{name}"}
        )
        system = connect(root, backend="local")
        system.add_pool("default", driver="xen")
        system.add_pool(pool.name, **options)
        return system

    @staticmethod
    def options(pool):
        """``{option: value}`` of a pool."""
        names = list(schema(type(pool))[0])
        lacking = [name for name in names if not hasattr(pool, name)]
        assert not lacking, f"keep each option as an attribute of its name: {', '.join(lacking)}"
        return {name: getattr(pool, name) for name in names}

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
        types, anything, _ = schema(type(pool))
        assert "dir_path" in types
        assert not anything
        assert set(self.options(pool)) == set(types)

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

    def test_a_clone_keeps_its_holes(self, pool, vmdir):
        pool.create_image(files.at(vmdir, "root.img"), SIZE)
        self.write(vmdir, "root.img", [(10 * MIB, b"x" * MIB), (SIZE - MIB, b"y" * MIB)])
        with files.closing(image.open_image(files.at(vmdir, "root.img"))) as source:
            os.sync()  # some filesystems allocate late
            pool.clone_image(source, files.at(vmdir, "private.img"))
        os.sync()
        most = 3 * MIB if self.keeps_holes else SIZE + MIB
        assert image.measure(vmdir, "private.img")[1] <= most

    def test_a_directory_made_like_another_has_of_it_only_what_is_kept(self, pool, vmdir):
        for name in ("root.img", "private.img", "volatile.img"):
            pool.create_image(files.at(vmdir, name), SIZE)
            self.write(vmdir, name, [(0, name.encode())])
        os.mkdir("kernels", dir_fd=vmdir)
        with files.closing(pool.open_subdir("appvms")) as fd:
            kept = ["root.img", "private.img"]
            with files.closing(pool.make_vmdir(fd, "play", vmdir, kept)) as made:
                brought = os.listdir(made)
                assert set(brought) <= set(kept)
                for name in brought:
                    assert self.content(made, name) == self.content(vmdir, name)
                    self.write(made, name, [(0, b"mine")])
                    assert self.content(vmdir, name).startswith(name.encode())
            trees.remove_tree(fd, "play")
            assert os.listdir(fd) == ["work"]

    def test_a_vm_is_made_copied_moved_and_removed_whole(self, pool, system):
        def at(name):
            return system.root + system.vm_info(name)["volumes"]["private"]["path"]

        def check(name, where):
            assert system.vm_info(name)["pool"] == where
            assert system.verify_vm(name) == []
            with open(at(name), "rb") as file:
                assert file.read(5) == b"mine\0"
                file.seek(40 * MIB)
                assert file.read(2 * MIB) == b"x" * MIB + bytes(MIB)

        system.create_vm("base", klass="TemplateVM", pool=pool.name)
        system.create_vm("work", klass="StandaloneVM", template="base", pool=pool.name)
        with open(at("work"), "r+b") as file:
            file.write(b"mine")
            file.seek(40 * MIB)
            file.write(b"x" * MIB)
        for where in ("default", pool.name):
            system.clone_vm("work", "play", where)
            check("play", where)
            system.remove_vm("play", purge=True)
        system.rename_vm("work", "home")
        system.resize_vm("home", "private", "3GiB")
        for where in ("default", pool.name):
            system.migrate_vm("home", where)
            check("home", where)
        assert system.vm_info("home")["volumes"]["private"]["size"] == 3 * 1024 * MIB
        system.reset_vm("home")
        system.commit_vm("base")
        check("home", pool.name)
        for name in ("home", "base"):
            system.remove_vm(name, purge=True)
        assert all(os.listdir(path) == [] for path in self.subdirs(pool))

    @staticmethod
    def subdirs(pool):
        return [os.path.join(pool.dir_path, name) for name in os.listdir(pool.dir_path)]

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
            assert pool.snapshot(vmdir, ["private.img"]) == {}
            assert pool.revisions(vmdir, "private.img") == []
            return
        kept = pool.snapshot(vmdir, ["private.img"])["private.img"]
        assert pool.revisions(vmdir, "private.img") == [kept]
        self.write(vmdir, "private.img", [(0, b"new")])
        pool.resize_image(files.at(vmdir, "private.img"), 2 * SIZE)
        pool.revert(vmdir, "private.img", kept)
        assert self.content(vmdir, "private.img")[:4] == b"old\0"
        assert image.measure(vmdir, "private.img")[0] == 2 * SIZE
        assert all(pool.owns(n) for n in os.listdir(vmdir) if n != "private.img")

    def test_a_vm_that_grew_and_is_reverted_keeps_its_size_and_has_its_mode(self, pool, system):
        if not pool.revisions_to_keep:
            return
        system.create_vm("work", klass="StandaloneVM", pool=pool.name)
        path = system.root + system.vm_info("work")["volumes"]["private"]["path"]
        with open(path, "r+b") as file:
            file.write(b"old")
        kept = system.reset_vm("work")["revisions"]["new"]["private.img"]
        with open(path, "r+b") as file:
            file.write(b"new")
        system.resize_vm("work", "private", "3GiB")
        assert system.revert("work", "private", kept)["revision"]["new"] == kept
        with open(path, "rb") as file:
            assert file.read(4) == b"old\0"
        for name in os.listdir(os.path.dirname(path)):
            there = os.lstat(os.path.join(os.path.dirname(path), name))
            if pool.owns(name) and stat.S_ISREG(there.st_mode):
                assert there.st_mode & 0o7777 == 0o660
        assert (os.stat(path).st_mode & 0o7777, os.stat(path).st_size) == (0o660, 3 * 1024 * MIB)
        assert system.verify_vm("work") == []
