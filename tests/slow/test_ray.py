"""Shards as tasks of a Ray cluster of two nodes on this machine, and what Ray would carry for vLLM's executor.

Needs Ray (`pip install 'kvprofile[ray]'`), as nothing else here does.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kvprofile.budget import probe
from kvprofile.checkpoint import Source, describe
from kvprofile.cli import run
from kvprofile.scoring.shard import Shard
from kvprofile.scoring.vllm_engine import place_in_vllm
from tests.helpers.models import POCKET
from tests.helpers.score_runs import finish, start, wait_for_chunks

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvprofile[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.loopback]

SHARDS = 4
HERE = "127.0.0.1"


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """A cluster of two nodes with one core each; gives their ids. Ray asks clouds and its makers for nothing."""
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # nodes meet at 127.0.0.1, and here:
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_REPORT_URL", f"http://{HERE}:9")  # it reports that it does not report
    (tmp_path / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
    monkeypatch.setenv("HOME", str(tmp_path))  # where that says that this is not a cloud
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield {found["NodeID"] for found in ray.nodes()}
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_shards_are_tasks_and_one_that_is_killed_runs_again(nodes, tiny_checkpoint, tmp_path):
    one, output = tmp_path / "one.json", tmp_path / "shared" / "tiny.json"
    more = ["--corpus=generate:code:3:6000", "--corpus=generate:voice:4:6000"]
    finish(tiny_checkpoint, one, *more)
    killed = tmp_path / "killed"

    @ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")
    def score(number: int) -> tuple[str, str]:
        options = [*more, "--shard", f"{number}/{SHARDS}"]
        if number == 2 and not killed.exists():
            process = start(tiny_checkpoint, output, *options)
            wait_for_chunks(Shard(number, SHARDS).path(output), 5, process)
            killed.touch()
            process.kill()
            os.kill(os.getpid(), signal.SIGKILL)  # Ray sees its worker die
        said = finish(tiny_checkpoint, output, *options).stderr
        return ray.get_runtime_context().get_node_id(), said

    done = ray.get([score.remote(number) for number in range(1, SHARDS + 1)], timeout=300)
    assert {node for node, _ in done} == nodes
    assert len(nodes) == 2
    assert killed.exists()
    assert "chunks are finished already" in done[1][1]
    paths: list[Path] = [Shard(number, SHARDS).path(output) for number in range(1, SHARDS + 1)]
    assert run(["merge", *map(str, paths), "--output", str(output)]) == 0
    assert output.read_bytes() == one.read_bytes()
    assert probe.path_of(output).read_bytes() == probe.path_of(one).read_bytes()


def test_ray_carries_what_scoring_sends_to_workers():
    """As far as this goes without a GPU: vLLM has no Ray for CPUs, so that executor itself was never run."""
    pytest.importorskip("vllm")
    from ray import cloudpickle
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.abstract import Executor

    from kvprofile.capture import WORKER, refuse
    from kvprofile.capture.marks import Mark
    from kvprofile.capture.worker import CaptureWorker

    description = describe(Source("pocket", POCKET, None))
    ranks = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "others": ["distributed_executor_backend=ray"]}
    engine = place_in_vllm(description, "float32", "auto", 500, **ranks)
    config = EngineArgs(**engine.arguments).create_engine_config()
    assert Executor.get_class(config).uses_ray
    assert refuse.problems(config) == []
    assert config.parallel_config.worker_extension_cls == WORKER  # a name: each node imports its own kvprofile

    mark = Mark("document-0/3", 400, 4, (10, 60), (16, 60))
    sent = cloudpickle.loads(cloudpickle.dumps((CaptureWorker, "kvprofile_take", (mark.key,))))
    assert sent == (CaptureWorker, "kvprofile_take", (mark.key,))
    carried = cloudpickle.loads(cloudpickle.dumps(SamplingParams(extra_args=mark.as_extra_args())))
    assert Mark.of(carried) == mark
