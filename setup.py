"""
A wheel whose modules and states Salt finds by the entry point ``salt.loader``.

The layout of a file_root is the layout of this tree, so each package says where it lies in it.
"""

import pathlib
import re

from setuptools import setup

HERE = pathlib.Path(__file__).parent
CORE = "_utils/qubes_storage"

setup(
    name="salt-qubes-storage",
    version=re.search(
        r'^VERSION = "(.+)"', (HERE / CORE / "__init__.py").read_text(encoding="utf-8"), re.M
    )[1],
    description="Qubes OS storage pools and VM placement, declared with Salt",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    install_requires=["salt>=3006,<3009"],
    extras_require={"progress": ["tqdm"]},  # a bar while the command line copies for long
    packages=[
        "qubes_storage",
        "qubes_storage.admin",
        "qubes_storage.drivers",
        "qubes_storage_salt",
        "qubes_storage_salt.modules",
        "qubes_storage_salt.states",
        "qubes_storage_testkit",
    ],
    package_dir={
        "qubes_storage": CORE,
        "qubes_storage_salt": "packaging/qubes_storage_salt",
        "qubes_storage_testkit": "packaging/qubes_storage_testkit",
        "qubes_storage_salt.modules": "_modules",
        "qubes_storage_salt.states": "_states",
    },
    entry_points={
        "console_scripts": ["qubes-storage = qubes_storage.cli:main"],
        "salt.loader": ["salt-qubes-storage = qubes_storage_salt:loader_dirs"],
    },
)
