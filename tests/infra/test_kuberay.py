"""Check infra/kuberay without a cluster: the parts that KubeRay, Ray's autoscaler, Serve and the workflows read."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.readme import (
    PINS,
    README,
    ROOT,
    SECRET,
    docker_environment,
    load,
    parse_command,
    shell_commands,
)

import lsemvae

FOLDER = ROOT / "infra" / "kuberay"
CLUSTERS = ("cluster", "pretrain", "serve")

# The fields of KubeRay 1.6.2, from its API reference. Kubernetes drops or refuses unknown fields.
RAY_CLUSTER = (
    "upgradeStrategy authOptions suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling "
    "gcsFaultToleranceOptions headGroupSpec rayVersion workerGroupSpecs"
)
RAY_JOB = (
    "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector submitterConfig "
    "managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus "
    "entrypointNumGpus ttlSecondsAfterFinished preRunningDeadlineSeconds shutdownAfterJobFinishes suspend"
)
RAY_SERVICE = (
    "rayClusterDeletionDelaySeconds serveService upgradeStrategy managedBy serveConfigV2 rayClusterConfig "
    "excludeHeadPodFromServeSvc"
)
AUTH = "enableK8sTokenAuth secretName mode"
AUTOSCALER = (
    "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version env envFrom volumeMounts"
)
HEAD = "template headService enableIngress resources labels rayStartParams serviceType"
WORKERS = (
    "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds resources labels rayStartParams template "
    "scaleStrategy numOfHosts"
)


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def resource(name: str) -> dict:
    (only,) = documents(name)
    return only


def cluster_spec(name: str) -> dict:
    spec = resource(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups(name: str) -> list[dict]:
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods() -> Iterator[tuple[str, dict]]:
    """All pods of all files: (file and group, spec of the pod)."""
    for name in CLUSTERS:
        for group in groups(name):
            yield f"{name} {group.get('groupName', 'head')}", group["template"]["spec"]
    yield "pretrain submitter", resource("pretrain")["spec"]["submitterPodTemplate"]["spec"]


POD = pytest.mark.parametrize("pod", [pytest.param(pod, id=name) for name, pod in pods()])


def test_every_file_is_covered_here() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {"settings", *CLUSTERS}


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [("cluster", "RayCluster", RAY_CLUSTER), ("pretrain", "RayJob", RAY_JOB), ("serve", "RayService", RAY_SERVICE)],
)
def test_custom_resources_have_only_fields_that_kuberay_knows(name: str, kind: str, fields: str) -> None:
    found = resource(name)
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", kind)
    assert found.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert found["spec"].keys() <= set(fields.split())
    spec = cluster_spec(name)
    assert spec.keys() <= set(RAY_CLUSTER.split())
    assert spec["authOptions"].keys() <= set(AUTH.split())
    assert spec.get("autoscalerOptions", {}).keys() <= set(AUTOSCALER.split())
    assert spec["headGroupSpec"].keys() <= set(HEAD.split())
    for group in spec["workerGroupSpecs"]:
        assert group.keys() <= set(WORKERS.split())
        assert {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= group.keys()
    for group in groups(name):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # KubeRay refuses numbers here


@pytest.mark.parametrize("name", CLUSTERS)
def test_versions_are_the_pinned_ones(name: str) -> None:
    assert cluster_spec(name)["rayVersion"] == PINS["ray"]
    images = {c["image"] for _, pod in pods() for c in pod["containers"]}
    (pushed,) = re.findall(r"^docker push (\S+)", README, re.MULTILINE)
    assert images == {pushed}
    assert pushed.endswith(f":{lsemvae.__version__}")
    assert load("ray_cluster.yaml")["docker"]["image"] == pushed


@pytest.mark.parametrize("name", CLUSTERS)
def test_rays_autoscaler_reads_the_cluster(name: str) -> None:
    """Ray's own reader of a RayCluster accepts it; the reader also checks the result against Ray's schema."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    read = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "lsemvae", "namespace": "lsemvae"}, "spec": cluster_spec(name)}
    )
    types = read["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert "GPU" not in types["headgroup"]["resources"]
    gpus = {key: node["resources"].get("GPU", 0) for key, node in types.items()}
    if name == "cluster":
        on_aws = load("ray_cluster.yaml")
        limits = {key: node["max_workers"] for key, node in types.items() if key != "headgroup"}
        assert limits == {key: on_aws["available_node_types"][key]["max_workers"] for key in ("cpu", "a100")}
        assert gpus["a100"] == on_aws["available_node_types"]["a100"]["resources"]["GPU"]
        assert read["idle_timeout_minutes"] == on_aws["idle_timeout_minutes"]
    if name == "pretrain":  # there is no autoscaler, so the pods must fit the command
        assert "enableInTreeAutoscaling" not in cluster_spec(name)
        (workers,) = cluster_spec(name)["workerGroupSpecs"]
        words = shlex.split(resource(name)["spec"]["entrypoint"])
        assert workers["replicas"] * gpus["a100"] == int(words[words.index("--num-workers") + 1])
    else:
        assert cluster_spec(name)["enableInTreeAutoscaling"] is True
        assert cluster_spec(name)["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", CLUSTERS)
def test_start_parameters_are_options_of_ray_start(name: str) -> None:
    for position, group in enumerate(groups(name)):
        role = ["--head"] if position == 0 else ["--address=10.0.0.1:6379"]
        parse_command(["ray", "start", *role, *(f"--{key}={value}" for key, value in group["rayStartParams"].items())])
    assert groups(name)[0]["rayStartParams"]["num-cpus"] == "0"


@POD
def test_pod_runs_as_a_user_with_no_more_rights_than_it_needs(pod: dict) -> None:
    user = re.search(r"^USER (\d+)", (ROOT / "infra" / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert [set(volume) - {"name"} for volume in pod.get("volumes", [])] in (
        [],
        [{"emptyDir"}],
    )  # none of the host
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        asked, allowed = container["resources"]["requests"], container["resources"]["limits"]
        assert asked["memory"] == allowed["memory"]
        if "nvidia.com/gpu" in allowed:
            assert asked["nvidia.com/gpu"] == allowed["nvidia.com/gpu"]  # Kubernetes does not share GPUs
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
            assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "p4d.24xlarge"}
            (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
            assert mount == {"name": volume["name"], "mountPath": re.search(r"--cache (\S+)", README)[1]}
        else:
            assert "tolerations" not in pod  # work without GPUs does not take a GPU machine


def test_accounts_exist_and_workers_cannot_use_kubernetes() -> None:
    accounts = {d["metadata"]["name"]: d for d in documents("settings") if d["kind"] == "ServiceAccount"}
    used = {name: pod.get("serviceAccountName") for name, pod in pods()}
    assert {name.split()[-1]: account for name, account in used.items()} == {
        "head": "lsemvae-head", "cpu": "lsemvae-worker", "a100": "lsemvae-worker", "submitter": None
    }  # fmt: skip
    assert accounts.keys() == {"lsemvae-head", "lsemvae-worker"}
    assert accounts["lsemvae-worker"]["automountServiceAccountToken"] is False
    assert dict(pods())["pretrain submitter"]["automountServiceAccountToken"] is False
    for name in CLUSTERS:  # the autoscaler runs in its own container, beside the head
        options = cluster_spec(name).get("autoscalerOptions")
        assert options is None or options["securityContext"]["allowPrivilegeEscalation"] is False
        assert groups(name)[0]["template"]["spec"]["nodeSelector"] == {"eks.amazonaws.com/capacityType": "ON_DEMAND"}


@POD
def test_environment_comes_from_the_settings(pod: dict) -> None:
    for container in pod["containers"]:
        assert container["envFrom"] == [
            {"configMapRef": {"name": "lsemvae"}},
            {"secretRef": {"name": "lsemvae-credentials", "optional": True}},
        ]


def test_clusters_set_every_variable_that_the_code_reads() -> None:
    """On AWS and on Kubernetes. Optional: the address of a store other than S3, alternative names, limits of time."""
    sources = [path.read_text() for folder in ("lsemvae", "serve") for path in (ROOT / folder).rglob("*.py")]
    needed = set(re.findall(r"""environ(?:\.get\(|\[)["'](\w+)""", "\n".join(sources)))
    assert "MLFLOW_TRACKING_URI" in needed
    needed -= {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS"}
    needed -= {"MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"}
    needed -= {"MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "PYTHONPATH", "TRITON_INTERPRET"}
    # The endpoint's tokens are secret: a file on AWS, a Secret on Kubernetes.
    needed -= {"LSEMVAE_TOKENS", "LSEMVAE_TOKENS_FILE", "LSEMVAE_COHORT_PREFIXES", "LSEMVAE_COHORT_ARGS"}
    (settings,) = [d["data"] for d in documents("settings") if d["kind"] == "ConfigMap"]
    on_aws = docker_environment(load("ray_cluster.yaml"))
    assert needed <= settings.keys()
    assert needed <= on_aws.keys()
    for name in settings.keys() & on_aws.keys():
        assert settings[name] == on_aws[name]
    assert all(isinstance(value, str) for value in settings.values())
    assert not [name for name in settings if SECRET.search(name)]


def test_the_endpoint_finds_its_tokens() -> None:
    """Without any it does not start."""
    mounted = load("ray_cluster.yaml")["file_mounts"]
    assert docker_environment(load("ray_cluster.yaml"))["LSEMVAE_TOKENS_FILE"] in mounted
    assert "LSEMVAE_TOKENS" in (FOLDER / "settings.yaml").read_text()
    assert "LSEMVAE_TOKENS" in load("infra/compose.yaml")["services"]["serve"]["environment"]


def test_token_authentication_is_on_everywhere_and_no_file_holds_a_secret() -> None:
    text = "\n".join(path.read_text() for path in FOLDER.iterdir())
    made = re.search(r"create secret generic (\S+) --from-file=(\w+)=\$HOME/\.ray/auth_token", text)
    secret, key = made.groups()
    assert key == "auth_token"  # what KubeRay looks for
    for name in CLUSTERS:
        assert cluster_spec(name)["authOptions"] == {"mode": "token", "secretName": secret}
    (submitter,) = dict(pods())["pretrain submitter"]["containers"]
    given = {entry["name"]: entry for entry in submitter["env"]}
    assert given["RAY_AUTH_MODE"]["value"] == "token"
    assert given["RAY_AUTH_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": secret, "key": key}}
    assert not [d for name in ("settings", *CLUSTERS) for d in documents(name) if d["kind"] == "Secret"]
    written = [e for _, pod in pods() for c in pod["containers"] for e in c.get("env", []) if SECRET.search(e["name"])]
    assert not [entry for entry in written if "value" in entry]


def test_service_deploys_what_serve_config_says() -> None:
    """infra/kuberay/serve.yaml equals serve/config.yaml except for the address: change both together."""
    from ray.serve.schema import ServeDeploySchema

    given, original = yaml.safe_load(resource("serve")["spec"]["serveConfigV2"]), load("serve/config.yaml")
    ServeDeploySchema.model_validate(given)
    assert given["http_options"].pop("host") == "0.0.0.0"
    assert original["http_options"].pop("host") == "127.0.0.1"
    assert given == original


def test_service_sends_requests_only_to_pods_that_answer() -> None:
    """Ports and probe match Serve's, and no probe needs a program that the image lacks."""
    port = load("serve/config.yaml")["http_options"]["port"]
    head, *workers = groups("serve")
    for group in (head, *workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "serve", "containerPort": port} in container["ports"]
    for group in workers:
        (container,) = group["template"]["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": port}
        assert "exec" not in container["readinessProbe"]
        assert group["minReplicas"] >= 1
    assert resource("serve")["spec"]["excludeHeadPodFromServeSvc"] is True
    # The replicas of serve/config.yaml fit into the smallest number of pods.
    (deployment,) = load("serve/config.yaml")["applications"][0]["deployments"]
    wanted = deployment["ray_actor_options"]["num_cpus"] * (deployment.get("num_replicas") or 1)
    assert wanted <= sum(
        int(g["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) * g["minReplicas"] for g in workers
    )


def test_job_is_the_readmes_pretraining(environment: None) -> None:
    from command import WORKERS_NEED
    from ray.runtime_env import RuntimeEnv
    from ray.runtime_env.runtime_env import _merge_runtime_env

    spec = resource("pretrain")["spec"]
    home = re.findall(r"^WORKDIR (\S+)", (ROOT / "infra" / "Dockerfile").read_text(), re.MULTILINE)[-1]
    assert spec["entrypoint"].startswith(f"python {home}/workflows/")  # the job uploads no working directory
    args = parse_command(shlex.split(spec["entrypoint"].replace(f"{home}/", "")))
    (line,) = [line for line in shell_commands() if line.startswith("ray job submit") and "pretrain.py" in line]
    assert vars(args) == vars(parse_command(shlex.split(line)))
    brought = yaml.safe_load(spec["runtimeEnvYAML"])
    assert brought == {"env_vars": load("infra/runtime_env.yaml")["env_vars"]}
    assert _merge_runtime_env(RuntimeEnv(**brought), {"env_vars": dict.fromkeys(WORKERS_NEED, "x")}) is not None
    assert spec["shutdownAfterJobFinishes"] is True  # no GPU costs after the job
    assert "clusterSelector" not in spec


def test_commands_in_the_comments_name_what_there_is() -> None:
    comments = "\n".join(re.findall(r"^# (.*)", "".join(p.read_text() for p in FOLDER.iterdir()), re.MULTILINE))
    applied = re.findall(r"apply --filename (\S+)", comments)
    assert {Path(path).stem for path in applied} == {"settings", "pretrain", "serve"}
    assert all((ROOT / path).is_file() for path in applied)
    names = {d["kind"]: d["metadata"]["name"] for name in CLUSTERS for d in documents(name)}
    services = set(re.findall(r"service/(\S+)", comments))
    assert services == {
        f"{names['RayCluster']}-head-svc",
        f"{names['RayService']}-serve-svc",
    }  # KubeRay's names
    assert re.findall(r"logs --follow job/(\S+)", comments) == [names["RayJob"]]
