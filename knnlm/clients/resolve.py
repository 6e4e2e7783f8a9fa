"""From what a service is called to the addresses behind it: `host:port`, a comma list of them, or a name with many.

A name stands for all its addresses of one family. A machine that has both an IPv4 and an IPv6 address is one replica,
not two, so IPv4 is taken where there are both.
"""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass

from knnlm.errors import InvalidRequest

RESOLVE_SECONDS = 5.0  # for a name server to answer
SCHEMES = ("dns:///", "dns:", "ipv4:", "ipv6:")
EXPECTED = "expected host:port, [IPv6]:port, dns:///host:port, unix:PATH, or several of them with commas between"


@dataclass(frozen=True)
class Name:
    """A host name and port that have yet to be resolved."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Address:
    """One place where a replica listens. text: as people write it. uri: as gRPC wants it. name: what it was resolved
    from, which is what its certificate is made out to; None for an address that was given as such."""

    text: str
    uri: str
    name: Name | None = None


@dataclass(frozen=True)
class Target:
    text: str
    addresses: tuple[Address, ...]
    names: tuple[Name, ...]


def parse(target: str) -> Target:
    """The addresses and names of a target. Raises InvalidRequest naming the part that is neither."""
    addresses: list[Address] = []
    names: list[Name] = []
    for part in target.split(","):
        found = _one(part.strip())
        if isinstance(found, Address):
            addresses.append(found)
        else:
            names.append(found)
    return Target(target, tuple(dict.fromkeys(addresses)), tuple(dict.fromkeys(names)))


async def resolve(name: Name) -> tuple[Address, ...] | None:
    """The addresses of a name now, sorted; None when it cannot be resolved. Does not block the event loop."""
    asked = asyncio.get_running_loop().getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.wait_for(asked, RESOLVE_SECONDS)
    except (OSError, UnicodeError, TimeoutError):  # UnicodeError: no name server can be asked for such a name
        return None
    ipv4 = {str(place[0]) for family, _, _, _, place in found if family == socket.AF_INET}
    ipv6 = {str(place[0]) for family, _, _, _, place in found if family == socket.AF_INET6}
    return tuple(_address(host, name.port, name) for host in sorted(ipv4 or ipv6)) or None


def _one(part: str) -> Address | Name:
    if part.startswith("unix:") and len(part) > len("unix:"):
        return Address(part, part)
    for scheme in SCHEMES:
        if part.startswith(scheme):
            part = part.removeprefix(scheme)
            break
    host, _, port = part.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host) != bracketed or "/" in host:
        raise InvalidRequest(f"target has {part[:80]!r}: {EXPECTED}", param="target")
    try:
        ipaddress.ip_address(host)
    except ValueError as err:
        if bracketed:
            raise InvalidRequest(
                f"target has {part[:80]!r}, which is no IPv6 address: {EXPECTED}", param="target"
            ) from err
        return Name(host, int(port))
    return _address(host, int(port), None)


def _address(host: str, port: int, name: Name | None) -> Address:
    if ":" in host:
        return Address(f"[{host}]:{port}", f"ipv6:[{host}]:{port}", name)
    return Address(f"{host}:{port}", f"ipv4:{host}:{port}", name)
