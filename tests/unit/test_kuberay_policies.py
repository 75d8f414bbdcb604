"""Who may do what in the cluster: pods that are not root, ports that are not public, secrets that are only named."""

from __future__ import annotations

import re
import subprocess

import pytest
from kuberay_manifests import (
    KUBERAY,
    OVERLAYS,
    PARTS,
    REPOSITORY,
    all_pods,
    amount,
    built,
    cluster_of,
    groups_of,
    needs_kubectl,
    one,
    ray_objects,
)

from llm4msr.config import ConfigError
from llm4msr.settings import load_config

pytestmark = needs_kubectl

DOCS = REPOSITORY / "docs" / "kubernetes.md"


@pytest.fixture(params=OVERLAYS)
def overlay(request) -> str:
    return request.param


def refused_by_pod_security(pod: dict, *more: dict) -> list[str]:
    """Returns what the level "restricted" refuses in a pod template, and in securityContexts of further containers."""
    spec = pod["spec"]
    context, containers = spec.get("securityContext", {}), [*spec["containers"], *spec.get("initContainers", [])]
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        found.append("may be root")
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append("no seccomp profile")
    for container in [*(c.get("securityContext", {}) for c in containers), *more]:
        if container.get("allowPrivilegeEscalation") is not False or container.get("privileged"):
            found.append("may gain privileges")
        if container.get("capabilities") != {"drop": ["ALL"]}:
            found.append("keeps capabilities")
    kinds = {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"}
    return found + sorted(kinds - {"configMap", "secret", "emptyDir", "projected", "persistentVolumeClaim"})


class TestPods:
    def test_none_is_root_or_can_become_it(self, overlay):
        refused = {name: refused_by_pod_security(pod) for name, pod in all_pods(overlay).items()}
        assert refused and not any(refused.values()), refused
        enforced = one(overlay, "common", "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        assert enforced == "restricted"

    def test_nor_is_the_autoscaler_that_the_operator_adds(self, overlay):
        for document in ray_objects(overlay):
            cluster = cluster_of(document)
            options = cluster["autoscalerOptions"]
            assert cluster["enableInTreeAutoscaling"] and options["version"] == "v2"
            head = cluster["headGroupSpec"]["template"]
            assert refused_by_pod_security(head, options["securityContext"]) == []
            assert options["resources"]["requests"] == options["resources"]["limits"]

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (lambda spec: spec["securityContext"].pop("runAsUser"), "may be root"),
            (lambda spec: spec["containers"][0].pop("securityContext"), "may gain privileges"),
            (lambda spec: spec["volumes"].append({"name": "host", "hostPath": {"path": "/"}}), "hostPath"),
        ],
    )
    def test_pod_security_would_be_missed(self, change, found):
        pod = all_pods("prod")["llm4msr-ranker/serve"]
        change(pod["spec"])

        assert found in refused_by_pod_security(pod)

    def test_memory_that_is_requested_is_the_limit(self, overlay):
        for name, pod in all_pods(overlay).items():
            resources = pod["spec"]["containers"][0]["resources"]
            assert amount(resources["limits"]["memory"]) >= 2**30, name
            assert resources["requests"] == resources["limits"], name

    def test_heads_run_no_tasks(self, overlay):
        for document in ray_objects(overlay):
            assert groups_of(document)["head"]["rayStartParams"]["num-cpus"] == "0", document["metadata"]["name"]

    def test_gpus_are_asked_for_where_the_image_has_cuda(self):
        for name, pod in all_pods("prod").items():
            asks = "nvidia.com/gpu" in pod["spec"]["containers"][0]["resources"]["limits"]
            tolerates = any(t.get("key") == "nvidia.com/gpu" for t in pod["spec"].get("tolerations", []))
            assert asks == tolerates == name.endswith("/gpu") == pod["spec"]["containers"][0]["image"].endswith("-gpu")

    def test_in_production_each_has_its_pool_of_nodes(self):
        pools = {name: pod["spec"]["nodeSelector"]["llm4msr-pool"] for name, pod in all_pods("prod").items()}

        groups = {name.rpartition("/")[2]: pool for name, pool in pools.items()}
        assert groups == {"head": "head", "cpu": "cpu", "gpu": "gpu", "serve": "serve", "submitter": "head"}

    def test_every_node_is_watched(self, overlay):
        for document in ray_objects(overlay):
            for group, spec in groups_of(document).items():
                (container,) = spec["template"]["spec"]["containers"]
                assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
                serves = group == "serve"
                # A pod of replicas is ready when its proxy is: the operator's own probe of it was replaced by ours.
                assert ("/-/healthz" in str(container["readinessProbe"])) == serves
                assert container["readinessProbe"]["failureThreshold"] == (1 if serves else 10)
                # What the autoscaler v2 and the operator ask for.
                assert spec["template"]["spec"]["restartPolicy"] == "Never"

    def test_they_see_no_variables_of_services(self, overlay):
        assert all(pod["spec"]["enableServiceLinks"] is False for pod in all_pods(overlay).values())

    @pytest.mark.parametrize("name", ["llm4msr-train", "llm4msr-ranker"])
    def test_which_would_stop_a_job(self, name):
        """Kubernetes' variable of a head's Service would be taken for a setting."""
        assert name in {document["metadata"]["name"] for document in ray_objects("prod")}
        variable = f"{name}-head-svc".upper().replace("-", "_") + "_SERVICE_HOST"

        with pytest.raises(ConfigError, match=variable):
            load_config([], environ={variable: "10.0.0.1"})


class TestSecrets:
    # Made by whoever owns them, before anything is applied; docs/kubernetes.md says how.
    EXPECTED = frozenset({"llm4msr-tokens", "llm4msr-model-access"})

    def test_they_are_named_and_nowhere_written(self, overlay):
        documents = [document for part in PARTS for document in built(overlay, part)]
        assert not [d for d in documents if d["kind"] == "Secret"]
        named = set()
        for name, pod in all_pods(overlay).items():
            for entry in pod["spec"]["containers"][0].get("env", []):
                if reference := entry.get("valueFrom", {}).get("secretKeyRef"):
                    named.add(reference["name"])
                    assert reference["optional"], f"{name} would not start without {entry['name']}"
                else:
                    assert not re.search("TOKEN$|KEY$|SECRET|PASSWORD", entry["name"]), name
            named |= {v["secret"]["secretName"] for v in pod["spec"].get("volumes", []) if "secret" in v}
        assert named == self.EXPECTED
        assert all(f"secret generic {secret}" in DOCS.read_text() for secret in named)

    def test_object_storage_is_opened_by_the_account(self, overlay):
        accounts = {d["metadata"]["name"]: d for d in built(overlay, "common") if d["kind"] == "ServiceAccount"}

        used = {name: pod["spec"]["serviceAccountName"] for name, pod in all_pods(overlay).items()}
        assert set(used.values()) == set(accounts)
        assert "AWS_" not in str(all_pods(overlay))
        for name, account in used.items():
            workload = "serving" if name.startswith("llm4msr-ranker/") else "jobs"
            role = accounts[account]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
            assert role.endswith(f":role/llm4msr-{workload}"), name
            # The head's autoscaler talks to Kubernetes; nobody else does.
            assert accounts[account].get("automountServiceAccountToken", True) == name.endswith("/head"), name


class TestNetwork:
    def allowed(self, overlay: str, workload: str) -> dict[str, set]:
        """Returns, by who may come, the ports that are open to them; None is every port."""
        policy = one(overlay, "common", "NetworkPolicy", f"llm4msr-{workload}")["spec"]
        assert policy["policyTypes"] == ["Ingress"]
        found = {}
        for rule in policy["ingress"]:
            (peer,) = rule["from"]
            who = " ".join(value for selector in peer.values() for value in selector["matchLabels"].values())
            found[who] = {port["port"] for port in rule["ports"]} if "ports" in rule else None
        return found

    def test_dashboard_gcs_and_haproxy_are_not_public(self, overlay):
        jobs, serving = self.allowed(overlay, "jobs"), self.allowed(overlay, "serving")

        assert jobs == {"llm4msr-jobs": None, "kuberay-system kuberay-operator": {8265}, "monitoring": {8080}}
        callers = {"true": {8000}} | ({"ingress-nginx": {8000}} if overlay == "prod" else {})
        assert serving == callers | {
            "llm4msr-serving": None,
            "kuberay-system kuberay-operator": {8265, 8000},
            "monitoring": {8080, 9101},
        }

    def test_the_policies_hold_for_every_pod(self, overlay):
        policies = {
            f"llm4msr-{workload}": one(overlay, "common", "NetworkPolicy", f"llm4msr-{workload}")["spec"]["podSelector"]
            for workload in ("jobs", "serving")
        }
        for name, pod in all_pods(overlay).items():
            workload = "llm4msr-serving" if name.startswith("llm4msr-ranker/") else "llm4msr-jobs"
            labels = pod["metadata"]["labels"]
            assert labels["app.kubernetes.io/name"] == workload, name
            assert policies[workload] == {"matchLabels": {"app.kubernetes.io/name": workload}}


class TestDisruption:
    def test_budgets_work_for_pods_without_a_controller_that_scales(self, overlay):
        for budget in (d for d in built(overlay, "common") if d["kind"] == "PodDisruptionBudget"):
            assert isinstance(budget["spec"]["minAvailable"], int), "percentages are not counted for such pods"
            assert "maxUnavailable" not in budget["spec"]

    def test_each_selects_pods_that_there_are(self, overlay):
        found = {}
        for budget in (d for d in built(overlay, "common") if d["kind"] == "PodDisruptionBudget"):
            wanted = budget["spec"]["selector"]["matchLabels"].items()
            pods = [name for name, pod in all_pods(overlay).items() if wanted <= pod["metadata"]["labels"].items()]
            found[budget["metadata"]["name"]] = {name.rpartition("/")[2] for name in pods}
        assert found == {
            "llm4msr-serving": {"serve"},
            "llm4msr-serving-head": {"head"},
            "llm4msr-jobs-head": {"head"},
        }


class TestDocs:
    def test_every_value_to_change_is_in_the_table(self):
        files = subprocess.run(
            ["grep", "-rlE", "^[^#]*CHANGE-ME", "."], cwd=KUBERAY, capture_output=True, text=True, check=True
        )
        table = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
        for file in (line.removeprefix("./") for line in files.stdout.splitlines()):
            place = re.sub("^overlays/(dev|prod)/", "overlays/*/", file)
            assert any(f"`{place}`" in row or f"`{file}`" in row for row in table), file

    def test_commands_name_folders_that_exist(self):
        folders = re.findall(r"-k (cluster/kuberay/\S+)", DOCS.read_text())

        assert {folder.rstrip("/").rpartition("/")[2] for folder in folders} >= {"common", "cluster", "jobs", "service"}
        assert all((REPOSITORY / folder / "kustomization.yaml").is_file() for folder in folders), folders
