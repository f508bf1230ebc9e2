"""Rollouts by vLLM: in this process (`colocate`), or by an OpenAI-compatible server (`server`).

Written against the documented API of vLLM 0.22 to 0.31, the versions that TRL 1.16 takes, and
tested against stand-ins of that API: it has not been run with vLLM itself, and its speed is
unmeasured. What it relies on:

- `LLM(model, dtype, gpu_memory_utilization, max_model_len, generation_config, trust_remote_code)`,
  `generate` with token ids and one `SamplingParams` a prompt, `apply_model`, `reset_prefix_cache`;
  `load_weights` of vLLM's model classes, which take Transformers' names and return their own.
- `/v1/models`, `/v1/completions` with `return_token_ids`, and under
  VLLM_ALLOW_RUNTIME_LORA_UPDATING `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`.
- `ignore_eos` turns off every EOS that vLLM knows but `stop_token_ids`, and the token that stopped
  a response is part of its `token_ids`.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import urllib.error
import urllib.request
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from esr_train.checkpoint import full_disk_names
from esr_train.decode_weights import merged_weight
from esr_train.errors import UserError, first_line
from esr_train.rollout import Sampling

MAX_SUPPRESSED = 1024  # logit biases that vLLM takes a request
MAX_CONNECTIONS = 64


class VLLMEngine:
    """Samples from the student's weights as they were at the last `update_weights`."""

    def __init__(
        self,
        student: Any,
        sampling: Sampling,
        model_name: str,
        *,
        mode: str = "colocate",
        dtype: torch.dtype = torch.bfloat16,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        trust_remote_code: bool = False,
        server_base_url: str | None = None,
        server_timeout: float = 240.0,
        adapter_dir: Path | None = None,
    ) -> None:
        """student: a PeftModel, or in `colocate` also the Transformers model itself.

        model_name: the folder or Hub id that the student was loaded from. `colocate` takes dtype to
        trust_remote_code, `server` the rest: server_timeout in seconds a request; adapter_dir, a
        folder that the server can read too, where the adapters pass through.
        Raises UserError where vLLM or its server is missing or refuses; it names the option.
        """
        self.sampling = sampling
        vocab_size = student.config.get_text_config().vocab_size
        words = _sampling_words(sampling, vocab_size)
        self.backend: _Colocated | _Server
        if mode == "colocate":
            self.backend = _Colocated(
                student,
                words,
                model=model_name,
                dtype=str(dtype).removeprefix("torch."),
                gpu_memory_utilization=gpu_memory_utilization,
                max_model_len=max_model_len,
                trust_remote_code=trust_remote_code,
            )
        elif mode == "server":
            self.backend = _Server(
                student, words, model_name, server_base_url, server_timeout, adapter_dir or Path()
            )
        else:
            raise UserError(f"vllm_mode must be colocate or server, got {mode}")
        self.update_weights()

    @torch.no_grad()
    def update_weights(self) -> None:
        """From here on, sample from the student's present weights."""
        self.backend.update_weights()

    def release(self) -> None:
        """Nothing to do: vLLM keeps its share of the memory."""

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: int) -> Tensor:
        """Responses [B, R] int64 to left-padded prompts [B, P]: up to their EOS, then pads."""
        prompts = [
            ids[mask].tolist()
            for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)
        ]
        # A seed a row: rows of one seed would share their noise, equal prompts all their tokens.
        # Drawn from torch's generator, they make a step's rollouts repeat with its seed.
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        # The caller's autocast is meant for Transformers' modules, not for vLLM's.
        with torch.autocast(prompt_ids.device.type, enabled=False):
            rows = self.backend.generate(prompts, seeds, max_new_tokens)
        for row in rows:
            self._check(row, max_new_tokens)
        responses = torch.full((len(rows), max(map(len, rows))), self.sampling.pad_token_id)
        for response, row in zip(responses, rows, strict=True):
            response[: len(row)] = torch.tensor(row)
        return responses.to(prompt_ids.device)

    def _check(self, row: list[int], max_new_tokens: int) -> None:
        if not all(0 <= token < self.sampling.suppress_from for token in row):
            raise UserError(
                f"use_vllm: vLLM wrote token {max(row)}, not among the "
                f"{self.sampling.suppress_from} ids of the common vocabulary"
            )
        ended = bool(row) and row[-1] in self.sampling.eos_token_ids
        if len(row) > max_new_tokens or not (ended or len(row) == max_new_tokens):
            raise UserError(
                f"use_vllm: a response of {len(row)} tokens without EOS, where {max_new_tokens} "
                "were asked for: raise vllm_max_model_length (a server's --max-model-len), and "
                "start a server with --generation-config vllm"
            )


def _sampling_words(sampling: Sampling, vocab_size: int) -> dict[str, Any]:
    """In the names that `SamplingParams` and `/v1/completions` share.

    All are given, so that no default from a model's generation config bends the distribution.
    """
    suppressed = range(sampling.suppress_from, vocab_size)
    if len(suppressed) > MAX_SUPPRESSED:
        raise UserError(
            f"use_vllm: the student has {len(suppressed)} token ids more than the teacher, and "
            f"vLLM can suppress {MAX_SUPPRESSED}; leave use_vllm out"
        )
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.eos_token_ids),
        "ignore_eos": True,
        # `allowed_token_ids` would be the exact way, but it ends at 1024 ids too. A server clamps
        # the bias to -100: a probability of e^-100 at temperature 1.
        "logit_bias": dict.fromkeys(suppressed, -100.0) or None,
    }


def full_weights(student: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) as in a checkpoint of the student's class, LoRA merged, one at a time."""
    if not isinstance(student, PeftModel):
        yield from student.named_parameters()
        return
    model = student.get_base_model()
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    for name, weight in model.named_parameters():
        layer, adapted, kind = name.rpartition(".base_layer.")
        if adapted and kind == "weight":
            yield f"{layer}.weight", merged_weight(layers[layer]).to(weight.dtype)
        elif ".lora_" not in name:
            yield name.replace(".base_layer.", "."), weight


class _Colocated:
    """`vllm.LLM` in this process, on the student's GPU; it holds a whole copy of the weights."""

    def __init__(self, student: Any, words: dict[str, Any], **llm_words: Any) -> None:
        # In this process, `apply_model` hands tensors over without pickling them.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import vllm
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
                raise UserError(
                    "use_vllm: the package vllm is not installed; pip install 'esr-kernels[vllm]', "
                    "or leave use_vllm out"
                ) from error
            raise UserError(
                f"use_vllm: the package vllm cannot be imported ({first_line(error)}); reinstall "
                "it for this version of torch, or leave use_vllm out"
            ) from error
        self.student = student
        self.words = words
        self.sampling_params = vllm.SamplingParams
        try:
            self._params(seed=0, max_new_tokens=1)  # what it refuses, before the weights load
            self.llm = vllm.LLM(generation_config="vllm", **llm_words)
        except Exception as error:  # of vllm, torch, transformers
            raise UserError(
                f"use_vllm: vLLM could not start ({first_line(error)}); where memory is short, "
                f"change vllm_gpu_memory_utilization ({llm_words['gpu_memory_utilization']}) or "
                "lower vllm_max_model_length"
            ) from error

    def _params(self, *, seed: int, max_new_tokens: int) -> Any:
        return self.sampling_params(
            **self.words, seed=seed, max_tokens=max_new_tokens, detokenize=False
        )

    def generate(
        self, prompts: list[list[int]], seeds: list[int], max_new_tokens: int
    ) -> list[list[int]]:
        try:
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [self._params(seed=seed, max_new_tokens=max_new_tokens) for seed in seeds],
                use_tqdm=False,
            )
        except ValueError as error:  # a prompt longer than vllm_max_model_length
            raise UserError(f"use_vllm: vLLM refused a prompt ({first_line(error)})") from error
        return [list(output.outputs[0].token_ids) for output in outputs]

    def update_weights(self) -> None:
        self.llm.apply_model(self._load)
        if self.llm.reset_prefix_cache() is False:
            raise UserError("use_vllm: vLLM kept its prefix cache, which the old weights wrote")

    def _load(self, model: Any) -> None:
        """Copy the student's weights into vLLM's model. It must have taken all of its own."""
        try:
            loaded = model.load_weights(full_weights(self.student))
            missing = {name for name, _ in model.named_parameters()}.difference(loaded)
        except Exception as error:  # a name or shape that its class does not know
            raise UserError(
                f"use_vllm: vLLM's {type(model).__name__} cannot take the student's weights "
                f"({type(error).__name__}: {first_line(error)}); leave use_vllm out"
            ) from error
        if missing:
            raise UserError(
                f"use_vllm: vLLM's {type(model).__name__} got no new {min(missing)} from the "
                "student, so it would sample from old weights; leave use_vllm out"
            )


class _Server:
    """An adapter on somebody's `vllm serve`; each update is a new adapter under a new name.

    Under one name, also with `load_inplace`, vLLM reuses the old adapter's prefix cache
    (vllm-project/vllm#42125).
    """

    def __init__(
        self,
        student: Any,
        words: dict[str, Any],
        model_name: str,
        base_url: str | None,
        timeout: float,
        adapter_dir: Path,
    ) -> None:
        if not base_url or not base_url.startswith(("http://", "https://")):
            raise UserError(
                "vllm_server_base_url must be the server's address, such as "
                f"http://localhost:8000, got {base_url}"
            )
        if not isinstance(student, PeftModel):
            raise UserError(
                "vllm_mode server needs use_peft: a server takes new adapters, not new weights; "
                "set vllm_mode to colocate"
            )
        self.student = student
        self.words = words
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        # vLLM wants one of a few ranks; the powers of two from 8 on are among them.
        lora: Any = student.peft_config[student.active_adapter]
        rank = max(8, 1 << (lora.r - 1).bit_length())
        self.command = (
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {model_name} --enable-lora "
            f"--max-lora-rank {rank} --generation-config vllm"
        )
        self.prefix = f"esr-{uuid.uuid4().hex[:8]}"
        self.updates = 0
        self.folder = (adapter_dir / f".{self.prefix}").resolve()
        self._check_model(model_name)
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @property
    def adapter(self) -> str:
        return f"{self.prefix}-{self.updates}"

    def _check_model(self, model_name: str) -> None:
        """An adapter may fit another model of the same shape, and would sample nonsense."""
        reply = self._json("/v1/models")
        try:
            cards = [card for card in reply["data"] if not card.get("parent")]
            served = [str(name) for card in cards for name in (card["id"], card.get("root"))]
        except (TypeError, KeyError, AttributeError) as error:
            raise self._malformed("/v1/models", reply) from error
        if Path(model_name).name not in {Path(name).name for name in served}:
            raise UserError(
                f"vllm_server_base_url {self.base_url}: it serves {', '.join(served)}, not "
                f"{model_name}; start it with {self.command}"
            )

    def update_weights(self) -> None:
        old, old_folder = self.adapter, self.folder / self.adapter
        self.updates += 1
        new_folder = self.folder / self.adapter
        with full_disk_names(new_folder):
            self.student.save_pretrained(str(new_folder))
        if self.updates > 1:
            # First, for a server with room for one adapter. One that was restarted has forgotten
            # it, which is as good.
            self._send("/v1/unload_lora_adapter", {"lora_name": old}, allow_refusal=True)
        self._send(
            "/v1/load_lora_adapter", {"lora_name": self.adapter, "lora_path": str(new_folder)}
        )
        shutil.rmtree(old_folder, ignore_errors=True)

    def generate(
        self, prompts: list[list[int]], seeds: list[int], max_new_tokens: int
    ) -> list[list[int]]:
        def complete(prompt: list[int], seed: int) -> list[int]:
            body = {
                "model": self.adapter,
                "prompt": prompt,
                "max_tokens": max_new_tokens,
                "seed": seed,
                "return_token_ids": True,
                **self.words,
            }
            reply = self._json("/v1/completions", body)
            try:
                (choice,) = reply["choices"]
                tokens = choice["token_ids"]
                if not all(type(token) is int for token in tokens):
                    raise TypeError
            except (TypeError, KeyError, ValueError) as error:
                raise self._malformed("/v1/completions", reply) from error
            return list(tokens)

        # The API has one seed a request, so each row is a request; the server batches them.
        with ThreadPoolExecutor(min(len(prompts), MAX_CONNECTIONS)) as pool:
            return list(pool.map(complete, prompts, seeds))

    def _json(self, path: str, body: dict[str, Any] | None = None) -> Any:
        text = self._send(path, body)
        try:
            return json.loads(text)
        except ValueError as error:
            raise self._malformed(path, text) from error

    def _send(
        self, path: str, body: dict[str, Any] | None = None, allow_refusal: bool = False
    ) -> str:
        """The reply to `body` as JSON, or to a GET without one."""
        request = urllib.request.Request(
            self.base_url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return reply.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            if allow_refusal:
                return ""
            advice = "see the server's log"
            if "lora" in path:
                advice = f"start it with {self.command}, on a machine that can read {self.folder}"
            raise UserError(
                f"vllm_server_base_url {self.base_url}: {path} answered {error.code} "
                f"({_excerpt(error.read().decode(errors='replace'))}); {advice}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise UserError(
                    f"vllm_server_base_url {self.base_url}: {path} gave no answer in "
                    f"{self.timeout:g} s; raise vllm_server_timeout, or see the server's log"
                ) from error
            raise UserError(
                f"vllm_server_base_url {self.base_url}: {path} cannot be reached "
                f"({first_line(error)}); start a server with {self.command}"
            ) from error

    def _malformed(self, path: str, reply: object) -> UserError:
        return UserError(
            f"vllm_server_base_url {self.base_url}: {path} answered {_excerpt(str(reply))}, which "
            "is not vLLM's reply; expected a server of vLLM 0.22 or later"
        )


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
