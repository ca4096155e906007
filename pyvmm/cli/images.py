"""``pyvmm images``: list, build and find the guests that pyvmm makes from Debian packages."""

from __future__ import annotations

import argparse

_EPILOG = """\
Images lie in $XDG_CACHE_HOME/pyvmm/images (~/.cache/pyvmm/images), each in a directory whose name
tells recipe and package versions; deleting one is safe. They are made from this machine's apt
sources without installing anything.

examples:
  pyvmm images
  pyvmm images build tiny debian
  pyvmm run --image tiny
  cp --sparse=always "$(pyvmm images path tiny)/disk.img" /tmp/my.img
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")
    actions.add_parser("list", help="show the images and which of them are built (the default)")
    build = actions.add_parser("build", help="build images, from the newest packages")
    build.add_argument("names", nargs="+", metavar="NAME")
    path = actions.add_parser("path", help="print the directory of an image; build it if need be")
    path.add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    from pyvmm import images

    if args.action == "build":
        for name in args.names:
            print(images.build(name))
    elif args.action == "path":
        print(images.path(args.name).directory)
    else:
        for entry in images.listing():
            state = "built" if entry.built else "not built"
            print(f"{entry.name:10}{state:12}{entry.description}")
    return 0
