"""What infra/ promises to an operator, read from the files themselves: no container runtime is needed."""

import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose"
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")
SECRETS_MODULE = COMPOSE / "make_secrets.py"

YAML_FILES = sorted(path for path in INFRA.rglob("*.yaml"))


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def default_of(text: str) -> str:
    """What compose makes of ``${NAME:-default}`` when nobody sets NAME."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_yaml_file_parses_and_is_not_empty(path):
    documents = [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one is not None]
    assert documents


# --- compose ---------------------------------------------------------------------------------------------------------


def composed(*names: str) -> dict:
    """The services of these files, with ``extends`` resolved as far as these files use it: mappings joined."""
    made: dict = {"services": {}, "networks": {}, "secrets": {}, "configs": {}, "volumes": {}}
    for name in names:
        content = load(COMPOSE / name)
        for section in made:
            for key, value in (content.get(section) or {}).items():
                if section == "services":
                    value = merged(extended(value), made[section].get(key, {}))
                made[section][key] = value
    return made


def extended(service: dict) -> dict:
    if "extends" not in service:
        return service
    base = load(COMPOSE / service["extends"]["file"])["services"][service["extends"]["service"]]
    return merged({key: value for key, value in service.items() if key != "extends"}, base)


def merged(over: dict, under: dict) -> dict:
    made = dict(under)
    for key, value in over.items():
        there = made.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            made[key] = merged(value, there)
        elif isinstance(value, list) and isinstance(there, list) and key in ("networks", "secrets", "volumes"):
            made[key] = there + value
        else:
            made[key] = value
    return made


SERVER = composed("compose.yaml")
WHOLE = composed("compose.yaml", "site-a.yaml", "site-b.yaml")
REMOTE = composed("site.remote.yaml")
SERVICES = [(f"{where}:{name}", one) for where, stack in (("whole", WHOLE), ("remote", REMOTE))
            for name, one in stack["services"].items()]  # fmt: skip
each_service = pytest.mark.parametrize("service", [one for _, one in SERVICES], ids=[name for name, _ in SERVICES])


def test_the_stack_has_every_part():
    assert set(WHOLE["services"]) >= {
        "postgres", "messaging", "store", "prefect-server", "prefect-services", "mlflow", "gateway", "bootstrap",
        "worker-server", "worker-site-a", "worker-site-b", "metrics-server", "metrics-site-a", "prometheus", "grafana",
    }  # fmt: skip


@each_service
def test_images_are_pinned(service):
    image = default_of(service["image"])
    assert PINNED.fullmatch(image), image
    assert "latest" not in image


@each_service
def test_published_ports_are_on_loopback_only(service):
    assert "network_mode" not in service
    assert not service.get("privileged")
    for port in service.get("ports", []):
        assert isinstance(port, str)
        assert port.startswith("127.0.0.1:"), port


@each_service
def test_services_are_hardened_limited_and_checked(service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert set(service.get("cap_add", [])) <= {"NET_BIND_SERVICE"}
    assert "no-new-privileges:true" in service["security_opt"]
    assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"])
    image_brings_its_own = "--with-healthcheck" in service.get("command", [])
    one_shot = service.get("restart") == "no"
    assert image_brings_its_own or one_shot or service["healthcheck"]["test"]
    user = str(service.get("user", "10001"))  # of our own image
    assert not user.startswith(("0", "root"))


@each_service
def test_secrets_come_from_files(service):
    for name, value in (service.get("environment") or {}).items():
        if re.search(r"PASSWORD|SECRET|AUTH_STRING|TOKEN|_KEY$|CREDENTIALS|CONNECTION_URL", name):
            assert str(value).startswith("/run/secrets/"), f"{name} is not a path below /run/secrets"
        assert "@" not in str(value), f"{name} may hold credentials"
    for name in service.get("secrets", []):
        assert isinstance(name, str)


@pytest.mark.parametrize("stack", [WHOLE, REMOTE], ids=["whole", "remote"])
def test_every_secret_network_volume_and_config_that_is_used_exists(stack):
    for name, service in stack["services"].items():
        assert set(service.get("secrets", [])) <= set(stack["secrets"]), name
        assert set(service.get("networks", [])) <= set(stack["networks"]), name
        assert {one["source"] for one in service.get("configs", [])} <= set(stack["configs"]), name
        for volume in service.get("volumes", []):
            assert isinstance(volume, dict) or volume.split(":")[0] in stack["volumes"], name
        for other in service.get("depends_on", {}):
            assert other in stack["services"], name
        used = {str(v).rsplit("/", 1)[1] for v in (service.get("environment") or {}).values()
                if str(v).startswith("/run/secrets/")}  # fmt: skip
        assert used <= set(service.get("secrets", [])), f"{name} names a secret that it is not given"
    for one in stack["configs"].values():
        assert (COMPOSE / one["file"]).is_file()


def test_a_site_reaches_the_gateway_and_nothing_else():
    for site, other in (("a", "b"), ("b", "a")):
        worker = WHOLE["services"][f"worker-site-{site}"]
        assert worker["networks"] == [f"site-{site}"]
        on_it = {name for name, one in WHOLE["services"].items() if f"site-{site}" in one.get("networks", [])}
        assert on_it == {f"worker-site-{site}", f"metrics-site-{site}", "gateway"}
        assert WHOLE["networks"][f"site-{site}"] == {"internal": True}
        assert not any(f"site_{other}" in secret for secret in worker["secrets"])
        assert [one["read_only"] for one in worker["volumes"] if isinstance(one, dict)] == [True, True]
        assert worker["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    pages = WHOLE["services"]["gateway"]["networks"]
    assert not {"data", "mlflow"} & set(pages), "a site must not come near the databases or MLflow"


def test_the_gateway_has_two_routes_and_asks_for_tls():
    text = (COMPOSE / "gateway" / "Caddyfile").read_text(encoding="utf-8")
    sites = re.findall(r"^(\S+) \{\n(.*?)^\}", text, re.M | re.S)
    assert [name for name, _ in sites] == ["http://127.0.0.1:2080", "https://:8443", "https://:9443"]
    assert re.findall(r"reverse_proxy (\S+)", text) == ["prefect-server:4200", "store:8333"]
    assert all("tls /run/secrets/gateway_certificate" in body for name, body in sites if name.startswith("https"))
    assert "admin off" in text
    published = WHOLE["services"]["gateway"]["ports"]
    assert published == ["127.0.0.1:8443:8443", "127.0.0.1:9443:9443"]


def test_only_sites_are_told_where_data_is():
    for name, service in SERVER["services"].items():
        text = json.dumps(service)
        assert "FEDMENTOR_DATA_ROOT" not in text, name
        assert "unit_key" not in text, name
    assert all("ledger" not in json.dumps(one) for one in SERVER["services"].values())


def test_networks_of_the_server_have_no_way_out():
    assert {name for name, one in WHOLE["networks"].items() if not (one or {}).get("internal")} == {"host"}
    for name, service in WHOLE["services"].items():
        if "host" in service.get("networks", []):
            assert service.get("ports"), f"{name} is on the network for published ports and publishes none"


def test_the_telemetry_of_prefect_mlflow_and_grafana_is_off():
    services = SERVER["services"]
    assert services["prefect-server"]["environment"]["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert services["mlflow"]["environment"]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert services["grafana"]["environment"]["GF_ANALYTICS_REPORTING_ENABLED"] == "false"


def test_authentication_is_on():
    services = SERVER["services"]
    assert "SECRET_FILE_PREFECT_SERVER_API_AUTH_STRING" in services["prefect-server"]["environment"]
    assert "basic-auth" in services["mlflow"]["command"]
    assert "-s3.config=/run/secrets/store_identities" in services["store"]["command"]
    assert "-ip.bind=127.0.0.1" in services["store"]["command"], "the store's inner ports ask for no password"
    assert services["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"


def test_prefect_settings_exist():
    """A misspelt variable would be ignored in silence."""
    from prefect.settings import Settings

    known = {name.lower() for name in environment_names(Settings)}
    for name, service in SERVICES:
        for variable in service.get("environment") or {}:
            variable = variable.removeprefix("SECRET_FILE_")
            if variable.startswith("PREFECT_") and not variable.startswith("PREFECT_REDIS_"):
                assert variable.lower() in known, f"{name}: {variable}"


def environment_names(model, prefix="PREFECT_") -> set[str]:
    from pydantic import AliasChoices
    from pydantic_settings import BaseSettings

    found = set()
    for field, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseSettings):
            found |= environment_names(kind, kind.model_config.get("env_prefix", f"{prefix}{field}_"))
        found.add(f"{prefix}{field}")
        if isinstance(info.validation_alias, AliasChoices):
            found |= {one for one in info.validation_alias.choices if isinstance(one, str)}
    return found


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_dockerfiles(name):
    text = (INFRA / "docker" / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    images = re.findall(r"^ARG PYTHON_IMAGE=(.+)$", text, re.M)
    assert len(images) == 1
    assert PINNED.fullmatch(images[0])
    stages = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert stages == ["${PYTHON_IMAGE}", "${PYTHON_IMAGE}"], "two stages: build and runtime"
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("-c infra/constraints.txt" in line for line in installs)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["10001:10001"]
    after = lines[lines.index("USER 10001:10001") :]
    assert not any(line.startswith(("RUN", "COPY", "ADD")) for line in after), "nothing is changed as the user who runs"
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    assert not any(line.startswith("ADD") for line in lines)
    assert not re.search(r"(PASSWORD|SECRET|TOKEN|_KEY)\s*=", text)
    for source in re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.+) \S+$", text, re.M):
        for part in source.split():
            assert (ROOT / part).exists(), part


def test_only_what_is_copied_is_in_the_build_context():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    assert {"infra/compose/secrets", "infra/compose/.env"} <= set(lines)
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert kept == {
        "fedmentor_core",
        "flows",
        "tasks",
        "infra",
        "pyproject.toml",
        "prefect.yaml",
        "README.md",
        "LICENSE",
    }


def test_secrets_are_put_into_one_process_only(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    program = [sys.executable, str(INFRA / "docker" / "with_secrets.py")]
    show = [sys.executable, "-c", "import os; print(os.environ['NAME'], 'SECRET_FILE_NAME' in os.environ)"]
    env = {"PATH": os.environ["PATH"], "SECRET_FILE_NAME": str(secret)}
    assert subprocess.run(program + show, env=env, capture_output=True, text=True).stdout == "hush False\n"
    for broken in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").touch()
        done = subprocess.run(
            program + show, env=env | {"SECRET_FILE_NAME": str(broken)}, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert str(broken) in done.stderr
        assert "Traceback" not in done.stderr


# --- secrets and policies -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secret_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "secrets"
    runpy.run_path(str(SECRETS_MODULE))["make_secrets"](folder, ["site-a", "site-b"], ["fedmentor.example.org"])
    return folder


def test_make_secrets_makes_every_secret_that_compose_names(secret_folder):
    wanted = {Path(one["file"]).name for one in WHOLE["secrets"].values()}
    assert wanted <= {path.name for path in secret_folder.iterdir()}
    assert stat.S_IMODE(secret_folder.stat().st_mode) == 0o700
    assert all(path.read_text().strip() for path in secret_folder.iterdir())


def test_made_secrets_stay_and_a_site_can_be_added(secret_folder):
    before = {path.name: path.read_bytes() for path in secret_folder.iterdir()}
    make = runpy.run_path(str(SECRETS_MODULE))["make_secrets"]
    assert make(secret_folder, ["site-a", "site-b"], []) == []
    written = make(secret_folder, ["site-a", "site-b", "site-c"], [])
    assert set(written) == {"unit_key_site_c", "store_site_c", "store_monitor_site_c", "store_identities"}
    assert all(
        (secret_folder / name).read_bytes() == content for name, content in before.items() if name not in written
    )


def test_no_two_secrets_are_alike(secret_folder):
    keys = [path.read_text() for path in secret_folder.iterdir() if path.name.startswith(("store_site", "unit_key"))]
    assert len(set(keys)) == len(keys)


def test_the_store_grants_a_site_its_own_bucket_and_global_adapters_only(secret_folder):
    identities = {
        one["name"]: one["actions"]
        for one in json.loads((secret_folder / "store_identities").read_text())["identities"]
    }
    assert identities["store_site_a"] == [
        "Read:fedmentor-site-a/*", "Write:fedmentor-site-a/*", "List:fedmentor-site-a", "Read:fedmentor-server/store/runs/*",
    ]  # fmt: skip
    for name, actions in identities.items():
        assert all(":" in action for action in actions), f"{name} has a right to every bucket"
        if not name.startswith(("store_site", "store_bootstrap")):
            assert not any(action.startswith("Write:fedmentor-site") for action in actions), name
    for action in identities["store_server"]:
        if action.startswith("List:"):
            continue  # names only: without it the server could not tell an absent answer from a forbidden one
        place = action.split(":", 1)[1].rstrip("*")
        assert not "fedmentor-site-a/ledger/ledgers/00.json".startswith(place), "the server reads no ledger of a site"


@pytest.mark.parametrize("path", sorted((INFRA / "policies").glob("*.json")), ids=lambda path: path.stem)
def test_policies_are_least_privilege(path):
    policy = json.loads(path.read_text(encoding="utf-8"))
    if "Rules" in policy:
        return
    assert policy["Version"] == "2012-10-17"
    for statement in policy["Statement"]:
        assert not {"NotAction", "NotResource", "NotPrincipal"} & set(statement)
        for action in statement["Action"]:
            assert "*" not in action, action
            assert action.startswith("s3:")
        if statement["Effect"] == "Allow":
            assert "Principal" not in statement
            for resource in statement["Resource"]:
                assert resource.startswith("arn:aws:s3:::${bucket}-"), "a bucket's name is never a wildcard"
                bucket = resource.removeprefix("arn:aws:s3:::").split("/")[0]
                assert "*" not in bucket
            if path.stem != "store_mlflow":
                assert not any(action.startswith("s3:Delete") for action in statement["Action"])


def test_nobody_but_the_site_writes_to_its_bucket():
    for path in (INFRA / "policies").glob("store_*.json"):
        for statement in json.loads(path.read_text(encoding="utf-8"))["Statement"]:
            if "s3:PutObject" in statement["Action"] and statement["Effect"] == "Allow":
                to_a_site = any("${site}" in resource for resource in statement["Resource"])
                assert to_a_site == (path.stem == "store_site"), path.name


# --- Kubernetes ---------------------------------------------------------------------------------------------------------


def manifests(folder: str) -> list[dict]:
    return [one for path in sorted((INFRA / "kubernetes" / folder).glob("*.yaml"))
            if path.name != "kustomization.yaml"
            for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]  # fmt: skip


MANIFESTS = {folder: manifests(folder) for folder in ("server", "site")}
TEMPLATE = json.loads((INFRA / "kubernetes" / "site" / "gpu_base_job_template.json").read_text(encoding="utf-8"))
PODS = [
    *((f"{folder}/{one['metadata']['name']}", one["spec"]["template"]) for folder, all_of in MANIFESTS.items()
      for one in all_of if one["kind"] in ("Deployment", "StatefulSet")),
    ("site/gpu-job", TEMPLATE["job_configuration"]["job_manifest"]["spec"]["template"]),
]  # fmt: skip


@pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=[name for name, _ in PODS])
def test_pods_are_restricted_and_limited(pod):
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert spec.get("automountServiceAccountToken") is False or spec["serviceAccountName"] == "prefect-worker"
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        env = container.get("env", [])
        for variable in env if isinstance(env, list) else []:
            if re.search(
                r"PASSWORD$|FLASK_SERVER_SECRET_KEY$|AUTH_STRING$|CONNECTION_URL$|STORE_URI$|DOCKET_URL$",
                variable["name"],
            ):
                assert "secretKeyRef" in variable["valueFrom"], variable["name"]
    mounted = {one["name"] for container in spec["containers"] for one in container.get("volumeMounts", [])}
    claimed = {"data"} if "postgres" in json.dumps(spec) or "messaging_config" in json.dumps(spec) else set()
    assert mounted <= {one["name"] for one in spec.get("volumes", [])} | claimed


def test_no_secret_is_in_a_manifest():
    kinds = {one["kind"] for all_of in MANIFESTS.values() for one in all_of}
    assert "Secret" not in kinds
    assert all(one["spec"].get("type", "ClusterIP") == "ClusterIP"
               for all_of in MANIFESTS.values() for one in all_of if one["kind"] == "Service")  # fmt: skip


@pytest.mark.parametrize("folder", ["server", "site"])
def test_everything_is_denied_first(folder):
    policies = {one["metadata"]["name"]: one["spec"] for one in MANIFESTS[folder] if one["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies.items():
        for rule in [*spec.get("egress", []), *spec.get("ingress", [])]:
            assert rule.get("ports"), f"{name} allows every port"
            for peer in rule.get("to", []) + rule.get("from", []):
                assert peer.get("ipBlock", {}).get("cidr", "x/32").endswith("/32"), f"{name} allows a whole network"


def test_a_site_lets_nobody_in_and_goes_out_to_prefect_and_the_store_only():
    policies = {one["metadata"]["name"]: one["spec"] for one in MANIFESTS["site"] if one["kind"] == "NetworkPolicy"}
    assert not any("ingress" in spec for spec in policies.values())
    client = policies["client"]
    assert (
        client["podSelector"]["matchLabels"]
        == TEMPLATE["job_configuration"]["job_manifest"]["spec"]["template"]["metadata"]["labels"]
    )
    peers = [peer for rule in client["egress"] for peer in rule["to"]]
    assert [sorted(peer) for peer in peers] == [["namespaceSelector", "podSelector"], ["ipBlock"]]
    assert peers[0]["podSelector"]["matchLabels"] == {"app": "prefect-server"}


def test_network_policies_select_pods_that_exist():
    for folder, all_of in MANIFESTS.items():
        apps = {pod["metadata"]["labels"]["app"] for name, pod in PODS if name.startswith(folder)}
        for one in all_of:
            if one["kind"] == "NetworkPolicy":
                selector = one["spec"]["podSelector"]
                named = {selector["matchLabels"]["app"]} if "matchLabels" in selector else set()
                for expression in selector.get("matchExpressions", []):
                    named |= set(expression["values"])
                assert named <= apps, one["metadata"]["name"]


def test_the_gpu_job_template_is_one_that_prefect_takes():
    import prefect

    shipped = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
    default = json.loads(shipped.read_text())["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]
    assert set(TEMPLATE["job_configuration"]) == set(default["job_configuration"])
    assert set(TEMPLATE["variables"]["properties"]) >= set(default["variables"]["properties"])
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used <= set(TEMPLATE["variables"]["properties"])
    container = TEMPLATE["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    assert {one["mountPath"] for one in container["volumeMounts"] if one.get("readOnly")} == {
        "/data",
        "/policies",
        "/run/secrets/store",
    }
    assert PINNED.fullmatch(TEMPLATE["variables"]["properties"]["image"]["default"])


def test_images_in_manifests_are_pinned():
    for folder in ("server", "site"):
        made = load(INFRA / "kubernetes" / folder / "kustomization.yaml")
        ours = {one["name"]: f"{one['newName']}:{one['newTag']}" for one in made["images"]}
        for name, pod in PODS:
            if name.startswith(folder) and name != "site/gpu-job":
                for container in pod["spec"]["containers"]:
                    assert PINNED.fullmatch(ours.get(container["image"], container["image"])), name


def test_compose_and_kubernetes_make_the_same_databases():
    first = (COMPOSE / "postgres" / "databases.sh").read_text()
    assert first == (INFRA / "kubernetes" / "server" / "databases.sh").read_text()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders kustomizations, is not installed")
@pytest.mark.parametrize("folder", ["server", "site"])
def test_kustomizations_render(folder):
    done = subprocess.run(
        ["kubectl", "kustomize", str(INFRA / "kubernetes" / folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert len({one["metadata"].get("namespace") for one in made if one["kind"] != "Namespace"}) == 1
    assert {one["kind"] for one in made} >= {"Namespace", "Deployment", "NetworkPolicy"}


# --- observability --------------------------------------------------------------------------------------------------------

WORDS = re.compile(r"\b(?:fedmentor_\w+|up)\b")


def expressions() -> dict[str, str]:
    dashboard = json.loads((INFRA / "observability" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    found = {panel["title"]: target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    found |= {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    found |= {f"variable {one['name']}": one["query"]["query"] for one in dashboard["templating"]["list"]}
    rules = load(INFRA / "observability" / "alerts.yaml")
    return found | {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}


@pytest.mark.parametrize(("where", "expression"), expressions().items(), ids=list(expressions()))
def test_dashboard_and_alerts_use_metrics_and_labels_that_the_exporter_has(where, expression):
    from flows.metrics_exporter import METRICS

    names = set(WORDS.findall(expression))
    assert names
    assert names <= set(METRICS) | {"up"}, where
    for name, labels in re.findall(r"(\w+)\{([^}]*)\}", expression):
        used = set(re.findall(r"(\w+)\s*[=!]~?", labels))
        known = set(METRICS[name][1]) if name in METRICS else set()
        assert used <= known | {"place", "job", "instance"}, where
    assert expression.count("(") == expression.count(")")


def test_the_dashboard_shows_what_it_should():
    text = " ".join(expressions().values())
    for name in (
        "ledger_epsilon_left",
        "client_noise_multiplier",
        "gate_passed",
        "round_clients",
        "round_seconds",
        "round_bytes",
    ):
        assert f"fedmentor_{name}" in text
    dashboard = json.loads((INFRA / "observability" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    source = load(INFRA / "observability" / "grafana" / "datasource.yaml")["datasources"][0]["uid"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source}


def test_alerts_point_into_the_runbook():
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    }
    rules = [rule for group in load(INFRA / "observability" / "alerts.yaml")["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in rules} >= {
        "BudgetNearlySpent",
        "LedgerChainBroken",
        "GateFailed",
        "NoRoundForADay",
    }
    for rule in rules:
        file, anchor = rule["annotations"]["runbook"].split("#")
        assert (ROOT / file).is_file()
        assert anchor in headings, anchor
        assert rule["labels"]["severity"] in ("page", "ticket", "info")
        assert rule["annotations"]["summary"]


def test_prometheus_scrapes_every_exporter():
    jobs = load(INFRA / "observability" / "prometheus.yaml")["scrape_configs"]
    targets = {target for job in jobs for one in job["static_configs"] for target in one["targets"]}
    exporters = {name for name in WHOLE["services"] if name.startswith("metrics-")}
    assert targets == {f"{name}:9464" for name in exporters}
    for name in exporters:
        assert "metrics" in WHOLE["services"][name]["networks"]


def test_the_audit_of_dependencies_does_not_call_silence_clean():
    verdict = runpy.run_path(str(INFRA / "audit_deps.py"))["verdict"]
    skipped = {"name": "a", "skip_reason": "not found"}
    sound = {"name": "b", "version": "1", "vulns": []}
    broken = {"name": "c", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
    assert verdict({"dependencies": [skipped]})[0] == 0
    assert "SKIPPED" in verdict({"dependencies": [skipped]})[1]
    assert verdict({"dependencies": [skipped, sound]}) == (
        0,
        "audit-deps: 1 of 2 packages judged, 0 known vulnerabilities",
    )
    code, words = verdict({"dependencies": [sound, broken]})
    assert code == 1
    assert "PYSEC-1" in words


def test_the_zombie_automation_is_one_that_prefect_takes():
    from prefect.events.schemas.automations import AutomationCore

    made = AutomationCore.model_validate(json.loads((COMPOSE / "zombie_automation.json").read_text(encoding="utf-8")))
    assert made.trigger.posture.value == "Proactive"
    assert made.trigger.within.total_seconds() >= 3 * 30, "heartbeats come every 30 s"
    for worker in ("worker-server", "worker-site-a"):
        assert WHOLE["services"][worker]["environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
