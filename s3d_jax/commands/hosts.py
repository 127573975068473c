"""Several hosts: the options by which a command joins them, and what only the first one does."""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from s3d_jax.errors import DeviceError, InputError
from s3d_jax.settings.arguments import add_options, build
from s3d_jax.settings.options import option
from s3d_jax.settings.records import Checked

_AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class HostsOptions(Checked):
    """How a process finds the others."""

    hosts: str | None = option(
        None,
        "this is one of several hosts, which all run this command with the same options: address "
        f'and port of the first one, which listens there; "{_AUTO}" where the cluster tells '
        "(Slurm, TPU pods)",
        metavar="ADDRESS:PORT",
        shown="one host",
    )
    host_count: int | None = option(None, "of --hosts: how many there are", metavar="N", least=1)
    host_id: int | None = option(
        None,
        "of --hosts: which this one is, from 0; 0 is the first one, which alone prints and writes",
        metavar="I",
        least=0,
    )


def add_hosts(parser: Any) -> None:
    """Adds --hosts, --host-count and --host-id."""
    add_options(parser.add_argument_group("several hosts"), HostsOptions)


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the hosts that the options name, if any; before anything else uses jax.

    All hosts but the first one print nothing in the block.

    Raises:
        InputError: options are missing, or do not fit together.
        DeviceError: the hosts do not find each other.
    """
    options = build(HostsOptions, arguments)
    _check(options, getattr(arguments, "mesh", None) is not None)
    if options.hosts is None:
        yield
        return
    import jax

    try:
        if options.hosts == _AUTO:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(options.hosts, options.host_count, options.host_id)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(
            f"this host does not join the others (--hosts {options.hosts}; on the first host "
            f"another program may listen on that port): {error!s:.300}"
        ) from error
    from s3d_jax.mesh import is_first_host

    if is_first_host():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        arguments.stdout = nowhere
        yield


def _check(options: HostsOptions, has_mesh: bool) -> None:
    """Raises InputError for options that are missing, or do not fit together."""
    numbers = options.host_count, options.host_id
    if options.hosts is None:
        if numbers != (None, None):
            raise InputError("--host-count and --host-id are of --hosts: give that too")
        return
    if not has_mesh:
        raise InputError("--hosts needs --mesh, a mesh of all devices of all hosts")
    if options.hosts == _AUTO:
        if numbers != (None, None):
            raise InputError(f"--hosts {_AUTO} takes no --host-count and no --host-id")
        return
    address, _, port = options.hosts.rpartition(":")
    if not address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f'--hosts takes an address and a port, "10.0.0.1:1234", got {options.hosts!r:.80}'
        )
    count, number = numbers
    if count is None or number is None:
        raise InputError(
            "--hosts needs --host-count, how many hosts there are, and --host-id, which this one "
            "is, from 0"
        )
    if number >= count:
        raise InputError(f"--host-id {number}: {count} hosts are 0 to {count - 1}")
