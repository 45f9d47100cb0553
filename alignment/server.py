"""Rollouts on a vLLM server: the policy is sent to it before every draw, an adapter under a name of its own.

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

from alignment.loop import Parallel
from alignment.lora import Adapters
from alignment.model import Model
from alignment.rollout import Reply

SERVED = ("--enable-lora", "--max-lora-rank", "64", "--logprobs-mode", "processed_logprobs")
"""Arguments of vLLM; the environment has VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or, where all weights are trained,
VLLM_SERVER_DEV_MODE=1 (the first two are not needed then)."""
HINTS = {
    "load_lora_adapter": f"; start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and {' '.join(SERVED)}",
    "collective_rpc": "; start vLLM with VLLM_SERVER_DEV_MODE=1, where nobody else can reach it",
}
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said with every draw: a model's own generation_config would shape it otherwise."""
SECONDS = 1800.0
"""That a draw may take."""


class ServerError(RuntimeError):
    """The server did not do what it was asked; the message says what, and what to look at."""


class Server:
    """An engine behind HTTP, to which the adapter that speaks is written in folders of `folder`.

    Of several processes the leading one writes it; all ask for it, each for replies to its own prompts.
    """

    def __init__(self, url: str, model: Model, adapter: str | None, folder: Path, parallel: Parallel):
        """url: up to and with `/v1`. adapter: None where all weights are trained, which the server reloads then."""
        self._parallel = parallel
        self._root = url.rstrip("/").removesuffix("/v1")
        self._url, self._model, self._adapter, self._folder = f"{self._root}/v1", model, adapter, folder
        [mark, *_] = parallel.gathered([token_hex(4)])
        self._name = f"{adapter or 'weights'}-{mark}"  # a run that goes on finds the names of the one before taken
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
        answer = json.loads(self._post("v1/completions", body))
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
        """The name under which the server speaks as the policy does now; what it was before is taken from it.

        A new name each time: what the server has cached for a prompt belongs to a name. Raises ServerError.
        """
        before, self.version = self._folder / f"{self._name}-{self.version}", self.version + 1
        now = self._folder / f"{self._name}-{self.version}"
        whole = self._model.gathered(self._parallel.leads)
        if self._parallel.leads:
            self._push_adapter(now, before.name) if self._adapter else self._push_weights(now, whole)
            shutil.rmtree(before, ignore_errors=True)
        self._parallel.wait()
        return now.name if self._adapter else self._served()

    def _push_adapter(self, now: Path, before: str) -> None:
        adapters = cast(Adapters, self._model.adapters)
        adapters.save(cast(str, self._adapter), now, self._model.name)
        self._post("v1/load_lora_adapter", {"lora_name": now.name, "lora_path": str(now.resolve())})
        if self.version > 1:
            self._post("v1/unload_lora_adapter", {"lora_name": before})

    def _push_weights(self, now: Path, whole: Model) -> None:
        whole.base.save_pretrained(now)
        self._post("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(now.resolve())}})
        self._post("reset_prefix_cache", {})

    def _served(self) -> str:
        """The name of the model that the server was started with."""
        return cast(str, json.loads(self._ask("v1/models"))["data"][0]["id"])

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        where = f"{self._root}/{path}"
        request = urllib.request.Request(where, body, {"content-type": "application/json"})  # noqa: S310 - as named
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
                return cast(bytes, answer.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            hint = HINTS.get(path.rpartition("/")[2], "")
            raise ServerError(f"{where}: HTTP {error.code}: {said}{hint}") from None
        except OSError as error:
            raise ServerError(f"{where} cannot be reached: {error}") from None
