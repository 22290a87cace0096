"""docs/production.md: its manifest, values and alerts parse, name what exists, and its counts are ours."""

from __future__ import annotations

import re

import pytest
import yaml

from kvprofile.budget.capacity import parse_gpu_memory, plan
from kvprofile.budget.fleet import fleet
from kvprofile.budget.model_shape import shape_of_config
from kvprofile.cli import load
from kvprofile.environment import ENABLED, PREFIX
from kvprofile.runtime import settings
from tests.helpers import fleet_on_paper, grafana
from tests.helpers.docs_pages import blocks
from tests.helpers.models import ROOT

PAGE = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
BLOCKS = {block.mark: block.body for block in blocks("yaml") if block.page.endswith("production.md")}
KNOWN = {ENABLED, *(PREFIX + name for name in (*settings.VALUES, *settings.FLAGS))}
METRICS = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
OF_VLLM = {"vllm:cache_config_info"}
"""Besides those of the dashboard, which a live server is compared with."""


def manifest():
    return {each["kind"]: each for each in yaml.safe_load_all(BLOCKS["kubernetes"])}


def check_containers(init, env, command):
    """The check of an environment, and variables that are read."""
    assert {each["name"] for each in env} <= KNOWN
    assert all(isinstance(each["value"], str) for each in env)
    assert command == ["kvprofile", "doctor"]
    assert any(each["name"] == ENABLED and each["value"] == "1" for each in init.get("env", env))


def test_the_manifest_checks_before_and_while_it_serves():
    found = manifest()
    assert set(found) == {"ConfigMap", "Deployment", "Service"}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (init,), (vllm,) = pod["initContainers"], pod["containers"]
    check_containers(init, vllm["env"], init["command"])
    assert init["image"] == vllm["image"]
    assert vllm["readinessProbe"]["exec"]["command"][:3] == ["kvprofile", "doctor", "--url"]
    assert vllm["readinessProbe"]["timeoutSeconds"] < vllm["readinessProbe"]["periodSeconds"]
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in [*init["volumeMounts"], *vllm["volumeMounts"]]} == names
    budget = next(volume for volume in pod["volumes"] if volume["name"] == "budget")
    assert budget["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    assert found["ConfigMap"]["immutable"]
    path = next(each["value"] for each in vllm["env"] if each["name"] == "LLM_KVZIP_BUDGET")
    assert path == f"{vllm['volumeMounts'][0]['mountPath']}/{next(iter(found['ConfigMap']['data']))}"
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == found["Deployment"]["spec"]["selector"]["matchLabels"] == labels


def test_the_job_verifies_what_the_servers_serve():
    job = yaml.safe_load(BLOCKS["verify-job"])
    pod = job["spec"]["template"]["spec"]
    (verify,) = pod["containers"]
    (vllm,) = manifest()["Deployment"]["spec"]["template"]["spec"]["containers"]
    program, name, model, *words = verify["command"]
    assert (program, name, model) == ("kvprofile", "verify", vllm["command"][2])
    options = {option for each in load("verify").params for option in each.opts}
    assert {word for word in words if word.startswith("--")} <= options
    assert verify["image"] == vllm["image"]
    assert verify["resources"] == vllm["resources"]
    assert all(each in vllm["env"] for each in verify["env"])
    output = words[words.index("--output") + 1]
    assert output.rpartition("/")[2] in manifest()["ConfigMap"]["data"]
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in verify["volumeMounts"]} == names


def test_the_stack_s_values_say_the_same():
    values = yaml.safe_load(BLOCKS["production-stack"])
    (model,) = values["servingEngineSpec"]["modelSpec"]
    init = model["initContainer"]
    check_containers(init, model["env"], init["command"])
    assert init["image"] == f"{model['repository']}:{model['tag']}"
    vllm = manifest()["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert model["env"] == vllm["env"]
    assert model["extraVolumeMounts"][0] in vllm["volumeMounts"]


def test_alerts_ask_for_metrics_that_exist():
    (group,) = yaml.safe_load(BLOCKS["alerts"])["groups"]
    known = set(re.findall(r"`(kvprofile_\w+)`", METRICS)) | grafana.metrics() | OF_VLLM
    for rule in group["rules"]:
        assert {"alert", "expr", "for", "annotations"} == set(rule)
        names = set(re.findall(r"(?:kvprofile_|vllm:)\w+", rule["expr"]))
        assert names, rule
        assert names <= known, names - known


def test_the_counts_on_paper_are_ours(tmp_path):
    paper = fleet_on_paper.profiling(tmp_path)
    told = [
        f"{paper.tokens_read / 1e6:.1f} million",
        f"{paper.petaflop:,.0f} PFLOP",
        f"{paper.hours * 60:.1f} minutes on 8 servers, {paper.hours_one_server * 60:.1f} on one",
        f"{paper.weights_gb:.0f} GB: {paper.load_minutes:.1f} minutes at 1 GB/s",
        f"{paper.exchanged_gb_per_second:.0f} GB/s at that speed",
        f"about {paper.shard_mb:.0f} MB",
    ]
    one = plan(
        shape_of_config(tmp_path / "config.json", "70B"), parse_gpu_memory("H100"), 32_000,
        output_tokens=500, tensor_parallel_size=8, retentions=(0.5, 0.3),
    )  # fmt: skip
    for at in fleet(one, 8).at:
        sent = at.exchanged_bytes_per_second_per_gpu / 2**30
        told.append(f"| {at.retention:g} | {at.requests:,} | {at.tokens_per_second:,.0f} | {sent:.1f} GiB/s |")
    assert [words for words in told if words not in PAGE] == []


@pytest.mark.parametrize("name", ["kubernetes", "verify-job", "production-stack", "alerts"])
def test_every_block_is_there(name):
    assert name in BLOCKS
