"""What lies in deploy/: manifests fit the schemas of their resources, and their command is one that the verb takes.

The schemas in crds/ are cut from the definitions of JobSet and Kueue by crd_schema.py; each names its source.
"""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hybrid_jax import cli
from hybrid_jax.batch import start
from hybrid_jax.batch.settings import BatchConfig

DEPLOY = Path(__file__).parents[3] / "deploy"
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "crds").glob("*.json")}
JOBS = ("batch_tpu.yaml", "batch_gpu.yaml")


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def validate(manifest: dict[str, Any]) -> None:
    schema = SCHEMAS[manifest["kind"]]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(manifest)


def job_of(name: str) -> dict[str, Any]:
    (manifest,) = manifests(name)
    job: dict[str, Any] = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.yaml")), ids=lambda path: path.name)
def test_manifests_fit_their_schemas(path: Path) -> None:
    for manifest in manifests(path.name):
        validate(manifest)


def break_job(change: str) -> dict[str, Any]:
    """A manifest with one mistake."""
    manifest = copy.deepcopy(manifests("batch_tpu.yaml")[0])
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    match change:
        case "version":
            manifest["apiVersion"] = "jobset.x-k8s.io/v1"
        case "name":
            job["backoffLimitPerindex"] = job.pop("backoffLimitPerIndex")
        case "type":
            job["completions"] = "four"
        case "missing":
            del container["volumeMounts"][0]["mountPath"]
        case "deep":
            container["securityContext"]["capabilities"]["dropped"] = ["ALL"]
        case "value":
            job["podFailurePolicy"]["rules"][0]["onExitCodes"] = {"operator": "In", "values": ["seventy-five"]}
    return manifest


@pytest.mark.parametrize("change", ["version", "name", "type", "missing", "deep", "value"])
def test_the_schema_finds_mistakes(change: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate(break_job(change))


@pytest.mark.parametrize("name", JOBS)
def test_the_command_is_one_that_the_verb_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    container = job_of(name)["template"]["spec"]["containers"][0]
    arguments = [text.replace("$(SHARD_INDEX)", "3") for text in container["args"]]
    heard: list[BatchConfig] = []

    def start_batch(config: BatchConfig, *_: object) -> int:
        heard.append(config)
        return 0

    monkeypatch.setattr(start, "start_batch", start_batch)
    monkeypatch.setattr(sys, "argv", ["hybrid-jax", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    (config,) = heard
    assert config.shard_index == 3 and config.num_shards == job_of(name)["completions"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert config.output.parent.as_posix() in mounts
    assert job_of(name)["template"]["spec"]["terminationGracePeriodSeconds"] > config.grace_s + 30


@pytest.mark.parametrize("name", JOBS)
def test_workers_are_started_again_by_their_exit_codes(name: str) -> None:
    job = job_of(name)
    rules = job["podFailurePolicy"]["rules"]
    codes = {code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]}
    assert codes == {75: "Ignore", 2: "FailJob"}
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    (shard,) = job["template"]["spec"]["containers"][0]["env"]
    path = shard["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@pytest.mark.parametrize("name", JOBS)
def test_containers_have_no_rights_that_they_do_not_need(name: str) -> None:
    pod = job_of(name)["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"] == {"drop": ["ALL"]}


def test_queues_are_those_that_jobs_ask_for() -> None:
    queues = {found["metadata"]["name"]: found for found in manifests("queues.yaml") if found["kind"] == "ClusterQueue"}
    flavors = {
        found["metadata"]["name"]: found for found in manifests("queues.yaml") if found["kind"] == "ResourceFlavor"
    }
    for name in JOBS:
        asked = manifests(name)[0]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        (group,) = queues[asked]["spec"]["resourceGroups"]
        pod = job_of(name)["template"]["spec"]
        assert set(pod["containers"][0]["resources"]["limits"]) <= set(group["coveredResources"])
        assert flavors[group["flavors"][0]["name"]]["spec"]["nodeLabels"] == pod["nodeSelector"]


def test_the_image_is_pinned_and_runs_without_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert bases and all(re.fullmatch(r"python:3\.12\.\d+-slim-\w+", base) for base in bases)
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE) and "--constraint constraints.txt" in text
    copied = re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
    sources = [name for line in copied for name in line.split()[:-1]]
    assert all((DEPLOY.parent / name).exists() for name in sources)
    assert {"hybrid_jax", "models", "kernels_pallas", "LICENSE"} <= set(sources)
