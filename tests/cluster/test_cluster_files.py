"""What ``cluster/`` ships for Kubernetes and VMs: valid for those who read it, consistent with
each other and the project.

KubeRay's own CRDs are not part of the repository: ``LONGROPE2_KUBERAY_CRDS`` names a directory
with their YAML, plain or gzipped; ``../shared/fixtures/kuberay-crds`` is looked at by itself.
"""

import copy
import functools
import gzip
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

import longrope2_ray
from longrope2_ray.cli.exit_codes import FENCED
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CRDS = Path(
    os.environ.get("LONGROPE2_KUBERAY_CRDS", ROOT.parent / "shared" / "fixtures" / "kuberay-crds")
)
HADOLINT = Path(sys.executable).parent / "hadolint"

MANIFESTS = {
    path.name: yaml.safe_load(path.read_text())
    for path in sorted((CLUSTER / "kuberay").glob("*.yaml"))
}
JOBS = {name: manifest for name, manifest in MANIFESTS.items() if manifest["kind"] == "RayJob"}
LAUNCHERS = {
    path.name: yaml.safe_load(path.read_text())
    for path in sorted((CLUSTER / "launcher").glob("*.yaml"))
}
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)

each_manifest = pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
each_job = pytest.mark.parametrize("manifest", JOBS.values(), ids=JOBS)
each_launcher = pytest.mark.parametrize("config", LAUNCHERS.values(), ids=LAUNCHERS)
needs_crds = pytest.mark.skipif(
    not list(CRDS.glob("*.yaml*")),
    reason=f"KubeRay's CRDs are not at hand in {CRDS}; set LONGROPE2_KUBERAY_CRDS",
)


def ray_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    """The RayClusterSpec of a RayCluster or a RayJob."""
    spec = manifest["spec"]
    return spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod specs: the head's, then one of each worker group."""
    spec = ray_cluster(manifest)
    return [
        group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


def mappings(node: Any) -> list[dict[str, Any]]:
    """Every mapping anywhere in a YAML document."""
    if isinstance(node, list):
        return [found for item in node for found in mappings(item)]
    if isinstance(node, dict):
        return [node, *(found for item in node.values() for found in mappings(item))]
    return []


# --- KubeRay's schema


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON schema that refuses unknown fields, as ``kubectl apply
    --validate=strict`` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    if schema.get("nullable"):
        result["type"] = [result["type"], "null"]
    return result


def rules_that_apply(
    _: Any, rules: list[dict[str, Any]], *__: Any
) -> Iterator[jsonschema.ValidationError]:
    """CEL rules are the API server's to evaluate: a field that carries one is an error here,
    so that somebody looks."""
    yield from (
        jsonschema.ValidationError(f"the CEL rule {rule['rule']} applies") for rule in rules
    )


Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, {"x-kubernetes-validations": rules_that_apply}
)


@functools.cache  # the schemas are a few MB of YAML
def validator(kind: str) -> jsonschema.Draft202012Validator:
    (path,) = CRDS.glob(f"ray.io_{kind.lower()}s.yaml*")
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    return Validator(strict(version["schema"]["openAPIV3Schema"]))


@needs_crds
@each_manifest
def test_a_manifest_is_valid_for_kuberays_own_schema(manifest):
    assert manifest["apiVersion"] == "ray.io/v1"
    errors = [
        f"{error.json_path}: {error.message}"
        for error in validator(manifest["kind"]).iter_errors(manifest)
    ]
    assert not errors
    # What the operator checks beside the schema: RayCluster names it derives must stay DNS labels.
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,45}[a-z0-9]", manifest["metadata"]["name"])


@needs_crds
@each_manifest
def test_a_misspelt_or_mistyped_field_deep_in_a_manifest_is_refused(manifest):
    def broken(path: list[Any], value: Any) -> list[str]:
        changed = copy.deepcopy(manifest)
        node = ray_cluster(changed)
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return [error.message for error in validator(manifest["kind"]).iter_errors(changed)]

    head = ["headGroupSpec", "template", "spec", "containers", 0]
    worker = ["workerGroupSpecs", 0, "template", "spec"]
    assert "'imagePullPolcy' was unexpected" in broken([*head, "imagePullPolcy"], "Always")[0]
    assert (
        "'runAsNonroot' was unexpected"
        in broken([*worker, "securityContext", "runAsNonroot"], True)[0]
    )
    assert (
        "'sizelimit' was unexpected"
        in broken([*worker, "volumes", 0, "emptyDir", "sizelimit"], "1Gi")[0]
    )
    assert "'autoscaler' was unexpected" in broken(["autoscaler"], {})[0]
    assert "not one of ['disabled', 'token']" in broken(["authOptions", "mode"], "tokens")[0]
    assert "not of type 'integer'" in broken(["workerGroupSpecs", 0, "maxReplicas"], "many")[0]
    assert "is a required property" in broken(["headGroupSpec"], {})[0]
    assert "CEL rule self in ['ray.io/kuberay-operator'" in " ".join(
        broken(["managedBy"], "ray.io/kuberay-operator")
    )
    assert not broken(["rayVersion"], "2.60.0")


# --- what the manifests promise


@each_manifest
def test_every_container_requests_what_it_is_limited_to(manifest):
    resources = [container(pod)["resources"] for pod in pods(manifest)]
    resources.append(ray_cluster(manifest)["autoscalerOptions"]["resources"])
    for resource in resources:
        assert resource["requests"] == resource["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(resource["limits"])


@each_manifest
def test_authentication_is_on_and_left_to_the_operator(manifest):
    assert ray_cluster(manifest)["authOptions"] == {"mode": "token"}
    for pod in pods(manifest):
        assert not [
            e["name"] for e in container(pod).get("env", []) if e["name"].startswith("RAY_AUTH")
        ]


@each_manifest
def test_the_head_stays_on_demand_and_works_for_no_one_but_the_driver(manifest):
    head, spec = pods(manifest)[0], ray_cluster(manifest)
    assert head["nodeSelector"] == {"longrope2/capacity": "on-demand"}
    assert "tolerations" not in head
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert "nvidia.com/gpu" not in container(head)["resources"]["limits"]
    assert head["serviceAccountName"] == "longrope2-head"
    assert head.get("automountServiceAccountToken", True), (
        "the autoscaler talks to the Kubernetes API"
    )


@each_manifest
def test_workers_are_spot_machines_from_zero_by_the_autoscaler_of_version_2(manifest):
    spec = ray_cluster(manifest)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group, pod in zip(spec["workerGroupSpecs"], pods(manifest)[1:], strict=True):
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        assert pod["nodeSelector"] == {"longrope2/capacity": "spot"}
        tolerated = {t["key"] for t in pod["tolerations"]}
        gpus = "nvidia.com/gpu" in container(pod)["resources"]["limits"]
        assert tolerated == {"longrope2/capacity"} | ({"nvidia.com/gpu"} if gpus else set())
        if not gpus:  # on whatever machine it lands, it promises none
            assert group["rayStartParams"] == {"num-gpus": "0"}
            assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container(pod)["env"]
        assert pod["automountServiceAccountToken"] is False
        assert "drain-node --reason DRAIN_NODE_REASON_PREEMPTION" in str(
            container(pod)["lifecycle"]["preStop"]
        )
    assert "nvidia.com/gpu" in container(pods(manifest)[1])["resources"]["limits"]


@each_manifest
def test_no_pod_runs_as_root_or_may_become_it(manifest):
    user = int(re.findall(r"^USER (\d+)$", DOCKERFILE, re.M)[-1])
    for pod in pods(manifest):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["fsGroup"] == user
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    contexts = [container(pod)["securityContext"] for pod in pods(manifest)]
    for context in [*contexts, ray_cluster(manifest)["autoscalerOptions"]["securityContext"]]:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not any(
        m.get("privileged") or m.get("hostPath") or m.get("hostNetwork") for m in mappings(manifest)
    )


@each_manifest
def test_shared_memory_has_a_size_that_fits_into_the_pods_memory(manifest):
    for pod in pods(manifest):
        (volume,) = pod["volumes"]
        assert container(pod)["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert volume["emptyDir"]["medium"] == "Memory"
        size, memory = (
            volume["emptyDir"]["sizeLimit"],
            container(pod)["resources"]["limits"]["memory"],
        )
        assert 0 < int(size.removesuffix("Gi")) <= int(memory.removesuffix("Gi")) / 2


def job_recipe(manifest: dict[str, Any]) -> tuple[str, str, Recipe]:
    """The entrypoint of a RayJob, as (script, run directory, recipe with its overrides)."""
    line, _ = manifest["spec"]["entrypoint"].split("||")
    python, script, recipe, flag, run_dir, *overrides = shlex.split(line)
    assert (python, flag) == ("python", "--run-dir")
    return script, run_dir, load_recipe(recipe, overrides)


@each_job
def test_a_job_runs_a_script_of_the_repository_with_a_recipe_that_it_ships(manifest):
    script, run_dir, recipe = job_recipe(manifest)
    assert (ROOT / script).is_file()
    assert run_dir.startswith("s3://")
    assert run_dir.endswith(f"/{recipe.name}")


@each_job
def test_a_job_asks_for_as_many_gpus_as_its_workers_may_have(manifest):
    script, _, recipe = job_recipe(manifest)
    (group,) = ray_cluster(manifest)["workerGroupSpecs"]
    limits = container(group["template"]["spec"])["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"])
    # The cluster starts without GPUs, so nothing may follow from what is there at the start.
    assert recipe.model.device == "cuda"
    if script == "jobs/search.py":
        asked, cpus = (
            recipe.scorer.num_scorers * recipe.scorer.gpus_per_scorer,
            recipe.scorer.cpus_per_scorer,
        )
        assert recipe.scorer.start_seconds >= 3600, "spot machines may be long in coming"
    else:
        asked, cpus = recipe.train.num_workers, recipe.train.cpus_per_worker
    assert asked == group["maxReplicas"] * gpus
    assert gpus * cpus <= int(limits["cpu"])


@each_job
def test_a_job_tries_again_until_it_is_done_and_then_frees_the_cluster(manifest):
    spec = manifest["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert not spec.get("suspend")


@each_job
@pytest.mark.parametrize(
    ("status", "ends_well"), [(0, True), (1, False), (2, False), (FENCED, True), (130, False)]
)
def test_a_job_whose_run_a_newer_driver_took_over_is_done_and_not_tried_again(
    manifest, tmp_path, status, ends_well
):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {status}\n")
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    # as Ray runs it: through a shell
    done = subprocess.run(manifest["spec"]["entrypoint"], shell=True, check=False, env=environment)
    assert (done.returncode == 0) is ends_well


@each_job
def test_a_driver_that_is_told_to_stop_has_time_to_flush(manifest):
    runtime_env = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])
    assert runtime_env["working_dir"].startswith("s3://")
    head = pods(manifest)[0]
    assert (
        30
        <= int(runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
        < head["terminationGracePeriodSeconds"]
    )
    *_, command = container(head)["lifecycle"]["preStop"]["exec"]["command"]
    patterns = re.findall(r"p(?:kill -TERM|grep) -f '([^']+)'", command)
    assert len(patterns) == 2
    for pattern in patterns:
        assert re.search(pattern, manifest["spec"]["entrypoint"])
        assert not re.search(pattern, f"/bin/sh -c {command}"), "the hook would wait for itself"


def test_there_is_a_cluster_to_submit_to_and_a_job_for_search_and_for_training():
    kinds = {name: manifest["kind"] for name, manifest in MANIFESTS.items()}
    assert kinds == {
        "ray-cluster.yaml": "RayCluster",
        "search-job.yaml": "RayJob",
        "train-job.yaml": "RayJob",
    }
    assert {job_recipe(m)[0] for m in JOBS.values()} == {"jobs/search.py", "jobs/train.py"}
    assert len({job_recipe(m)[1] for m in JOBS.values()}) == 1, (
        "training takes the winner of the search's run directory"
    )


# --- secrets

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.I)
SECRET_TEXT = re.compile(
    r"AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|-----BEGIN|://[^/\s:]+:[^@\s]+@"
)


def secret_values(document: Any, text: str) -> list[str]:
    """Names that look like a secret's and have a value beside them, and text that looks like a
    secret."""
    variables = [
        m["name"]
        for m in mappings(document)
        if "value" in m and SECRET_NAME.search(str(m.get("name", "")))
    ]
    options = [
        name for name in re.findall(r"(?:--env[= ]|-e )(\w+)=", text) if SECRET_NAME.search(name)
    ]
    settings = re.findall(
        r"^\s*-?\s*\w*(?:SECRET|PASSWORD|ACCESS_KEY|TOKEN)\w*\s*[:=]\s*\S+", text, re.M
    )
    return variables + options + settings + SECRET_TEXT.findall(text)


def test_no_secret_has_a_value_in_any_file():
    for path in [*(CLUSTER / "kuberay").iterdir(), *(CLUSTER / "launcher").iterdir()]:
        text = path.read_text()
        assert not secret_values(yaml.safe_load(text), text), path
    assert not secret_values(None, DOCKERFILE)
    assert not [
        n for n in re.findall(r"^(?:ENV|ARG) (\w+)", DOCKERFILE, re.M) if SECRET_NAME.search(n)
    ]
    for manifest in MANIFESTS.values():
        for pod in pods(manifest):
            assert container(pod)["envFrom"] == [
                {"secretRef": {"name": "longrope2-credentials", "optional": True}}
            ]


@pytest.mark.parametrize(
    "text",
    [
        "env: [{name: HF_TOKEN, value: abc}]",
        "run_options: [--env=AWS_SECRET_ACCESS_KEY=abc]",
        "AWS_SECRET_ACCESS_KEY: abc",
        "url: s3://me:word@bucket",
        "note: AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_a_secret_with_a_value_would_be_found(text):
    assert secret_values(yaml.safe_load(text), text)


# --- versions and the image


def test_one_image_one_version_of_ray_everywhere():
    ray, cuda = (
        PINS["ray"],
        set(re.findall(r"^FROM nvidia/cuda:(\d+\.\d+)\.\d+-\w+-ubuntu24\.04", DOCKERFILE, re.M)),
    )
    assert len(cuda) == 1
    (cuda_version,) = cuda
    images = {container(pod)["image"] for manifest in MANIFESTS.values() for pod in pods(manifest)}
    images |= {config["docker"]["image"] for config in LAUNCHERS.values()}
    images |= set(re.findall(r"docker build .* -t (\S+)", DOCKERFILE))
    assert len(images) == 1
    tag = f"{longrope2_ray.__version__}-ray{ray}-cu{cuda_version.replace('.', '')}"
    assert images.pop().partition(":")[2] == tag
    assert {ray_cluster(manifest)["rayVersion"] for manifest in MANIFESTS.values()} == {ray}
    assert f"ray.__version__ == '{ray}'" in DOCKERFILE
    assert f"torch.version.cuda == '{cuda_version}'" in DOCKERFILE


def test_the_image_has_what_the_project_asks_for():
    (version,) = re.findall(r"flash-attn==(\S+)", DOCKERFILE)
    (gpu,) = PROJECT["optional-dependencies"]["gpu"]
    assert Requirement(gpu).name == "flash-attn"
    assert Requirement(gpu).specifier.contains(version)
    assert f"PyPI's Linux wheel of torch {PINS['torch']} " in DOCKERFILE, (
        "match flash-attn and CUDA to the new torch"
    )
    python = Requirement(f"python{PROJECT['requires-python']}")
    assert {
        v for v in re.findall(r"python(3\.\d+)", DOCKERFILE) if not python.specifier.contains(v)
    } == set()
    pins = [
        install
        for install in re.findall(r"pip install .*", DOCKERFILE)
        if "-c constraints.txt" not in install
    ]
    assert all(
        "==" in word for install in pins for word in install.split()[3:] if re.match(r"\w", word)
    )
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M)
    sent = {
        line[1:]
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
        if line[:1] == "!"
    }
    assert {name for names in copied for name in names.split()} == sent
    assert all((ROOT / name).exists() for name in sent)


def test_the_launcher_mounts_the_token_where_the_images_user_looks():
    """Ray takes a container's home from the image's HOME, and else /root, which user 1001
    cannot read."""
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    (home,) = re.findall(r"^ENV .*\bHOME=(\S+)", final, re.M)
    (user,) = re.findall(r"useradd --uid 1001 --create-home (\w+)", final)
    assert home == f"/home/{user}"
    # Without the folder Docker makes it for the mount, as root.
    assert f"install -d -o {user} -g {user} {home}/.ray" in final
    assert f"USER {1001}" in final


def lint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HADOLINT), "-"], input=dockerfile, capture_output=True, text=True, check=False
    )


def test_the_dockerfile_passes_its_linter():
    assert HADOLINT.exists(), "pip install -c constraints.txt -e '.[dev]' brings hadolint"
    result = lint(DOCKERFILE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(
        name in ("DL3008", "DL3013") for name in re.findall(r"hadolint ignore=(\S+)", DOCKERFILE)
    )
    assert re.findall(r"^USER (\d+)$", DOCKERFILE, re.M)[-1] != "0"
    assert not re.search(r"^ADD |https?://", DOCKERFILE, re.M)


def test_the_linter_would_refuse_an_unpinned_base_and_a_root_user():
    result = lint("FROM ubuntu:latest\nRUN apt-get update && apt-get install -y curl\nUSER root\n")
    assert result.returncode != 0
    assert {"DL3007", "DL3002", "DL3009"} <= set(re.findall(r"DL\d+", result.stdout))


# --- Ray's cluster launcher


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As ``ray up`` sees it. Ray has no public name for its check, and no machine is needed
    for it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


@each_launcher
def test_a_launcher_file_is_valid_for_ray(config):
    full = prepared(config)
    assert (
        not full["setup_commands"] + full["head_setup_commands"] + full["worker_setup_commands"]
    ), "all is in the image"
    with pytest.raises(jsonschema.ValidationError, match="head_node_typ"):
        prepared({**config, "head_node_typ": "head"})


@each_launcher
def test_a_launcher_file_turns_authentication_on_and_keeps_the_dashboard_to_the_head(config):
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert (
        "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][-1]
    )
    assert "--address=$RAY_HEAD_IP:6379" in config["worker_start_ray_commands"][-1]


def test_on_prem_machines_are_all_used_without_saying_so_twice():
    node = prepared(LAUNCHERS["on-prem.yaml"])["available_node_types"]["local.cluster.node"]
    assert (
        node["min_workers"]
        == node["max_workers"]
        == len(LAUNCHERS["on-prem.yaml"]["provider"]["worker_ips"])
    )


def test_on_aws_the_head_is_on_demand_and_workers_are_spot_machines_from_zero():
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    types = prepared(LAUNCHERS["aws.yaml"])["available_node_types"]
    head, workers = types["head"], types["gpu-spot"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (
        workers["min_workers"] == 0 < workers["max_workers"] == LAUNCHERS["aws.yaml"]["max_workers"]
    )
    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in (head, workers):
        # Ray's own default is too old for the image's CUDA.
        assert node["node_config"]["ImageId"].startswith("ami-")
        parameters = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(parameters, shape).generate_report()
        assert ParamValidator().validate({**parameters, "InstanceTyp": "x"}, shape).has_errors()
