"""OpenStack Swift with its S3 interface, in one folder: a production object store for tests.

A proxy, an account, a container and an object server on one "device", without replication. They need a file system
with extended attributes, but no root and no system package.
"""

import os
import pwd
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import servers

from support.session import text_of

BUCKET = "ecg"
LISTING_PAGE = 100
"""So many objects are in one answer to a request for a listing, in place of 1,000: a test needs fewer for two pages."""
ACCESS_KEY, SECRET_KEY = "ecg:tester", "tests-only"

_SERVER = """
[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
log_level = WARNING

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""

_PROXY = """
[DEFAULT]
swift_dir = {folder}
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
log_level = WARNING

[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats s3api tempauth slo proxy-server

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:healthcheck]
use = egg:swift#healthcheck

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
log_level = CRITICAL

[filter:listing_formats]
use = egg:swift#listing_formats

[filter:s3api]
use = egg:swift#s3api
location = us-east-1
max_bucket_listing = {page}
dns_compliant_bucket_names = true

[filter:tempauth]
use = egg:swift#tempauth
user_ecg_tester = {secret} .admin

[filter:slo]
use = egg:swift#slo
minimum_segment_size = 1

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""


@dataclass(frozen=True)
class ObjectStore:
    """A running server with the bucket `ecg`, for ACCESS_KEY and SECRET_KEY."""

    endpoint: str
    processes: list[subprocess.Popen]

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def start(folder: Path) -> ObjectStore:
    """Start the servers. Skips the test, with the reason, where Swift cannot run."""
    try:
        from swift.common.ring import RingBuilder
    except Exception as error:  # the package or its C library is absent
        pytest.skip(f"OpenStack Swift cannot be imported: {error}")
    (folder / "devices" / "d1").mkdir(parents=True)
    try:
        probe = folder / "devices" / "probe"
        probe.touch()
        os.setxattr(probe, "user.swift.metadata", b"x" * 255)
    except OSError as error:
        pytest.skip(f"OpenStack Swift needs extended attributes in {folder}: {error}")
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        pytest.skip("OpenStack Swift needs a user with a name")

    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = test\n\n[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    ports = {kind: servers.free_port() for kind in ("account", "container", "object", "proxy")}
    for kind in ("account", "container", "object"):
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
        builder.add_dev(
            {"id": 0, "region": 1, "zone": 1, "weight": 1, "ip": "127.0.0.1", "port": ports[kind], "device": "d1"}
        )
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{kind}.ring.gz"))
    processes = []
    log = folder / "swift.log"
    with log.open("w") as stream:
        for kind, port in ports.items():
            text = _PROXY if kind == "proxy" else _SERVER
            config = folder / f"{kind}-server.conf"
            config.write_text(
                text.format(folder=folder, port=port, user=user, kind=kind, secret=SECRET_KEY, page=LISTING_PAGE)
            )
            command = [sys.executable, Path(sys.executable).with_name(f"swift-{kind}-server"), config, "-v"]
            # Each server makes itself the leader of a session, so each must be ended on its own.
            processes.append(subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True))
    endpoint = f"http://127.0.0.1:{ports['proxy']}"
    store = ObjectStore(endpoint, processes)
    for _ in range(6000):
        if all(_listens(port) for port in ports.values()):
            break
        time.sleep(0.1)
    try:
        store.client().create_bucket(Bucket=BUCKET)
    except Exception as error:
        store.end()
        pytest.skip(f"OpenStack Swift does not answer ({error}):\n{text_of(log)[-2000:]}")
    return store


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
