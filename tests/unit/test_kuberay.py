"""The Kubernetes objects: known to the operator and the API server, of the versions in the lock, naming what exists."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from copy import deepcopy

import kubernetes_validate
import pytest
import yaml
from crd_schema import read_definition
from kuberay_manifests import (
    KUBERAY,
    OVERLAYS,
    PARTS,
    REPOSITORY,
    VERBS,
    all_pods,
    amount,
    built,
    built_at,
    cluster_of,
    groups_of,
    needs_kubectl,
    one,
    pinned,
    pods_of,
    project,
    ray_objects,
)

from llm4msr.settings import load_config
from serve.app import parse_args

pytestmark = needs_kubectl

KUBERNETES = "1.33"  # the oldest that kubernetes-validate knows; nothing here is newer
CONTAINER = "headGroupSpec.template.spec.containers.0"
HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"


@pytest.fixture(scope="module")
def definitions(shared):
    """What the operator 1.7.0 knows."""
    folder = shared / "data" / "kuberay-crds"
    return {kind: read_definition(folder, kind) for kind in ("RayCluster", "RayJob", "RayService")}


@functools.cache
def recipe(overlay: str, *flags: str):
    """Returns the configuration that an overlay's jobs get."""
    return load_config(["--config", str(KUBERAY / "overlays" / overlay / "common" / "recipe.toml"), *flags], environ={})


def problems(definitions, document: dict) -> list[str]:
    if document["apiVersion"] == "ray.io/v1":
        return definitions[document["kind"]].problems(document)
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


class TestSchema:
    @pytest.mark.parametrize("overlay", OVERLAYS)
    @pytest.mark.parametrize("part", PARTS)
    def test_every_object_is_valid(self, definitions, overlay, part):
        found = {f"{d['kind']} {d['metadata']['name']}": problems(definitions, d) for d in built(overlay, part)}

        assert found and not any(found.values()), found

    def test_so_is_the_service_with_redis(self, definitions, tmp_path):
        with_redis(tmp_path)

        service = next(d for d in built_at(tmp_path) if d["kind"] == "RayService")
        assert problems(definitions, service) == []
        options = cluster_of(service)["gcsFaultToleranceOptions"]
        # With a fixed name the second cluster of an upgrade would take up the state of the first.
        assert "externalStorageNamespace" not in options
        assert "value" not in options["redisPassword"], "a secret in the manifest"

    @pytest.mark.parametrize(
        ("kind", "place", "value", "message"),
        [
            ("RayCluster", "spec.workerGroupSpecs.0.maxReplica", 3, "maxReplica"),
            ("RayJob", "spec.shutdownAfterJobFinish", True, "shutdownAfterJobFinish"),
            ("RayService", f"spec.rayClusterConfig.{CONTAINER}.imagePolicy", "Always", "imagePolicy"),
            ("RayCluster", "metadata.lables", {}, "lables"),
            ("RayCluster", "spec.authOptions.mode", "tokens", "'tokens' is not one of"),
            ("RayCluster", "spec.rayVersion", 2.6, "2.6 is not of type 'string'"),
            ("RayJob", "spec.backoffLimit", "2", "'2' is not of type 'integer'"),
            ("RayCluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
            ("RayService", f"spec.rayClusterConfig.{CONTAINER}.env.1.name", HA_PROXY, f"'{HA_PROXY}',) is there twice"),
            ("NetworkPolicy", "spec.ingress.0.form", [], "form"),
            ("PodDisruptionBudget", "spec.minAvailible", 1, "minAvailible"),
            ("ServiceAccount", "automountServiceAccountTokens", False, "automountServiceAccountTokens"),
        ],
    )
    def test_a_mistake_is_refused(self, definitions, kind, place, value, message):
        document = next(d for part in PARTS for d in built("prod", part) if d["kind"] == kind)
        assert problems(definitions, document) == []
        *path, last = place.split(".")
        node = document
        for step in path:
            node = node[int(step)] if isinstance(node, list) else node[step]
        node[last] = value

        (found,) = problems(definitions, document)
        assert message in found

    def test_defaults_come_before_what_is_required(self, definitions):
        """The server fills in how many workers a group has at most; a group that does not say is valid."""
        document = one("dev", "cluster", "RayCluster")
        del document["spec"]["workerGroupSpecs"][0]["maxReplicas"]

        assert problems(definitions, document) == []


def with_redis(folder) -> None:
    """Makes a kustomization of the service with the option switched on, as its comment says."""
    up = "../" * len(folder.resolve().parts[1:]) + str(KUBERAY).lstrip("/")
    tree = {"resources": [f"{up}/overlays/prod/service"], "components": [f"{up}/options/gcs-redis"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(tree))


def versions_of(document: dict) -> set[str]:
    """Returns the versions of Ray that an object names: its own, and those of its images' tags."""
    images = [pod["spec"]["containers"][0]["image"] for _, pod in pods_of(document)]
    tags = [image.rpartition(":")[2].split("-") for image in images]
    return {cluster_of(document)["rayVersion"], *(part[3:] for tag in tags for part in tag if part.startswith("ray"))}


class TestVersions:
    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_ray_is_the_lock_s(self, overlay):
        found = {d["metadata"]["name"]: versions_of(d) for d in ray_objects(overlay)}

        assert all(versions == {pinned("ray")} for versions in found.values()), found

    def test_another_would_be_found(self):
        in_cluster, in_image = one("prod", "cluster", "RayCluster"), one("prod", "service", "RayService")
        in_cluster["spec"]["rayVersion"] = "2.59.0"
        container = groups_of(in_image)["serve"]["template"]["spec"]["containers"][0]
        container["image"] = container["image"].replace(pinned("ray"), "2.59.0")

        assert versions_of(in_cluster) == versions_of(in_image) == {pinned("ray"), "2.59.0"}

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_images_are_of_one_version(self, overlay):
        tag = f"{project()['version']}-ray{pinned('ray')}"
        for name, pod in all_pods(overlay).items():
            kind = "gpu" if name.endswith("/gpu") else "cpu"
            (container,) = pod["spec"]["containers"]
            assert container["image"] == f"registry.CHANGE-ME/llm4msr:{tag}-{kind}", name


class TestJobs:
    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_there_is_one_for_each_verb_and_no_other_object(self, overlay):
        documents = built(overlay, "jobs")

        assert {d["metadata"]["labels"]["verb"]: d["metadata"]["name"] for d in documents} == {
            verb: f"llm4msr-{verb}" for verb in VERBS
        }
        assert {d["kind"] for d in documents} == {"RayJob"}

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_commands_name_jobs_and_keys_that_exist(self, overlay):
        for document in built(overlay, "jobs"):
            python, dash_m, module, *argv = shlex.split(document["spec"]["entrypoint"])

            assert (python, dash_m, module) == ("python", "-m", f"jobs.{document['metadata']['labels']['verb']}")
            assert hasattr(importlib.import_module(module), "main")
            (mount,) = groups_of(document)["head"]["template"]["spec"]["containers"][0]["volumeMounts"]
            config, path, *flags = argv
            assert (config, path) == ("--config", f"{mount['mountPath']}/recipe.toml")
            recipe(overlay, *flags)

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_their_clusters_are_the_shared_one_s_twins(self, overlay):
        shared_cluster = one(overlay, "cluster", "RayCluster")["spec"]

        assert all(document["spec"]["rayClusterSpec"] == shared_cluster for document in built(overlay, "jobs"))

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_names_leave_room_for_what_the_operator_adds(self, overlay):
        names = [document["metadata"]["name"] for document in ray_objects(overlay)]

        assert max(map(len, names)) <= 47, "the operator adds 6 characters, and -serve-svc to names of 63 at most"
        # Heads' Services are named after these: NAME-head-svc.
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_the_recipe_is_the_one_that_pods_mount(self, overlay):
        (text,) = one(overlay, "common", "ConfigMap")["data"].values()

        assert text == (KUBERAY / "overlays" / overlay / "common" / "recipe.toml").read_text()
        (volume,) = groups_of(one(overlay, "cluster", "RayCluster"))["head"]["template"]["spec"]["volumes"]
        assert volume["configMap"]["name"] == one(overlay, "common", "ConfigMap")["metadata"]["name"]


class TestRoom:
    """What the recipe and serve.yaml ask for at most fits what the cluster may grow to."""

    @pytest.fixture(params=OVERLAYS)
    def overlay(self, request):
        return request.param

    def room(self, overlay: str, group: str, **needed: float) -> int:
        """Returns how many processes that need so many cpu and gpu each a group's pods hold at most; 0 without them."""
        spec = groups_of(one(overlay, "cluster", "RayCluster")).get(group)
        return spec["maxReplicas"] * min(int(limit(spec, kind) // each) for kind, each in needed.items()) if spec else 0

    def test_extraction(self, overlay):
        knowledge = recipe(overlay).knowledge
        fewest, most = knowledge.num_actors
        on_gpus = knowledge.device == "cuda"
        needed = {"cpu": knowledge.cpus_per_actor} | ({"gpu": knowledge.gpus_per_actor} if on_gpus else {})

        assert fewest == 1 and most <= self.room(overlay, "gpu" if on_gpus else "cpu", **needed)

    def test_training(self, overlay):
        train = recipe(overlay).train
        fewest, most = train.num_workers

        assert fewest == 1 and most <= self.room(overlay, "cpu", cpu=train.cpus_per_worker)
        # If GPUs are there, each worker has one, and its processors come from the same pod.
        assert overlay == "dev" or most <= self.room(overlay, "gpu", cpu=train.cpus_per_worker, gpu=1)

    def test_comparing_and_scoring(self, overlay):
        config = recipe(overlay)

        assert config.compare.max_concurrent <= self.room(overlay, "cpu", cpu=config.compare.cpus_per_run)
        assert config.score.num_actors <= self.room(overlay, "cpu", cpu=config.score.cpus_per_actor)

    def test_replicas(self, overlay):
        (application,) = serve_config(overlay)["applications"]
        (deployment,) = application["deployments"]
        group = groups_of(one(overlay, "service", "RayService"))["serve"]
        per_pod = int(group["rayStartParams"]["num-cpus"]) // deployment["ray_actor_options"]["num_cpus"]
        scaling = deployment["autoscaling_config"]

        assert scaling["min_replicas"] <= per_pod * group["minReplicas"]
        assert scaling["max_replicas"] <= per_pod * group["maxReplicas"]
        assert int(group["rayStartParams"]["num-cpus"]) == limit(group, "cpu") - 1, "one is left to the proxies"


def limit(group: dict, kind: str) -> float:
    """Returns how many processors (cpu) or GPUs (gpu) a pod of a group has."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return amount(limits["nvidia.com/gpu" if kind == "gpu" else kind])


def serve_config(overlay: str) -> dict:
    """Returns what an overlay deploys."""
    return yaml.safe_load(one(overlay, "service", "RayService")["spec"]["serveConfigV2"])


def differences(left, right, place: str = "") -> list[str]:
    """Returns the places where two trees differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted({*left, *right})
        return [d for key in keys for d in differences(left.get(key), right.get(key), f"{place}.{key}".lstrip("."))]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [d for i, (a, b) in enumerate(zip(left, right, strict=True)) for d in differences(a, b, f"{place}[{i}]")]
    return [] if left == right else [place]


class TestServe:
    @pytest.mark.parametrize(("overlay", "scaling"), [("dev", ["max_replicas", "min_replicas"]), ("prod", [])])
    def test_it_is_the_checkout_s_configuration_but_for_place_and_size(self, overlay, scaling):
        ours = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())

        found = differences(ours, serve_config(overlay))
        sizes = [f"applications[0].deployments[0].autoscaling_config.{name}" for name in scaling]
        assert found == ["applications[0].args.workspace_uri", *sizes]

    def test_a_difference_would_be_found(self):
        ours = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
        other = deepcopy(ours)
        other["http_options"]["request_timeout"] = other["http_options"].pop("request_timeout_s")

        assert differences(ours, other) == ["http_options.request_timeout", "http_options.request_timeout_s"]

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_it_serves_what_the_jobs_write(self, overlay):
        (application,) = serve_config(overlay)["applications"]

        args = parse_args(application["args"])
        assert args.auth == "tokens"
        assert args.workspace_uri == recipe(overlay).workspace_uri
        assert args.workspace_uri.startswith("s3://")

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_every_node_has_the_tokens_and_what_the_checkout_s_configuration_asks_for(self, overlay):
        asked = dict(re.findall(r"(RAY_SERVE_\w+)=(\d+)", (REPOSITORY / "serve" / "config.yaml").read_text()))
        assert HA_PROXY in asked
        for name, group in groups_of(one(overlay, "service", "RayService")).items():
            (container,) = group["template"]["spec"]["containers"]
            env = {entry["name"]: entry["value"] for entry in container["env"]}
            assert asked.items() <= env.items(), name
            assert int(env["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"]) > 5, name
            (mount,) = container["volumeMounts"]
            assert env["LLM4MSR_TOKENS_FILE"] == f"{mount['mountPath']}/tokens", name
            # A Secret that is mounted by subPath never changes in a running pod.
            assert "subPath" not in mount and mount["readOnly"], name
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports["serve"] == serve_config(overlay)["http_options"]["port"]

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_a_second_cluster_can_come_up(self, overlay):
        service = one(overlay, "service", "RayService")

        assert "headService" not in groups_of(service)["head"], "the operator refuses a name of its own"
        assert service["spec"]["upgradeStrategy"]["type"] == "NewCluster"

    def test_the_ingress_leads_to_it(self):
        ingress, service = one("prod", "service", "Ingress"), one("prod", "service", "RayService")
        (rule,) = ingress["spec"]["rules"]
        (path,) = rule["http"]["paths"]

        backend = path["backend"]["service"]
        assert backend["name"] == f"{service['metadata']['name']}-serve-svc"
        assert backend["port"]["number"] == serve_config("prod")["http_options"]["port"]
        assert ingress["spec"]["tls"][0]["hosts"] == [rule["host"]]
        limit = ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"]
        assert int(limit.removesuffix("m")) * 2**20 == serve_config("prod")["applications"][0]["args"]["max_body_bytes"]
