"""The build backend: setuptools', except that a build asks for torch, cmake and ninja only where it can use them.

Torch is gigabytes; it is needed for its headers and one stub library, and only if nvcc is there.
"""

import toolchain
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Requirements of a wheel build on this machine, beside [build-system] requires."""
    return toolchain.requirements()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """Requirements of an editable build on this machine, beside [build-system] requires."""
    return toolchain.requirements()
