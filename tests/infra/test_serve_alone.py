"""README.md's command that serves on one machine, where a killed Ray has left its address behind."""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
import servers
import yaml
from support import bundles
from support.readme import load, shell_commands
from support.session import ROOT


@pytest.mark.ray
def test_the_command_for_one_machine_starts_its_own_ray_beside_a_stale_address(tmp_path: Path):
    (line,) = [line for line in shell_commands() if line.endswith("serve run serve/config.yaml")]
    variable, program, *words = shlex.split(line)
    bundles.save(tmp_path / "model")
    config = load("serve/config.yaml")
    config["http_options"]["port"] = port = servers.free_port()
    config["applications"][0]["args"] |= {"models": [str(tmp_path / "model")], "bundles": str(tmp_path / "kept")}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    log = tmp_path / "serve.log"
    # Ray's sockets need a short path. RAY_TMPDIR keeps the stale address away from other programs of this machine.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        (Path(folder) / "ray").mkdir()
        stale = f"127.0.0.1:{servers.free_port()}"  # nothing listens there
        (Path(folder) / "ray" / "ray_current_cluster").write_text(stale)
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"RAY_TMPDIR": folder, "LSEMVAE_TOKENS": "a-token-of-the-test", **dict([variable.split("=", 1)])}
        command = [str(Path(sys.executable).with_name(program)), *words[:-1], str(tmp_path / "serve.yaml")]
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            servers.wait_until_healthy(f"http://127.0.0.1:{port}/readyz", process, log)
            bearer = {"Authorization": "Bearer a-token-of-the-test"}
            assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=bearer, timeout=30).status_code == 200
        finally:
            servers.end(process)
        assert stale not in log.read_text()
