"""What starts a training on a cluster: manifests and scripts say what `newel train` and torchrun take."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser

from alignment import recipe as recipes
from alignment.loop import STATE
from alignment.server import SERVED
from tests.alignment import tiny

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "deploy" / "train"
KUBERNETES = TRAIN / "kubernetes"
SCRIPTS = [TRAIN / "local.sh", *sorted((TRAIN / "slurm").iterdir())]


def documents(name: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all((KUBERNETES / name).read_text()) if one]


def recipe(method: str, path: Path) -> Any:
    """A recipe as the image sees it, where it is in /recipes."""
    found = recipes.load(importlib.import_module(f"alignment.{method}").Recipe, path)
    assert found.output.is_relative_to("/runs"), "the only place that pods write"
    return found


def started(args: list[str]) -> tuple[Any, str, list[str]]:
    """(torchrun's options, method, what follows it) of a call."""
    said = get_args_parser().parse_args(args)
    assert said.no_python and said.training_script == "newel" and said.training_script_args[0] == "train"
    return said, said.training_script_args[1], said.training_script_args[2:]


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_a_job_set_starts_a_recipe_on_as_many_nodes_and_gpus_as_it_has(method: str) -> None:
    [made] = documents(f"{method}.yaml")
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, [job] = made["metadata"]["name"], made["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == ["torchrun"]
    args = [one.replace("$(JOB_COMPLETION_INDEX)", "1") for one in container["args"]]
    said, called, [path] = started(args)
    assert called == method and said.node_rank == 1 and spec["completionMode"] == "Indexed"
    assert int(said.nnodes) == spec["parallelism"] == spec["completions"]
    assert int(said.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    # A JobSet names its pods SET-JOB-INDEX-POD, and its headless service as itself.
    assert said.master_addr == f"{name}-{job['name']}-0-0.{name}" and made["spec"]["network"]["enableDNSHostnames"]
    assert said.master_port == container["ports"][0]["containerPort"]
    recipe(method, KUBERNETES / Path(path).name)


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_a_pod_that_dies_ends_its_job_and_the_job_set_starts_it_again(method: str) -> None:
    [made] = documents(f"{method}.yaml")
    [job] = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    assert made["spec"]["failurePolicy"]["maxRestarts"] > 0
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert made["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("sft.yaml", "ppo.yaml", "rollouts.yaml"):
        for one in documents(name):
            if one["kind"] == "JobSet":
                [job] = one["spec"]["replicatedJobs"]
                yield name, job["template"]["spec"]["template"]["spec"]
            elif one["kind"] == "Deployment":
                yield name, one["spec"]["template"]["spec"]


@pytest.mark.parametrize(("name", "pod"), list(pods()))
def test_a_pod_mounts_what_there_is_and_runs_without_rights(name: str, pod: dict[str, Any]) -> None:
    claims = {one["metadata"]["name"] for one in documents("storage.yaml") if one["kind"] == "PersistentVolumeClaim"}
    maps = {one["name"] for one in documents("kustomization.yaml")[0]["configMapGenerator"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    [container] = pod["containers"]
    assert {one["name"] for one in container["volumeMounts"]} == set(volumes)
    assert {
        one["persistentVolumeClaim"]["claimName"] for one in volumes.values() if "persistentVolumeClaim" in one
    } <= (claims)
    assert {one["configMap"]["name"] for one in volumes.values() if "configMap" in one} <= maps
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert {one["mountPath"] for one in container["volumeMounts"]} >= {"/runs", "/dev/shm"}


def test_the_server_of_replies_is_the_one_that_the_recipe_of_ppo_asks() -> None:
    deployment, service, policy = documents("rollouts.yaml")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    how = recipe("ppo", KUBERNETES / "ppo.toml")
    assert how.engine == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}/v1"
    assert container["command"] == ["vllm", "serve"] and container["args"][0] == str(how.model)
    text = " ".join(container["args"])
    assert " ".join(SERVED) in text and how.lora.rank <= int(SERVED[SERVED.index("--max-lora-rank") + 1])
    assert {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"} in container["env"]
    assert deployment["spec"]["replicas"] == 1, "an adapter is loaded by one replica only"
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == policy["spec"]["podSelector"]["matchLabels"]
    assert how.ppo.cap is not None


def test_kustomize_finds_what_it_names_and_all_is_in_one_namespace() -> None:
    [made] = documents("kustomization.yaml")
    named = [*made["resources"], *(name for one in made["configMapGenerator"] for name in one["files"])]
    assert {*named, "kustomization.yaml", "sft.yaml", "ppo.yaml"} == {one.name for one in KUBERNETES.iterdir()}
    spaces = {
        one["metadata"].get("namespace", one["metadata"]["name"])
        for name in ("sft.yaml", "ppo.yaml", *made["resources"])
        for one in documents(name)
    }
    assert spaces == {made["namespace"]}


# --- scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda one: one.name)
def test_a_script_is_one_and_says_how_it_is_called(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and "RECIPE [KEY=VALUE]..." in done.stderr


FAKES = {
    "scontrol": "printf '%s\\n' node-a node-b node-c | head -n \"$SLURM_NNODES\"",
    "newel": 'echo "newel $*" >>"$SEEN"',
    "torchrun": 'echo "torchrun $*" >>"$SEEN"; [ "$(grep -c ^torchrun "$SEEN")" -gt 1 ]',  # the first attempt dies
    "vllm": 'echo "vllm $VLLM_ALLOW_RUNTIME_LORA_UPDATING $*" >>"$SEEN"; exec sleep 60',
    "curl": '[ "$(grep -c ^vllm "$SEEN")" -gt 0 ]',
    "sleep": 'exec /bin/sleep "$(echo "$1" | sed s/5/0.1/)"',
    # Runs the step once, as its second node.
    "srun": 'echo "srun $*" >>"$SEEN"; export SLURM_NODEID=1 SLURM_PROCID=1 SLURM_STEP_NUM_NODES=2\n'
    'while case "$1" in --*) true;; *) false;; esac; do shift; done; exec "$@"',
}


def submitted(folder: Path, script: str, nodes: int, *args: str, **more: str) -> list[str]:
    """What a batch script calls, with Slurm's and newel's programs in the place of real ones."""
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}", "SEEN": str(folder / "seen"), "SLURM_JOB_NODELIST": "node-[a-c]",
        "SLURM_NNODES": str(nodes), "SLURM_JOB_ID": "12345", "SLURM_GPUS_ON_NODE": "8", **more,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(TRAIN / "slurm" / script), *args], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return (folder / "seen").read_text().splitlines()


def test_slurm_starts_torchrun_on_every_node_and_again_when_it_dies(tmp_path: Path) -> None:
    seen = submitted(tmp_path, "train.sbatch", 2, "sft", "my recipe.toml", "rows=8")
    assert seen[0] == "newel train sft my recipe.toml rows=8 --dry-run"
    calls = [one.partition(" ")[2] for one in seen if one.startswith("torchrun")]
    assert len(calls) == 2 and calls[0] == calls[1]
    said, method, _ = started(calls[0].split())
    assert (method, said.nnodes, said.node_rank, said.nproc_per_node) == ("sft", "2", 1, "8")
    assert (said.master_addr, said.master_port) == ("node-a", 32345)


def test_slurm_gives_vllm_a_node_of_its_own_and_tells_the_recipe_where_it_is(tmp_path: Path) -> None:
    seen = submitted(tmp_path, "ppo.sbatch", 3, "ppo.toml", MODEL="/shared/sft")
    [server] = [one for one in seen if one.startswith("vllm")]
    assert server.startswith("vllm 1 serve /shared/sft --port 52345 ") and " ".join(SERVED) in server
    assert "--nodelist=node-a " in next(one for one in seen if one.startswith("srun"))
    steps = [one for one in seen if one.startswith("srun") and "torchrun" in one]
    assert len(steps) == 2 and "--nodes=2 --ntasks=2 --nodelist=node-b,node-c" in steps[0]
    [call, _] = [one.partition(" ")[2] for one in seen if one.startswith("torchrun")]
    said, method, rest = started(call.split())
    assert (method, said.master_addr, said.nnodes, said.node_rank) == ("ppo", "node-b", "2", 1)
    assert rest == ["ppo.toml", "engine=http://node-a:52345/v1"]


def written(folder: Path) -> Path:
    """A recipe of eleven updates by a tiny model, sharded."""
    model = tiny.model()
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    rows = [f'{{"prompt": "{one}", "completion": "{one}!", "split": "train"}}\n' for one in "abcdefghijk"]
    (folder / "rows.jsonl").write_text("".join(rows))
    path = folder / "sft.toml"
    path.write_text(
        'model = "base"\ndata = ["rows.jsonl"]\noutput = "run"\nrows = 1\ntokens = 64\ncheckpoint = 1\ndevice = "cpu"\n'
        'shard = true\nlora = "none"\n'
    )
    return path


def local(*args: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["sh", str(TRAIN / "local.sh"), *args], env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def test_two_processes_here_start_again_by_themselves_when_one_is_killed(tmp_path: Path) -> None:
    path = written(tmp_path)
    process = local("sft", str(path), "epochs=4", RESTARTS="1")
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / STATE).is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert out.splitlines() == [str(tmp_path / "run" / "release")]
    updates = [int(one) for one in re.findall(r"update (\d+)/44", told)]
    assert len(re.findall("going on from update", told)) == 1 and sorted(set(updates)) == list(range(1, 45))
    assert torch.load(tmp_path / "run" / STATE)["step"] == 44 and (tmp_path / "run" / "release" / "README.md").is_file()


def test_an_error_that_all_processes_have_is_told_once(tmp_path: Path) -> None:
    _, told = (process := local("sft", str(written(tmp_path)), "colour=red", "rows=0.5")).communicate(timeout=300)
    assert process.returncode == 1 and told.count("unknown key 'colour'") == 1
    assert "process 1:" not in told  # torchrun itself names processes by their pid


def test_the_page_names_all_that_is_there() -> None:
    page = (TRAIN / "README.md").read_text()
    names = [one.relative_to(TRAIN) for one in TRAIN.rglob("*") if one.is_file() and "__pycache__" not in one.parts]
    assert [str(one) for one in names if str(one) not in page and one.name != "README.md"] == []
