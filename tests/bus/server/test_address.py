"""The grammar of bus URLs: whatever names a bus is read, and everything else is refused at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError

from elesh.bus import BadAddress, embedded_server, require_address
from elesh.bus.server.address import parse
from elesh.bus.server.embedded import place_of
from elesh.settings import Settings
from elesh.trainer import Session


@pytest.mark.parametrize(
    ("url", "hosts", "database", "user", "password"),
    [
        ("redis://h", (("h", 6379),), 0, "", ""),
        ("redis://u:p%40%2F%23@h:1/3", (("h", 1),), 3, "u", "p@/#"),
        ("redis://u:p@ss@h/0", (("h", 6379),), 0, "u", "p@ss"),
        ("redis://u:pa/s?s#x@h:6379/1", (("h", 6379),), 1, "u", "pa/s?s#x"),
        ("redis://u:12/3@h/1", (("h", 6379),), 1, "u", "12/3"),
        ("redis://:%C3%BC%20+@h/0", (("h", 6379),), 0, "", "ü +"),
        ("rediss://u:p@[fe80::1]:7/2", (("fe80::1", 7),), 2, "u", "p"),
        ("redis://h?db=3&protocol=2", (("h", 6379),), 3, "", ""),
        ("redis+sentinel://a:1,[::1]:2/m/2?sentinel_password=x@y",
         (("a", 1), ("::1", 2)), 2, "", ""),
        ("redis+cluster://u:p@a,b:7001", (("a", 6379), ("b", 7001)), 0, "u", "p"),
    ],
)  # fmt: skip
def test_what_names_a_bus_is_read(url, hosts, database, user, password):
    found = parse(url)
    assert (found.hosts, found.database) == (hosts, database)
    assert (found.username, found.password) == (user, password)
    assert "password" not in repr(found)


@pytest.mark.parametrize(
    ("url", "path", "database", "password"),
    [
        ("unix:///run/x@y.sock?db=2", "/run/x@y.sock", 2, ""),
        ("unix://u:p/w@/run/a%20b.sock", "/run/a b.sock", 0, "p/w"),
        ("redis+embedded:///home/%C3%9Cbung%FF/redis", "/home/Übung\udcff/redis", 0, ""),
    ],
)
def test_places_of_this_machine_are_read(url, path, database, password):
    found = parse(url)
    assert (found.path, found.database, found.password) == (path, database, password)


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("", "scheme"), ("localhost:6379", "scheme"), ("redis:/h", "scheme"),
        ("redis://" + "a" * 64, "no host"), ("redis://" + "a." * 127 + "a", "no host"),
        ("redis://h:99999", "99999"), ("redis://h:0", "port 0"), ("redis://h:x", "address 'h:"),
        ("redis://::1:6379", "brackets"), ("redis://[::g]", "version 6"),
        ("redis://h/abc", "database number"), ("redis://h/-1", "database number"),
        ("redis://h/0/1", "database number"), ("redis://h/1?db=2", "1 and 2"),
        ("redis://h\n", "host:port"), ("redis://a b", "host:port"),
        ("redis://u:p@h/0?x=a@b", "option 'x'"), ("redis://h?db=1&db=1", "once"),
        ("redis://h?protocol=3", "protocol=3"), ("redis://h1,h2", "2 addresses"),
        ("redis://h?ssl_ca_certs=/x", "rediss://"), ("rediss://h?ssl_keyfile=/no/such", "/no/such"),
        ("rediss://h?ssl_check_hostname=maybe", "true or false"), ("unix://", "absolute"),
        ("unix:///" + "x" * 200, "107"), ("redis+cluster://a/3", "only 0"),
    ],
)  # fmt: skip
def test_what_names_no_bus_is_refused_at_once_by_trainer_and_worker(url, named):
    with pytest.raises(BadAddress, match=named):
        require_address(url)
    if url:
        with pytest.raises(BadAddress, match=named):
            Session("run", url, Settings())


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:se-cret@host/x", "redis://:se-cret", "redis://user:se-cret",
        "unix://user:se-cret", "unix://user:se-cret@no/slash", "user:se-cret@host:6379/0",
        "redis:user:se-cret@host", "redis://h/0?passwd=se-cret", "redis://h?Password=se-cret",
    ],
)  # fmt: skip
def test_a_password_is_not_in_what_is_said_of_a_url(url):
    with pytest.raises(BadAddress) as caught:
        require_address(url)
    assert "se-cret" not in str(caught.value)


def test_tls_files_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(BadAddress, match="found none at"):
        require_address(f"rediss://h?ssl_keyfile={tmp_path}")


def test_an_embedded_server_is_looked_for_in_the_folder_that_was_named(tmp_path: Path):
    with embedded_server(tmp_path):
        assert asyncio.run(place_of(tmp_path / "redis")).port
        with pytest.raises(ConnectionError, match=f"no embedded server in {tmp_path}/other"):
            asyncio.run(place_of(tmp_path / "other"))
