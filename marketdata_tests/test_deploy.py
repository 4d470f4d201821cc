"""`deploy/` is checked without a cluster: what reads a file there reads it here.

That is Kubernetes' own models, Dagster and our command line.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import dagster as dg
import pytest
import yaml
from dagster._config import process_config
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.instance.ref import InstanceRef
from dagster._core.launcher import LaunchRunContext
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._serdes import serialize_value
from dagster_aws.s3 import S3ComputeLogManager
from dagster_k8s import K8sRunLauncher
from dagster_postgres.utils import pg_url_from_config
from kubernetes import client
from moto.server import ThreadedMotoServer
from typer.main import get_command

from marketdata_assets.cli.main import app
from marketdata_assets.settings.fields import reveal_secret
from marketdata_assets.settings.load import load_settings

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
K8S = DEPLOY / "kubernetes"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OURS = {"web", "daemon", "worker"}
VALUES = yaml.safe_load((K8S / "values.yaml").read_text())
USER = 10001


# --------------------------------------------------------------------------------- Kubernetes
PLAIN: dict[str, Any] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "datetime": str,
}


def faults(value: Any, kind: str, place: str) -> Iterator[str]:
    """Yield what the API server refuses or ignores: unknown fields, wrong types, missing fields.

    `kind` is a type as Kubernetes' models write it.
    """
    if kind == "object" or value is None:
        return
    many = re.fullmatch(r"(list|dict)[\[(](?:str, )?(.+)[\])]", kind)
    wanted = {"list": list, "dict": dict}[many[1]] if many else PLAIN.get(kind, dict)
    if not isinstance(value, wanted) or (kind == "int" and isinstance(value, bool)):
        yield f"{place}: {kind} is expected, not {value!r}"
    elif many:
        for key, item in value.items() if many[1] == "dict" else enumerate(value):
            yield from faults(item, many[2], f"{place}.{key}")
    elif kind not in PLAIN:
        yield from _model_faults(value, getattr(client, kind), place)


def _model_faults(value: dict[str, Any], model: Any, place: str) -> Iterator[str]:
    fields = {name: attribute for attribute, name in model.attribute_map.items()}
    for name in value.keys() - fields.keys():
        yield f"{place}.{name}: {model.__name__} has no such field"
    known = {fields[name]: item for name, item in value.items() if name in fields}
    for attribute, item in known.items():
        yield from faults(
            item, model.openapi_types[attribute], f"{place}.{model.attribute_map[attribute]}"
        )
    try:
        model(**known)  # raises where a required field is missing
    except ValueError as error:
        yield f"{place}: {error}"


def check(document: dict[str, Any]) -> list[str]:
    group, _, version = document["apiVersion"].rpartition("/")
    assert version == "v1"
    assert group in ("", "apps", "batch", "rbac.authorization.k8s.io", "networking.k8s.io")
    return list(faults(document, f"V1{document['kind']}", document["kind"]))


# --------------------------------------------------------------------------------- rendering
def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((K8S / name).read_text()) if document]


def env_file(text: str) -> dict[str, str]:
    return dict(
        line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#")
    )


KUSTOMIZATION = yaml.safe_load((K8S / "kustomization.yaml").read_text())
ENVIRONMENT = env_file((K8S / "environment.env").read_text())


def rendered() -> list[dict[str, Any]]:
    """Render kustomization.yaml by hand.

    `test_kustomize_agrees` compares it with kubectl's own, where there is one.
    """
    found = [document for name in KUSTOMIZATION["resources"] for document in documents(name)]
    for entry in KUSTOMIZATION["configMapGenerator"]:
        data = {Path(name).name: (K8S / name).read_text() for name in entry.get("files", [])}
        for name in entry.get("envs", []):
            data |= env_file((K8S / name).read_text())
        metadata = {"name": entry["name"], "namespace": entry["namespace"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    for document in found:
        if document["kind"] == "Deployment":
            for container in document["spec"]["template"]["spec"]["containers"]:
                container["image"] = ENVIRONMENT["MARKETDATA_IMAGE"]
    return found


RENDERED = rendered()
DEPLOYMENTS = {d["metadata"]["name"]: d for d in RENDERED if d["kind"] == "Deployment"}
SECRET = documents("secret.example.yaml")[0]


def names(kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in RENDERED if document["kind"] == kind}


def test_every_manifest_is_valid() -> None:
    assert [fault for document in [*RENDERED, SECRET] for fault in check(document)] == []
    assert set(DEPLOYMENTS) == {"web", "daemon"}
    assert all(
        d["metadata"].get("namespace", "marketdata") == "marketdata" for d in [*RENDERED, SECRET]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda spec: spec["containers"][0].update(livenesProbe={}),
            "livenesProbe: V1Container has no such field",
        ),
        (lambda spec: spec["containers"][0].pop("name"), "Invalid value for `name`"),
        (lambda spec: spec.update(terminationGracePeriodSeconds="60"), "int is expected"),
        (lambda spec: spec["containers"][0].update(command="marketdata"), "list[str] is expected"),
        (
            lambda spec: spec["containers"][0]["resources"]["limits"].update(cpu=1),
            "str is expected",
        ),
        (
            lambda spec: spec["securityContext"].update(seccompProfile="RuntimeDefault"),
            "V1SeccompProfile is expected",
        ),
    ],
)
def test_the_validator_can_fail(change: Any, message: str) -> None:
    broken = json.loads(json.dumps(DEPLOYMENTS["daemon"]))
    change(broken["spec"]["template"]["spec"])
    assert [fault for fault in check(broken) if message in fault]


def test_kustomization_names_every_manifest() -> None:
    generated = {
        file
        for entry in KUSTOMIZATION["configMapGenerator"]
        for file in [*entry.get("files", []), *entry.get("envs", [])]
    }
    listed = {*KUSTOMIZATION["resources"], *generated}
    others = {"kustomization.yaml", "secret.example.yaml", "values.yaml"}
    assert listed | others == {file.name for file in K8S.iterdir() if file.name != "secret.yaml"}
    assert KUSTOMIZATION["generatorOptions"] == {"disableNameSuffixHash": True}


@pytest.mark.server
@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is absent")
def test_kustomize_agrees(tmp_path: Path) -> None:
    """Another image in environment.env reaches every container; the rest is as rendered here."""
    folder = Path(shutil.copytree(K8S, tmp_path / "k"))
    file = folder / "environment.env"
    file.write_text(
        file.read_text().replace(ENVIRONMENT["MARKETDATA_IMAGE"], "other.example.com/image:9")
    )
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=True
    )
    expected = json.loads(
        json.dumps(RENDERED).replace(ENVIRONMENT["MARKETDATA_IMAGE"], "other.example.com/image:9")
    )
    assert sorted(map(_sorted, yaml.safe_load_all(done.stdout))) == sorted(map(_sorted, expected))


def _sorted(document: Any) -> str:
    return json.dumps(document, sort_keys=True)


# --------------------------------------------------------------------------------- pods
def check_pod(spec: dict[str, Any], long_running: bool) -> None:
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert (security["runAsUser"], security["fsGroup"]) == (USER, USER)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["serviceAccountName"] in names("ServiceAccount")
    maps = {v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v}
    for container in spec["containers"]:
        own = container["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert container["image"] == ENVIRONMENT["MARKETDATA_IMAGE"]
        assert {m["mountPath"] for m in container["volumeMounts"]} == {
            "/etc/marketdata",
            "/state",
            "/tmp",
        }
        assert {m["name"] for m in container["volumeMounts"]} == {
            v["name"] for v in spec["volumes"]
        }
        assert not long_running or {"livenessProbe", "readinessProbe"} <= container.keys()
        maps |= {e["configMapRef"]["name"] for e in container["envFrom"] if "configMapRef" in e}
        assert {e["secretRef"]["name"] for e in container["envFrom"] if "secretRef" in e} == {
            SECRET["metadata"]["name"]
        }
    assert maps == names("ConfigMap")


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_pods(name: str) -> None:
    deployment = DEPLOYMENTS[name]["spec"]
    check_pod(deployment["template"]["spec"], long_running=True)
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]


def test_references_resolve() -> None:
    by_kind = {d["kind"]: d for d in RENDERED}
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in DEPLOYMENTS.values()]
    ports = DEPLOYMENTS["web"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    service = by_kind["Service"]["spec"]
    assert service["selector"] in labels
    assert service["ports"][0]["targetPort"] in [port["name"] for port in ports]
    selectors = [d["spec"]["podSelector"] for d in RENDERED if d["kind"] == "NetworkPolicy"]
    assert all(not selector or selector["matchLabels"] in labels for selector in selectors)
    binding = by_kind["RoleBinding"]
    assert binding["roleRef"]["name"] in names("Role")
    assert [(s["name"], s["namespace"]) for s in binding["subjects"]] == [
        ("marketdata", "marketdata")
    ]


def test_access_is_what_the_launcher_calls() -> None:
    role = next(d for d in RENDERED if d["kind"] == "Role")
    allowed = {
        (resource, verb)
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed >= {
        ("jobs", "create"),
        ("jobs", "delete"),
        ("jobs", "list"),
        ("jobs/status", "get"),
    }
    assert allowed >= {("pods", "list"), ("pods", "get"), ("pods/log", "get"), ("events", "list")}
    assert not any("*" in pair or pair[0] == "secrets" for pair in allowed)
    assert {verb for resource, verb in allowed if not resource.startswith("jobs")} == {
        "get",
        "list",
        "watch",
    }


# --------------------------------------------------------------------------------- Dagster
@pytest.fixture
def instance_ref(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstanceRef:
    for key, value in {
        **ENVIRONMENT,
        "PGPASSWORD": "hunter2/&",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("dagster_k8s.launcher.load_kubernetes_config", lambda **_: None)
    shutil.copy(K8S / "dagster.yaml", tmp_path)
    return InstanceRef.from_dir(str(tmp_path))


def test_dagster_loads_the_settings(instance_ref: InstanceRef) -> None:
    assert instance_ref.event_storage_data.class_name == "PooledPostgresEventLogStorage"
    config = yaml.safe_load((K8S / "dagster.yaml").read_text())["event_log_storage"]["config"]
    fields = {
        key: ENVIRONMENT[value["env"]]
        for key, value in config["postgres_db"].items()
        if key not in ("scheme", "password")
    }
    url = pg_url_from_config({"postgres_db": {**fields, "scheme": config["postgres_db"]["scheme"]}})
    assert url == ENVIRONMENT["MARKETDATA_DATABASE"].replace(
        "postgresql://", "postgresql+psycopg2://"
    ), "ledger and Dagster: one database"
    logs = instance_ref.compute_log_manager
    assert isinstance(logs, S3ComputeLogManager)
    assert logs._s3_bucket == ENVIRONMENT["MARKETDATA_LOGS_BUCKET"]
    assert "hunter2" not in serialize_value(instance_ref), "it stands in the arguments of every run"


def test_limits_are_the_built_in_ones_but_wider() -> None:
    ours = yaml.safe_load((K8S / "dagster.yaml").read_text())
    built_in = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    assert ours["run_monitoring"]["enabled"] is True
    for key in ("telemetry", "nux", "backfills", "schedules", "sensors", "retention"):
        assert ours[key] == built_in[key]
    assert ours["concurrency"]["pools"] == built_in["concurrency"]["pools"]
    runs, most = ours["concurrency"]["runs"], built_in["concurrency"]["runs"]
    (limit,), (narrow,) = runs["tag_concurrency_limits"], most["tag_concurrency_limits"]
    assert (limit["key"], limit["value"]) == (narrow["key"], narrow["value"])
    assert (
        runs["max_concurrent_runs"] - limit["limit"]
        >= most["max_concurrent_runs"] - narrow["limit"]
    ), "places for the open month"


class _Cluster:
    """Replaces the client by which the launcher calls Kubernetes."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, dict[str, Any]]] = []

    def create_namespaced_job_with_retries(self, body: client.V1Job, namespace: str) -> None:
        self.jobs.append((namespace, client.ApiClient().sanitize_for_serialization(body)))


def launch(
    instance: dg.DagsterInstance, launcher: Any, module: ModuleCodePointer
) -> tuple[str, dict[str, Any]]:
    cluster = launcher._api_client = _Cluster()
    if not launcher.has_instance:
        launcher.register_instance(instance)
    origin = JobPythonOrigin(
        "ingest", RepositoryPythonOrigin(sys.executable, module, entry_point=["dagster"])
    )
    job = module.load_target().resolve_job_def("ingest")
    run = instance.create_run_for_job(
        job, job_code_origin=origin, status=dg.DagsterRunStatus.NOT_STARTED
    )
    launcher.launch_run(LaunchRunContext(run, workspace=None))
    ((namespace, manifest),) = cluster.jobs
    assert namespace == "marketdata"
    return run.run_id, manifest


CODE = """
import dagster as dg

@dg.op
def greet():
    print("printed in the pod")

@dg.job(executor_def=dg.in_process_executor)
def ingest():
    greet()

defs = dg.Definitions(jobs=[ingest])
"""


@pytest.fixture
def code(tmp_path: Path) -> ModuleCodePointer:
    """A code location with one small job."""
    (tmp_path / "code_of_the_run.py").write_text(CODE)
    return ModuleCodePointer("code_of_the_run", "defs", str(tmp_path))


def test_a_run_is_a_valid_job(instance_ref: InstanceRef, code: ModuleCodePointer) -> None:
    launcher = instance_ref.run_launcher
    assert isinstance(launcher, K8sRunLauncher)
    assert launcher.supports_check_run_worker_health
    with dg.instance_for_test() as instance:
        _, job = launch(instance, launcher, code)
    assert check(job) == []
    check_pod(job["spec"]["template"]["spec"], long_running=False)
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    assert job["spec"]["backoffLimit"] == 0
    pod = job["spec"]["template"]["spec"]
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == (
        "marketdata-run",
        False,
    )
    (container,) = pod["containers"]
    assert container["args"][:3] == ["dagster", "api", "execute_run"]
    assert "hunter2" not in json.dumps(job)


def test_a_run_needs_nothing_but_its_pod(
    database: str,
    instance_ref: InstanceRef,
    code: ModuleCodePointer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Job's own command runs with its environment alone, without a folder of the daemon.

    State is in a real PostgreSQL, output in S3.
    """
    parts, s3 = urlsplit(database), ThreadedMotoServer(port=0)
    s3.start()
    host, port = s3.get_host_and_port()
    variables = {
        "PGHOST": "",
        "PGUSER": str(parts.username),
        "PGDATABASE": parts.path[1:],
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    boto3.client("s3").create_bucket(Bucket=ENVIRONMENT["MARKETDATA_LOGS_BUCKET"])
    home = tmp_path / "home"
    home.mkdir()
    # the test's server listens on no port
    socket = f"params: {{ host: {parse_qs(parts.query)['host'][0]} }}"
    (home / "dagster.yaml").write_text(
        (K8S / "dagster.yaml")
        .read_text()
        .replace("postgres_db:\n", f"postgres_db:\n      {socket}\n")
    )
    with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home))) as instance:
        run_id, job = launch(instance, instance.run_launcher, code)
        home.rename(tmp_path / "home of the daemon")
        (container,) = job["spec"]["template"]["spec"]["containers"]
        given = {entry["name"]: entry["value"] for entry in container["env"]} | {
            "DAGSTER_HOME": str(tmp_path)
        }
        secret = {"PGPASSWORD": "x", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            container["args"],
            env=ENVIRONMENT | secret | given | variables | path,
            capture_output=True,
            text=True,
        )
        run = instance.get_run_by_id(run_id)
        assert run is not None
        assert run.status is dg.DagsterRunStatus.SUCCESS, done.stderr[-2000:]
        logs = boto3.client("s3").list_objects_v2(Bucket=ENVIRONMENT["MARKETDATA_LOGS_BUCKET"])[
            "Contents"
        ]
        assert [f"{run_id}/compute_logs" in entry["Key"] for entry in logs] == [True, True]
    s3.stop()


def test_helm_values_equal_our_dagster_yaml() -> None:
    """The official chart makes our dagster.yaml of values.yaml, and Dagster accepts it."""
    ours = yaml.safe_load((K8S / "dagster.yaml").read_text())
    helm = VALUES["runLauncher"]["config"]["k8sRunLauncher"]
    config = {
        re.sub(r"[A-Z]|(?<=[a-z])8", lambda m: "_" + m[0].lower() if m[0].isalpha() else m[0], k): v
        for k, v in helm.items()
    }
    config = {
        k: [e["name"] for e in v] if k in ("env_config_maps", "env_secrets") else v
        for k, v in config.items()
    }
    config["run_k8s_config"] = {
        re.sub("[A-Z]", lambda m: "_" + m[0].lower(), k): v
        for k, v in config.pop("run_k8s_config").items()
    }
    expected = ours["run_launcher"]["config"]
    assert {k: config[k] for k in config.keys() & expected.keys()} == {
        k: expected[k] for k in config.keys() & expected.keys()
    }
    assert len(config.keys() & expected.keys()) == 8
    accepted = process_config(
        K8sRunLauncher.config_type(), {**config, "instance_config_map": "dagster-instance"}
    )
    assert accepted.success, accepted.errors
    runs, queue = (
        ours["concurrency"]["runs"],
        VALUES["dagsterDaemon"]["runCoordinator"]["config"]["queuedRunCoordinator"],
    )
    assert (queue["maxConcurrentRuns"], queue["tagConcurrencyLimits"]) == (
        runs["max_concurrent_runs"],
        runs["tag_concurrency_limits"],
    )
    monitoring = {
        re.sub("[A-Z]", lambda m: "_" + m[0].lower(), k): v
        for k, v in VALUES["dagsterDaemon"]["runMonitoring"].items()
    }
    assert monitoring == ours["run_monitoring"]
    database = VALUES["postgresql"]
    assert (database["enabled"], database["postgresqlPassword"], database["postgresqlHost"]) == (
        False,
        "",
        ENVIRONMENT["PGHOST"],
    )
    assert (
        database["postgresqlScheme"] == ours["event_log_storage"]["config"]["postgres_db"]["scheme"]
    )


def test_helm_pods() -> None:
    (deployment,) = VALUES["dagster-user-deployments"]["deployments"]
    for pod in (deployment, VALUES["dagsterWebserver"], VALUES["dagsterDaemon"]):
        assert (
            f"{pod['image']['repository']}:{pod['image']['tag']}" == ENVIRONMENT["MARKETDATA_IMAGE"]
        )
        assert pod["podSecurityContext"]["runAsNonRoot"] is True
        assert list(faults(pod["podSecurityContext"], "V1PodSecurityContext", "pod")) == []
        assert list(faults(pod["securityContext"], "V1SecurityContext", "container")) == []
        assert list(faults(pod["volumes"], "list[V1Volume]", "volumes")) == []
        assert list(faults(pod["volumeMounts"], "list[V1VolumeMount]", "mounts")) == []
        assert list(faults(pod["resources"], "V1ResourceRequirements", "resources")) == []


# --------------------------------------------------------------------------------- Compose
SERVICE_KEYS = {
    *(
        "image",
        "build",
        "hostname",
        "user",
        "init",
        "read_only",
        "cap_drop",
        "security_opt",
        "restart",
        "stop_grace_period",
        "mem_limit",
    ),
    *(
        "shm_size",
        "networks",
        "ports",
        "configs",
        "volumes",
        "tmpfs",
        "environment",
        "command",
        "healthcheck",
        "depends_on",
        "deploy",
    ),
    "logging",
}


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_compose_services(name: str) -> None:
    service = COMPOSE["services"][name]
    assert set(service) <= SERVICE_KEYS
    assert not service["user"].startswith(("0", "root"))
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert set(service["healthcheck"]) == {"test", "interval", "timeout", "retries", "start_period"}
    assert service["mem_limit"]
    assert re.search(r":.*\d", service["image"]), "a pinned tag"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert bool(service.get("ports")) == (name == "web")
    for other, needs in service.get("depends_on", {}).items():
        assert "healthcheck" in COMPOSE["services"][other]
        assert needs == {"condition": "service_healthy"}
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    assert all(volume.split(":")[0] in COMPOSE["volumes"] for volume in service.get("volumes", []))


def test_compose_secrets_have_no_default() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "MARKETDATA_LAKE"}
    assert not re.search(r"\$\{\w*(?:PASSWORD|SECRET|KEY)\w*(?::?-|\})", text)
    example = (DEPLOY / ".env.example").read_text()
    assert env_file(example) == dict.fromkeys(asked, ""), "required ones are there and empty"
    optional = set(re.findall(r"^# (\w+)=$", example, re.M))
    passed_on = {
        key for key, value in COMPOSE["services"]["web"]["environment"].items() if value is None
    }
    assert optional == passed_on | set(re.findall(r"\$\{(\w+):-", text))


def interpolate(text: str) -> str:
    return re.sub(
        r"\$\{(\w+):[?-][^}]*\}",
        lambda m: {"MARKETDATA_LAKE": "s3://bucket/prefix"}.get(m[1], "s3cret"),
        text,
    )


IMAGE_ENV = dict(re.findall(r"(MARKETDATA_\w+)=(\S+)", (DEPLOY / "Dockerfile").read_text()))


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_the_universe_loads(where: str) -> None:
    """The variables and the universe of a container are settings that many workers can share."""
    compose = {
        k: interpolate(v)
        for k, v in COMPOSE["services"]["worker"]["environment"].items()
        if v is not None
    }
    environ = {**IMAGE_ENV, **(compose if where == "compose" else ENVIRONMENT)}
    file = ROOT / "data" / "universe.yaml" if where == "compose" else K8S / "universe.yaml"
    settings = load_settings({**environ, "MARKETDATA_UNIVERSE": str(file)})
    assert settings.lake.startswith("s3://")
    assert (settings.rollups, settings.state) == ("parquet", Path("/state"))
    database, broker = reveal_secret(settings.database), reveal_secret(settings.broker)
    assert database is not None
    assert database.startswith("postgresql://marketdata@postgres")
    assert broker == ("redis://:s3cret@redis:6379/0" if where == "compose" else None)
    config = "/etc/marketdata/universe.yaml"
    assert (
        config
        == IMAGE_ENV["MARKETDATA_UNIVERSE"]
        == COMPOSE["services"]["worker"]["configs"][0]["target"]
    )


# --------------------------------------------------------------------------------- image, secrets
def test_dockerfile() -> None:
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    bases = [rest.split()[0] for step, rest in steps if step == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", bases[0])
    assert [rest for step, rest in steps if step == "USER"][-1] == f"{USER}:{USER}"
    assert "ENTRYPOINT" not in {step for step, _ in steps}, (
        "the arguments of a run are a whole command"
    )
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignored[0] == "*"
    sources = {
        s
        for step, rest in steps
        if step == "COPY" and not rest.startswith("--from")
        for s in rest.split()[:-1]
    }
    assert sources == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
    assert not any(fnmatch.fnmatch(source, "*.env") for source in sources)
    extras = set(re.search(r'"\.\[([\w,]+)\]"', text)[1].split(","))  # type: ignore[index]
    assert {"workers", "kubernetes"} <= extras
    assert all(
        re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        for extra in extras
    )


def commands() -> Iterator[list[str]]:
    """Yield every command that a file of deploy/ starts."""
    for name in OURS:
        service = COMPOSE["services"][name]
        yield from (service["command"], service["healthcheck"]["test"][1:])
    for deployment in DEPLOYMENTS.values():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        yield container["command"]
        yield from (
            container[p]["exec"]["command"]
            for p in container
            if p.endswith("Probe") and "exec" in container[p]
        )
    for line in re.findall(r"^marketdata .*", (DEPLOY / "README.md").read_text(), re.M):
        yield shlex.split(line)


@pytest.mark.parametrize(
    "command", sorted({" ".join(c) for c in commands() if c[0] == "marketdata"})
)
def test_every_command_exists(command: str) -> None:
    """The command line itself parses name, arguments and options."""
    _, name, *arguments = command.split()
    known = get_command(app).commands  # type: ignore[attr-defined]
    assert name in known
    known[name].make_context(name, arguments).close()


def secrets_in(text: str) -> list[str]:
    """Return values where a secret belongs; `${NAME...}` and `{ env: NAME }` are none."""
    text = re.sub(r"\$\{[^}]*\}", "$", text)
    named = re.findall(
        r"(?im)^[^#\n]*?(\w*(?:password|passwd|cli_auth|access_key|token)[:=] *[^\s#]+)", text
    )
    known = [
        *re.findall(r"AKIA\w+|BEGIN [A-Z ]*PRIVATE", text),
        *re.findall(r"://\w*:(?!password@|\$@)[^@/\s]+@", text),
    ]
    return [n for n in named if not re.search(r'[:=] *(\$|""|\{|~|false)$', n)] + known


@pytest.mark.parametrize(
    "text",
    [
        "PASSWORD: admin",
        "a_password=x",
        "u: redis://:pw@host",
        "postgresql://me:pw@h/d",
        "AWS_SECRET_ACCESS_KEY: k",
    ],
)
def test_the_search_for_secrets_finds_them(text: str) -> None:
    assert secrets_in(text)


def test_no_secret_is_written_anywhere() -> None:
    files = [
        file
        for file in DEPLOY.rglob("*")
        if file.is_file() and file.name not in (".env", "secret.yaml")
    ]
    assert len(files) > 15
    assert {file.name: secrets_in(file.read_text()) for file in files} == {
        file.name: [] for file in files
    }
    assert set(SECRET["stringData"].values()) == {""}
    assert {"secret.yaml", ".env"} <= set((DEPLOY / ".gitignore").read_text().split())


def test_readme_names_files_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text()
    paths = set(re.findall(r"`(kubernetes/[\w.]+)`|(deploy/[\w./]+)", text))
    for inside, outside in paths:
        path = DEPLOY / inside if inside else ROOT / outside.rstrip(".")
        assert path.exists() or path.name in (".env", "secret.yaml"), path
    assert len(paths) > 8
    variables = set(re.findall(r"`((?:MARKETDATA|AWS)_\w+)`", text))
    used = {*ENVIRONMENT, *COMPOSE["services"]["worker"]["environment"]}
    assert variables <= used
