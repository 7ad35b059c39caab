"""A command asks the cluster's autoscaler for machines: Ray's own, on a cluster that starts real nodes when asked."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from support.session import AUTHENTICATION, ROOT, end_group, text_of

HEAD, WORKER = "ray.head.default", "two-cpus"
NODE_CPUS, MOST_NODES = 2, 3
HANGS_S = 600
"""A wait of this length has failed. It bounds waiting; it does not measure speed."""
ASKING = ROOT / "tests" / "support" / "asking.py"


@contextlib.contextmanager
def growing(folder: Path, version: int) -> Iterator[dict[str, str]]:
    """A cluster without CPUs whose autoscaler adds nodes of two CPUs, three at most -> how to join it.

    `version` is Ray's version of the autoscaler: 1 is what `ray up` starts, 2 is KubeRay's. All is in one process
    group.
    """
    port, dashboard, client, agent = (servers.free_port() for _ in range(4))
    provider = {
        "type": "external",  # the provider of Ray's own tests: its nodes are real raylets, all on this machine
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{port}",  # otherwise nodes join whatever listens on port 6379
        "head_node_id": "f" * 51 + "00000",
        "launch_multiple": True,
        "use_node_id_as_ip": True,  # all nodes have one address
        "disable_node_updaters": True,  # nobody logs in to set a node up
        "disable_launch_config_check": True,
    }
    nodes = {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        WORKER: {
            "resources": {"CPU": NODE_CPUS, "object_store_memory": 2**27},
            "node_config": {}, "min_workers": 0, "max_workers": MOST_NODES,
        },
    }  # fmt: skip
    config = {"cluster_name": "growing", "max_workers": MOST_NODES, "idle_timeout_minutes": 60, "provider": provider}
    config |= {"upscaling_speed": 100.0, "head_node_type": HEAD, "available_node_types": nodes}
    # Ray asks for these too, though nobody sets these nodes up.
    config |= {key: {} for key in ("auth", "docker", "file_mounts")}
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    lists += ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    config |= {key: [] for key in lists} | {"file_mounts_sync_continuously": False}
    (folder / "autoscaling.json").write_text(json.dumps(config))
    environment = AUTHENTICATION | {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_DISABLE_IMPORT_WARNING": "1"}
    start = AUTHENTICATION | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    if version == 2:
        ids = ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING")
        start |= dict.fromkeys(ids, provider["head_node_id"]) | {"RAY_enable_autoscaler_v2": "1"}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1", f"--object-store-memory={2**27}"]
    # The names of Ray's sockets hold this path, and may have 107 characters: pytest's folder is too long.
    session, log = Path(tempfile.mkdtemp(prefix="ray-")), folder / "ray.log"
    command += [f"--temp-dir={session}", f"--autoscaling-config={folder / 'autoscaling.json'}"]
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=inherited | start, cwd=folder, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        while "Ray runtime started" not in text_of(log):
            assert process.poll() is None, text_of(log)[-3000:]
            time.sleep(0.05)
        yield environment
    finally:
        end_group(process)  # the autoscaler started the other nodes, in this group
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.parametrize("version", [1, 2])
def test_a_cluster_without_cpus_grows_as_it_is_asked_to(version: int, tmp_path: Path):
    """A node for a worker; then all the nodes there may be, for three trials of a worker; it cannot have a GPU."""
    asked = [
        {"what": "require", "use_gpu": False, "wait_s": HANGS_S},
        {"what": "trials", "wanted": 3, "wait_s": HANGS_S},  # on one node no trial fits
        {"what": "require", "use_gpu": True, "wait_s": 1},
    ]
    with growing(tmp_path, version) as environment:
        path = os.pathsep.join(map(str, (ROOT, ROOT / "workflows")))
        done = subprocess.run(
            [sys.executable, str(ASKING), json.dumps(asked)], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | environment | {"PYTHONPATH": path},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, three, none = map(json.loads, done.stdout.splitlines())
    # The demand is withdrawn afterwards, and an autoscaler is known for what it is.
    common = {"demand": [], "grows": True}
    assert one == common | {"before": 0, "after": NODE_CPUS}
    assert three == common | {"before": NODE_CPUS, "trials": 2, "after": NODE_CPUS * MOST_NODES}
    error = "1 workers cannot be had: the cluster has 0 GPU, 1 are needed (waited 1 s, see --wait-s): "
    error += "ask for fewer --num-workers, or add machines"
    assert none == common | {"before": NODE_CPUS * MOST_NODES, "after": NODE_CPUS * MOST_NODES, "error": error}
    assert "waiting for machines: the cluster has 0 CPU, 2 are needed" in done.stderr
