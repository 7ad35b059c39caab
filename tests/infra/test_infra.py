"""Everything around the code: the cluster file, the image, compose, the jobs' environment, and what the README says."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from support.readme import (
    DOCKERFILE,
    PINS,
    README,
    SECRET,
    blocks,
    click_context,
    docker_environment,
    endpoint_paths,
    load,
    parse_command,
    shell_commands,
)
from support.session import ROOT

import lsemvae
from lsemvae.recipes import COMPARED, FINETUNE, PRETRAIN

# ---- ray_cluster.yaml


@pytest.fixture
def cluster() -> dict:
    return load("ray_cluster.yaml")


def test_cluster_is_valid_with_rays_defaults_filled_in(cluster: dict) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(copy.deepcopy(cluster))
    validate_config(filled)
    assert filled["setup_commands"] == cluster["setup_commands"]
    assert filled["head_setup_commands"] == cluster["setup_commands"]  # not Ray's own, which install Ray
    assert filled["available_node_types"]["head"]["max_workers"] == 0


def test_cluster_file_refuses_a_misspelt_field(cluster: dict) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster["available_node_types"]["cpu"]["max_worker"] = 3
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(cluster))


def test_rays_launcher_starts_every_node_type_on_mocked_aws(cluster: dict, environment: None) -> None:
    """Ray's own launcher makes the network, keys, security group and one machine of each type on moto."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    filled = prepare_config(copy.deepcopy(cluster))
    types = filled["available_node_types"]
    with mock_aws():
        iam = boto3.client("iam", region_name=cluster["provider"]["region"])
        for profile in {t["node_config"]["IamInstanceProfile"]["Name"] for t in types.values()}:
            iam.create_instance_profile(InstanceProfileName=profile)
        bootstrapped = AWSNodeProvider.bootstrap_config(filled)
        provider = AWSNodeProvider(bootstrapped["provider"], bootstrapped["cluster_name"])
        lifecycle, cpus_and_gpus = {}, {}
        for name, node_type in bootstrapped["available_node_types"].items():
            tags = {"ray-node-type": "head" if name == "head" else "worker", "ray-user-node-type": name}
            created = provider.create_node(node_type["node_config"], tags, 1)
            (instance,) = created.values()
            lifecycle[name] = instance.instance_lifecycle or "on demand"
            assert [group["GroupName"] for group in instance.security_groups] == ["lsemvae-ray"]
            kind = boto3.client("ec2", region_name=cluster["provider"]["region"]).describe_instance_types(
                InstanceTypes=[instance.instance_type]
            )["InstanceTypes"][0]
            gpus = sum(gpu["Count"] for gpu in kind.get("GpuInfo", {}).get("Gpus", []))
            cpus_and_gpus[name] = (kind["VCpuInfo"]["DefaultVCpus"], gpus)
    assert lifecycle == {"head": "on demand", "cpu": "spot", "a100": "spot"}
    # The declared resources are those of the machine, except for the head, which does no work.
    for name in ("cpu", "a100"):
        declared = types[name]["resources"]
        assert (declared["CPU"], declared.get("GPU", 0)) == cpus_and_gpus[name]
    assert types["a100"]["node_config"]["InstanceType"] == "p4d.24xlarge"


def test_head_takes_no_work_and_keeps_no_recordings(cluster: dict) -> None:
    head = cluster["available_node_types"]["head"]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    (start,) = [command for command in cluster["head_start_ray_commands"] if "--head" in command]
    assert "--num-cpus=0" in start and "--num-gpus=0" in start
    assert cluster["provider"]["cache_stopped_nodes"] is False
    for node_type in cluster["available_node_types"].values():
        for device in node_type["node_config"]["BlockDeviceMappings"]:
            assert device["Ebs"]["Encrypted"] and device["Ebs"]["DeleteOnTermination"]


def test_every_node_authenticates_by_token_and_the_file_holds_none(cluster: dict) -> None:
    variables = docker_environment(cluster)
    assert variables["RAY_AUTH_MODE"] == "token"
    assert {"MLFLOW_TRACKING_URI", "BUCKET"} <= variables.keys()
    assert variables["AWS_REGION"] == cluster["provider"]["region"]
    assert not [name for name in variables if SECRET.search(name) and not name.endswith("_FILE")]
    (target,) = [target for target, source in cluster["file_mounts"].items() if source == "~/.ray/auth_token"]
    home = re.search(r"HOME=(\S+)", DOCKERFILE)[1]
    assert target == f"{home}/.ray/auth_token"


MODELS = {"p4d": 8 * ["Amazon EC2 NVMe Instance Storage"], "root": ["Amazon Elastic Block Store"]}


@pytest.mark.parametrize(
    ("mounted", "done"),
    [
        ([], ["mdadm --create /dev/md0 --level=0 --raid-devices=8 D", "mkfs.ext4 -q /dev/md0", "mount /dev/md0 M"]),
        (["/opt/dlami/nvme"], ["mount --bind /opt/dlami/nvme M"]),
        (["/opt/dlami/nvme", "/mnt/nvme"], []),
        (["/mnt/nvme"], []),
    ],
    ids=["bare drives", "joined by AWS's image", "joined, and set up before", "set up before"],
)
def test_gpu_nodes_mount_their_nvme_drives_for_the_cache(
    cluster: dict, tmp_path: Path, mounted: list[str], done: list[str]
) -> None:
    """Run the commands, with stubs for the programs that change a machine."""
    node_type = cluster["available_node_types"]["a100"]
    (command,) = node_type["initialization_commands"]
    target = re.search(r"--cache (\S+)", README)[1]
    assert node_type["docker"]["worker_run_options"] == [f"--volume {target}:{target}"]
    assert re.search(rf"mkdir -p .*{target}\b", DOCKERFILE)  # without a mount the folder belongs to the image's user
    drives = [f"/dev/nvme{n}n1 {model}" for n, model in enumerate(MODELS["root"] + MODELS["p4d"])]
    programs = {
        "sudo": 'echo "$*" >> "$LOG"',
        "lsblk": "cat <<'END'\n" + "\n".join(drives) + "\nEND",
        "mountpoint": 'case " $MOUNTED " in *" $2 "*) ;; *) exit 1;; esac',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "LOG": str(log), "MOUNTED": " ".join(mounted)}
    # Ray's launcher runs it in this form: `bash -c "… && (COMMAND)"`.
    subprocess.run(["bash", "-c", f"true && ({command})"], check=True, env=environment)
    joined = " ".join(f"/dev/nvme{n}n1" for n in range(1, 9))
    done = [line.replace(" M", f" {target}").replace(" D", f" {joined}") for line in done]
    assert log.read_text().splitlines() == [f"mkdir -p {target}", *done, f"chown 1000:1000 {target}"]


def test_setup_commands_check_the_pinned_versions(cluster: dict) -> None:
    """Run the commands in this environment, which has the pinned versions."""
    text = " ".join(cluster["setup_commands"])
    assert f"version {PINS['ray']}" in text
    assert PINS["torch"] in text
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in cluster["setup_commands"]:
        subprocess.run(["bash", "-c", command], check=True, env=os.environ | {"PATH": path}, timeout=60)


def test_start_commands_are_understood_by_ray(cluster: dict) -> None:
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        parse_command(shlex.split(command.replace("$RAY_HEAD_IP", "10.0.0.1")))


# ---- infra/Dockerfile


def instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def test_image_is_pinned_and_runs_as_a_user() -> None:
    steps = instructions(DOCKERFILE)
    (base,) = [argument for name, argument in steps if name == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    users = [argument for name, argument in steps if name == "USER"]
    assert users
    assert users[-1] == "1000"
    assert "useradd --create-home --uid 1000" in DOCKERFILE
    installs = [argument for name, argument in steps if name == "RUN" and "pip install" in argument]
    assert installs
    assert all("--constraint constraints.txt" in argument and "--no-cache-dir" in argument for argument in installs)
    assert not [argument for name, argument in steps if name == "ADD"]
    assert re.search(rf"^ARG TORCH={re.escape(PINS['torch'])}$", DOCKERFILE, re.MULTILINE)


def test_image_installs_what_pyproject_names_at_the_pinned_versions() -> None:
    """Run the image's command on this pyproject.toml: it prints all but what tests need; each has a pin."""
    code = re.search(r'python -c "([^"]+)"', DOCKERFILE)[1]
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (all_of,) = extras["all"]
    names = re.fullmatch(r"lsemvae\[([\w,]+)\]", all_of)[1].split(",")
    wanted = project["dependencies"] + [
        line for name in names for line in extras[name] if not line.startswith("lsemvae")
    ]
    assert any(line.startswith("ecgdatakit") for line in wanted)
    assert printed.splitlines() == wanted
    pinned = {name.lower().replace("_", "-") for name in PINS}
    without_pin = {re.match(r"[\w-]+", line)[0].lower() for line in wanted} - pinned
    assert without_pin <= {"rich"}  # nothing here imports it
    replaced = re.sub(r"^torch==.*", "torch==9.9.9", (ROOT / "infra" / "constraints.txt").read_text(), flags=re.M)
    assert replaced.count("torch==9.9.9") == 1


def test_image_copies_only_what_the_build_may_see() -> None:
    ignore = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = set()
    for name, argument in instructions(DOCKERFILE):
        if name == "COPY":
            copied |= {word for word in argument.split()[:-1] if not word.startswith("--")}
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


def test_image_tags_are_this_version() -> None:
    files = [ROOT / "ray_cluster.yaml", *(ROOT / "infra" / "kuberay").iterdir()]
    tags = re.findall(r"\blsemvae:(\d[\w.]*)", DOCKERFILE + README + "".join(path.read_text() for path in files))
    tags += [service["image"].split(":")[1] for service in own_services().values()]
    assert set(tags) == {lsemvae.__version__}


# ---- infra/compose.yaml


@pytest.fixture
def compose() -> dict:
    return load("infra/compose.yaml")


def own_services() -> dict:
    return {name: s for name, s in load("infra/compose.yaml")["services"].items() if s["image"].startswith("lsemvae:")}


def test_compose_services_are_pinned_private_and_watched(compose: dict) -> None:
    assert set(compose["services"]) == {"store", "mlflow", "serve", "job"}
    for name, service in compose["services"].items():
        assert re.search(r":\d[\w.]*$", service["image"]), f"{name}: no fixed version"
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to the network"
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in compose["services"][other]
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"]
        if name != "job":  # the other services run until they are stopped
            assert service["healthcheck"]["test"][0] == "CMD"
            assert service["restart"] == "unless-stopped"
    for service in own_services().values():
        context = (ROOT / "infra" / service["build"]["context"]).resolve()
        assert context == ROOT.resolve()
        assert (context / service["build"]["dockerfile"]).is_file()


def test_compose_holds_no_secret_and_asks_for_those_it_needs(compose: dict) -> None:
    found = 0
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            assert isinstance(value, str), f"{name}: compose wants text, quote it"
            if SECRET.search(name):
                found += 1
                assert re.sub(r"\$\{\w+:\?[^}]+\}", "", value).strip('",') == "", f"{name} is written down"
    assert found == 8


def test_compose_names_one_mlflow_and_one_store(compose: dict) -> None:
    """Addresses and ports fit together, and MLflow answers to the name that the others use."""
    services = compose["services"]
    command = services["mlflow"]["command"]
    settings = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--"))
    called = {services[name]["environment"]["MLFLOW_TRACKING_URI"] for name in ("serve", "job")}
    assert called == {f"http://mlflow:{settings['port']}"}
    assert f"mlflow:{settings['port']}" in settings["allowed-hosts"].split(",")
    (published,) = services["mlflow"]["ports"]
    assert published.rsplit(":", 1)[0] in settings["allowed-hosts"].split(",")

    start = services["store"]["entrypoint"][-1]
    (port,) = re.findall(r"--addr :(\d+)", start)
    bucket = re.search(r"mkdir -p /data/(\S+)", start)[1]
    assert settings["artifacts-destination"].startswith(f"s3://{bucket}/")
    for name in ("mlflow", "serve", "job"):
        assert services[name]["environment"]["AWS_ENDPOINT_URL"] == f"${{S3_ENDPOINT_URL:-http://store:{port}}}"
    assert services["store"]["healthcheck"]["test"][-1] == port
    database = settings["backend-store-uri"].removeprefix("sqlite:///")
    (mount,) = [volume.split(":")[1] for volume in services["mlflow"]["volumes"]]
    assert Path(database).parent == Path(mount)
    assert mount in DOCKERFILE  # the image makes it, so that it does not belong to root


def test_compose_starts_mlflow_with_options_that_it_has(compose: dict) -> None:
    from mlflow.cli import cli

    program, *words = compose["services"]["mlflow"]["command"]
    assert program == "mlflow"
    context = click_context(cli, words)
    assert context.params["workers"] == "1"


def test_compose_serves_on_the_containers_address(compose: dict, tmp_path: Path) -> None:
    """Run the shell line up to `exec`: its result equals serve/config.yaml except for the address."""
    shell, flag, line = compose["services"]["serve"]["command"]
    prepare, start = line.split(" && exec ")
    target = tmp_path / "serve.yaml"
    subprocess.run([shell, flag, prepare.replace("/tmp/serve.yaml", str(target))], cwd=ROOT, check=True)
    written, original = yaml.safe_load(target.read_text()), load("serve/config.yaml")
    assert written["http_options"]["host"] == "0.0.0.0"
    written["http_options"]["host"] = original["http_options"]["host"]
    assert written == original
    parse_command(shlex.split(start.replace("/tmp/serve.yaml", "serve/config.yaml")))
    assert compose["services"]["serve"]["ports"] == [f"127.0.0.1:{original['http_options']['port']}:8000"]


def test_docker_compose_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not here")
    command = [docker, "compose", "--file", "infra/compose.yaml", "--profile", "serve", "--profile", "job", "config"]
    variables = {"S3_ACCESS_KEY": "a", "S3_SECRET_KEY": "b", "LSEMVAE_TOKENS": "c"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- infra/runtime_env.yaml


def test_runtime_environment_is_valid_and_brings_no_secret() -> None:
    from ray.runtime_env import RuntimeEnv

    content = load("infra/runtime_env.yaml")
    RuntimeEnv(working_dir=str(ROOT), **content)
    assert all(isinstance(value, str) for value in content["env_vars"].values())
    assert not [name for name in content["env_vars"] if SECRET.search(name)]


@pytest.mark.parametrize("with_file", [True, False], ids=["as in README.md", "without --runtime-env"])
def test_job_uploads_the_code_and_little_else(with_file: bool, tmp_path: Path) -> None:
    """Let Ray make its zip of `--working-dir .` from a checkout with local files."""
    from ray._private.runtime_env.packaging import create_package
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

    checkout = tmp_path / "checkout"
    local = shutil.ignore_patterns(".venv", ".git", "demo", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, checkout, ignore=local)
    heavy = [".venv/lib/torch.so", ".git/objects/pack", "demo/shards/0.parquet", "mlruns/0/model", "mlflow.db"]
    heavy += ["lsemvae/__pycache__/a.pyc"] + (["data/0.dat", "cohort/0.parquet", "model.safetensors"] * with_file)
    for name in heavy:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(os.urandom(1_000_000))

    target = tmp_path / "package.zip"

    def upload(folder: str, excludes: list[str], **_: object) -> None:
        create_package(folder, target, include_gitignore=True, excludes=excludes)

    runtime_env = {"working_dir": str(checkout)} | (load("infra/runtime_env.yaml") if with_file else {})
    sent = upload_working_dir_if_needed(runtime_env, include_gitignore=True, upload_fn=upload)
    assert sent["working_dir"].startswith("gcs://")
    assert target.stat().st_size < 6e6  # Ray does not compress: 5 MB are the tracked files
    with ZipFile(target) as package:
        names = {name for name in package.namelist() if not name.endswith("/")}
    assert not names & set(heavy)
    code = {
        str(p.relative_to(ROOT)) for folder in ("lsemvae", "workflows", "serve") for p in (ROOT / folder).rglob("*.py")
    }
    assert "lsemvae/data/feed.py" in code and code | {"serve/config.yaml"} <= names
    if with_file:
        assert not [name for name in names if re.match(r"docs/|tests/|infra/|data/", name)]


def test_job_and_workflow_name_different_variables(environment: None) -> None:
    """Ray refuses a job whose driver passes a variable that the job's environment sets too."""
    from command import WORKERS_NEED
    from ray.runtime_env.runtime_env import _merge_runtime_env

    drivers = {"env_vars": dict.fromkeys(WORKERS_NEED, "x")}
    assert _merge_runtime_env(load("infra/runtime_env.yaml"), drivers) is not None


# ---- README.md


@pytest.mark.parametrize("line", shell_commands(), ids=lambda line: " ".join(line.split()))
def test_readme_command_is_understood(line: str, environment: None) -> None:
    parse_command(shlex.split(line))


def test_readme_commands_for_a_cluster_are_all_there(environment: None) -> None:
    jobs = {}
    for line in shell_commands():
        if line.startswith("ray job submit"):
            assert "--working-dir . --runtime-env infra/runtime_env.yaml -- python" in line
            jobs[re.search(r"workflows/(\w+)\.py", line)[1]] = parse_command(shlex.split(line))
    assert jobs.keys() == {"ingest", "pretrain", "finetune", "score"}
    paper, pretraining = PRETRAIN["paper"], jobs["pretrain"].recipe
    of_batch = ("batch_size", "learning_rate", "warmup_steps", "compile")
    batch = {name: getattr(pretraining.optim, name) for name in of_batch}
    assert pretraining == replace(paper, optim=replace(paper.optim, **batch), streams=pretraining.streams)
    assert pretraining.optim.batch_size == 8 * paper.optim.batch_size  # 128 a GPU
    assert pretraining.streams % 8 == 0 and pretraining.optim.warmup_steps > 0
    assert jobs["pretrain"].use_gpu and str(jobs["pretrain"].num_workers) == "8"
    # Each command takes the result of the one before.
    sources = {
        parse_command(shlex.split(line)).output
        for line in shell_commands()
        if line.startswith("ray job submit") and "workflows/ingest.py" in line
    }
    assert {*jobs["pretrain"].data, jobs["finetune"].data, jobs["score"].data} == sources
    assert jobs["finetune"].encoder == f"models:/{jobs['pretrain'].model_name}@candidate"
    name = f"{jobs['finetune'].task}-{jobs['finetune'].leads}L"
    assert f"python workflows/promote.py --name {name}" in shell_commands()
    assert jobs["score"].model == f"models:/{name}@champion"
    assert jobs["score"].model in load("serve/config.yaml")["applications"][0]["args"]["models"]


def test_readme_make_targets_exist() -> None:
    named = set(re.findall(r"\bmake ([\w-]+)", "\n".join(shell_commands())))
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "ui", "lint"} <= named
    assert named <= defined


def test_readme_links_and_paths_exist() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", README, re.M)
    }
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link
    top = "|".join(re.escape(path.name) for path in ROOT.iterdir() if not path.name.startswith("."))
    for path in re.findall(rf"`((?:{top})(?:/[\w./-]*)?)`", README):
        assert (ROOT / path).exists(), path


def test_readme_names_exactly_the_recipes() -> None:
    """The table in README.md has the names, epochs, batches and learning rates of lsemvae/recipes.py."""
    rows = re.findall(r"^\| (pretrain|finetune) \| `([\w-]+)` \| (\S+) \| (\S+) \| (\S+) \|", README, re.MULTILINE)
    shown = {(workflow, name): (float(e), float(b), float(rate)) for workflow, name, e, b, rate in rows}
    assert len(shown) == len(rows)
    assert shown == {
        (workflow, name): (recipe.optim.epochs, recipe.optim.batch_size, recipe.optim.learning_rate)
        for workflow, recipes in (("pretrain", PRETRAIN), ("finetune", FINETUNE))
        for name, recipe in recipes.items()
        if name not in COMPARED
    }


def test_readme_names_every_compared_method() -> None:
    (line,) = [line for line in README.splitlines() if line.startswith("Methods to compare with")]
    named = set(re.findall(r"`([a-z-]+)`", line.split("The names are")[1]))
    assert named == {name.rsplit("-", 1)[0] for name in COMPARED}


def test_readme_tree_is_real_and_has_every_workflow() -> None:
    (tree,) = blocks("text")
    parents: list[str] = []
    paths = set()
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        path = "".join(parents)
        assert (ROOT / path).is_dir() if name.endswith("/") else (ROOT / path).is_file(), path
        paths.add(path)
    assert {f"workflows/{path.name}" for path in (ROOT / "workflows").glob("*.py")} <= paths


def test_readme_reading_order_is_the_packages() -> None:
    (sentence,) = re.findall(r"Read these six files first: (.+)\.$", lsemvae.__doc__, re.MULTILINE)
    section = README.split("Six files first:")[1].split(". ")[0]
    assert re.findall(r"\[([\w/.]+)\]", section) == sentence.split(", ")


def test_readme_request_is_one_that_the_endpoint_takes() -> None:
    from serve.inputs import to_record
    from serve.schema import ScoreRequest

    (example,) = blocks("json")
    request = ScoreRequest.model_validate_json(example)
    record = to_record(request.records[0])
    assert record.leads == ("I", "II", "III", "aVR", "aVL", "aVF")
    # The example is a possible ECG: Einthoven's law holds.
    one, two, three = record.signal_mv_LT[:3]
    assert abs((two - one - three)[:2]).max() < 1e-6


def test_readme_makes_a_request_from_a_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Python of README.md on a simulated recording: only rounding changes it."""
    import numpy as np

    from lsemvae.cohorts.simulated import CohortConfig, simulate_cohort
    from lsemvae.formats import read
    from serve.inputs import to_record
    from serve.schema import ScoreRequest

    simulate_cohort(CohortConfig(subjects=2, seed=0, mean_studies=1.0), tmp_path / "cohort")
    header = next((tmp_path / "cohort").rglob("*.hea"))
    (code,) = (block for block in blocks("python") if "recording.json" in block)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("recording.hea", str(header)), {})
    written = tmp_path / "recording.json"
    request = ScoreRequest.model_validate(json.loads(written.read_text()))
    sent, recorded = to_record(request.records[0]), read(header)
    assert sent.leads == recorded.leads
    np.testing.assert_allclose(sent.signal_mv_LT, recorded.signal_mv_LT, atol=6e-5)


def test_picture_is_a_drawing_that_needs_nothing() -> None:
    from xml.etree import ElementTree

    picture = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join(picture.itertext())
    for path in re.findall(r"[\w/]+\.py", text):
        assert (ROOT / path).is_file() or (ROOT / "workflows" / path).is_file(), path
    references = [value for node in picture.iter() for name, value in node.attrib.items() if name.endswith("href")]
    assert not references


def test_readme_requests_are_those_of_the_endpoint() -> None:
    section = README.split("## The endpoint")[1].split("## ")[0]
    named = set(re.findall(r"[` ](/(?:v1/)?[\w/.]+)`", section)) - {"/v1/cohorts/ID"}
    assert {"/v1/score", "/v1/score/file", "/v1/cohorts", "/readyz", "/openapi.json"} <= named
    assert named <= endpoint_paths()
