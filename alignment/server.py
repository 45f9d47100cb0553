"""Rollouts on a vLLM server: the policy's adapter is sent to it before every draw, under a name of its own.

The server shares a folder with the trainer, and is started with what SERVED says: it may load adapters, and its
log-probabilities are those after the temperature, which is what was drawn from.
"""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, cast

from alignment.model import Model
from alignment.rollout import Reply

SERVED = ("--enable-lora", "--max-lora-rank", "64", "--logprobs-mode", "processed_logprobs")
"""Arguments of vLLM; the environment has VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."""
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said with every draw: a model's own generation_config would shape it otherwise."""
SECONDS = 1800.0
"""That a draw may take."""


class ServerError(RuntimeError):
    """The server did not do what it was asked; the message says what, and what to look at."""


class Server:
    """An engine behind HTTP, to which the adapter that speaks is written in folders of `folder`."""

    def __init__(self, url: str, model: Model, adapter: str, folder: Path):
        """url: up to and with `/v1`."""
        self._url, self._model, self._adapter, self._folder = url.rstrip("/"), model, adapter, folder
        self._name = f"{adapter}-{token_hex(4)}"  # a run that goes on finds the names of the one before taken
        self.version = 0

    def draw(
        self, prompts: Sequence[tuple[int, ...]], samples: int, limit: int, temperature: float, seed: int
    ) -> list[Reply]:
        """As `rollout.Engine.draw`; raises ServerError. The seed is not sent: the server draws as it likes."""
        name = self.push()
        body = {
            "model": name,
            "prompt": [list(prompt) for prompt in prompts],
            "n": samples,
            "max_tokens": limit,
            "temperature": temperature,
            **PLAIN,
            "stop_token_ids": sorted(self._model.template.end),
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        answer = json.loads(self._post("completions", body))
        choices = sorted(answer["choices"], key=lambda one: one["index"])
        if len(choices) != len(prompts) * samples:
            raise ServerError(f"{self._url} gave {len(choices)} replies to {len(prompts)} prompts, {samples} each")
        return [self._reply(prompts[i // samples], one) for i, one in enumerate(choices)]

    def _reply(self, prompt: tuple[int, ...], choice: Any) -> Reply:
        try:
            ids, drawn = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
        except (KeyError, TypeError):
            raise ServerError(
                f"{self._url} tells no token ids or log-probabilities; is it a vLLM of 0.29 or later?"
            ) from None
        if len(ids) != len(drawn) or not ids:
            raise ServerError(f"{self._url} gave {len(drawn)} log-probabilities for {len(ids)} tokens")
        finish: Literal["stop", "length"] = "stop" if ids[-1] in self._model.template.end else "length"
        return Reply(prompt, ids, drawn, finish, self.version)

    def push(self) -> str:
        """The name under which the server speaks as the policy does now; the one before is taken from it.

        A new name each time: what the server has cached for a prompt belongs to a name.
        """
        if self._model.adapters is None:
            raise ServerError("the policy has no adapter to send")
        before, self.version = f"{self._name}-{self.version}", self.version + 1
        name = f"{self._name}-{self.version}"
        self._model.adapters.save(self._adapter, self._folder / name, self._model.name)
        self._post("load_lora_adapter", {"lora_name": name, "lora_path": str((self._folder / name).resolve())})
        if self.version > 1:
            self._post("unload_lora_adapter", {"lora_name": before})
            shutil.rmtree(self._folder / before, ignore_errors=True)
        return name

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        head = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self._url}/{path}", json.dumps(body).encode(), head)  # noqa: S310 - as named
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
                return cast(bytes, answer.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            hint = f"; start vLLM with {' '.join(SERVED)}" if path.endswith("lora_adapter") else ""
            raise ServerError(f"{self._url}/{path}: HTTP {error.code}: {said}{hint}") from None
        except OSError as error:
            raise ServerError(f"{self._url}/{path} cannot be reached: {error}") from None
