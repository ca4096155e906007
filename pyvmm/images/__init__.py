"""Guests to boot, built from Debian packages into the user's cache.

>>> image = pyvmm.images.path("tiny")
>>> image.kernel, image.initrd, image.disk
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pyvmm.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from pyvmm.images.recipe import Recipe

__all__ = ["ImagePaths", "Listed", "build", "listing", "path", "run_parameter"]


class ImagePaths(NamedTuple):
    """The files of a built image. Writing to ``disk`` changes it for all who boot the image."""

    directory: Path
    kernel: Path
    initrd: Path
    disk: Path | None


class Listed(NamedTuple):
    """One line of `listing`; ``built`` says that this very recipe has been built."""

    name: str
    description: str
    built: bool


def listing() -> list[Listed]:
    """The images that have a recipe."""
    from pyvmm.images import recipe

    recipes = map(recipe.load, recipe.names())
    return [Listed(each.name, each.description, _link(each).is_dir()) for each in recipes]


def path(name: str, *, kernel: str | None = None, build: bool = True) -> ImagePaths:
    """The files of the image ``name``, with its kernel ``kernel`` or its first.

    An image that is not there is built, or with ``build=False`` a `UsageError`.
    """
    from pyvmm.images import recipe

    wanted = recipe.load(name)
    known = [each.name for each in wanted.kernels]
    if kernel is not None and kernel not in known:
        raise UsageError(f"the image {name} has no kernel {kernel!r}: it has {', '.join(known)}")
    link = _link(wanted)
    if not link.is_dir():
        if not build:
            raise UsageError(f"the image {name} is not built: run 'pyvmm images build {name}'")
        _build(wanted)
    directory = link.resolve()
    disk = directory / "disk.img"
    kernel = kernel or known[0]
    return ImagePaths(
        directory,
        directory / f"vmlinuz-{kernel}",
        directory / f"initrd-{kernel}",
        disk if wanted.disk is not None else None,
    )


def build(name: str) -> Path:
    """Builds the image ``name`` if its recipe or its packages have changed; its directory."""
    from pyvmm.images import recipe

    return _build(recipe.load(name))


def run_parameter(script: str) -> str:
    """The kernel parameter that makes an image's initramfs run a shell script and power off."""
    import base64

    return f"pyvmm.run=base64:{base64.b64encode(script.encode()).decode()}"


def _build(recipe: Recipe) -> Path:
    from pyvmm.images import builder

    directory = builder.build(recipe)
    link = _link(recipe)
    fresh = link.with_name(f"{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(directory.name)
    fresh.replace(link)
    return directory


def _link(recipe: Recipe) -> Path:
    """What stands for the newest build of exactly this recipe."""
    from pyvmm.images import cache

    return cache.root() / "images" / f"{recipe.name}-current-{recipe.hash}"
