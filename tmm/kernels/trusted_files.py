"""Whether what lies in a folder was put there by this user.

A compiled kernel is loaded by its name from a folder of torch's that lies among the temporary
files, where others may write, too.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_UNKNOWN = 65534
"""Whom a container shows as the owner of what belongs to users, such as root, that it has not."""


class UntrustedFileError(OSError):
    """Somebody else may have written a file."""


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise UntrustedFileError where others than this user, and root, can put files there.

    They can where the folder is theirs or lets them write, and where one around it does. Those may
    let everybody write if they let nobody rename what is another's, as ``/tmp`` does. Does nothing
    where the system has no users.
    """
    if not hasattr(os, "getuid"):
        return
    path = Path(os.path.realpath(folder))
    _check(path, owners=_own())
    for child in (path, *path.parents[:-1]):
        is_shared = os.stat(child.parent).st_mode & stat.S_ISVTX
        _check(child.parent, owners=_around(), writers_allowed=bool(is_shared))


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise UntrustedFileError for a file that others than this user, and root, can write."""
    if hasattr(os, "getuid"):
        whole = Path(os.path.realpath(path))
        check_folder(whole.parent)
        _check(whole, owners=_own())


def _check(path: Path, owners: frozenset[int], *, writers_allowed: bool = False) -> None:
    status = os.stat(path)
    if status.st_uid not in owners:
        raise UntrustedFileError(f"{path} belongs to another user")
    by_group = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    if (by_group or status.st_mode & stat.S_IWOTH) and not writers_allowed:
        raise UntrustedFileError(f"others can write to {path}")


def _own() -> frozenset[int]:
    return frozenset((os.getuid(), 0))


def _around() -> frozenset[int]:
    """Who may own the folders around."""
    try:
        has_all_users = Path("/proc/self/uid_map").read_text().split()[-1] == "4294967295"
    except OSError:  # another system than Linux
        has_all_users = True
    return _own() if has_all_users else _own() | {_UNKNOWN}


def _is_own_group(group: int) -> bool:
    """Whether nobody else is in the group: many systems give each user one of their own."""
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    is_of_user = found.gr_name == user.pw_name and group == user.pw_gid
    return group == 0 or (is_of_user and set(found.gr_mem) <= {user.pw_name})
