"""The vLLM engine against stand-ins of vLLM that really generate, from the weights they were given.

vLLM itself cannot run here. `FakeLLM` and `FakeServer` keep its rules that matter: which ids end a
response, defaults from the model's generation config, prefix caches that outlive the weights.
"""

import copy
import json
import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_tokenizer, save
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from esr_train.errors import UserError
from esr_train.models import transformer
from esr_train.rollout import HFEngine, Sampling
from esr_train.vllm_engine import VLLMEngine, full_weights

PAD = 1  # neither an EOS nor a token of a response in these tests
GREEDY = Sampling(
    temperature=0.0, top_p=1.0, top_k=0, eos_token_ids=(299,), pad_token_id=PAD, suppress_from=300
)
PROMPTS = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, 10], [PAD, 11, 12, 13]])
MASK = PROMPTS != PAD
NUM_TOKENS = 8


def sampling(**changes):
    return Sampling(**{**vars(GREEDY), **changes})


# ---- the stand-ins ----


@dataclass
class SamplingParams:
    """Fields, defaults and refusals of vLLM's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int = 16
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True

    def __post_init__(self):
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")


def write(model, prompt, params, prefix_cache, key):
    """The response of one prompt, its end token included; the cache may know the first logits."""
    ends = set(params.stop_token_ids)
    if not params.ignore_eos:
        ends |= set(model.generation_config.eos_token_id)
    noise = torch.Generator().manual_seed(params.seed or 0)
    response = []

    def next_logits():
        return model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, -1].float()

    if key not in prefix_cache:
        prefix_cache[key] = next_logits()
    while len(response) < params.max_tokens and not ends & set(response):
        logits = next_logits() if response else prefix_cache[key].clone()
        ids = [*prompt, *response]
        used = logits[ids]
        penalised = torch.where(
            used > 0, used / params.repetition_penalty, used * params.repetition_penalty
        )
        logits[ids] = penalised
        for token, bias in (params.logit_bias or {}).items():
            logits[int(token)] += max(bias, -100.0)
        if params.temperature == 0:
            response.append(int(logits.argmax()))
            continue
        logits /= params.temperature
        if params.top_k:
            logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
        probs = logits.softmax(-1)
        response.append(int(torch.multinomial(probs, 1, generator=noise)))
    return response


class FakeLLM:
    """`vllm.LLM` of a saved model."""

    instances: list["FakeLLM"]

    def __init__(self, model, **words):
        self.words = words
        self.model = AutoModelForCausalLM.from_pretrained(model).to(getattr(torch, words["dtype"]))
        self.model.load_weights = self.load_weights
        self.prefix_cache = {}
        self.calls = []
        FakeLLM.instances.append(self)

    def load_weights(self, weights):
        own = dict(self.model.named_parameters())
        loaded = set()
        for name, weight in weights:
            own[name].copy_(weight)
            loaded.add(name)
        return loaded

    def apply_model(self, func):
        return [func(self.model)]

    def reset_prefix_cache(self):
        self.prefix_cache.clear()
        return True

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert not torch.is_autocast_enabled("cpu")
        self.calls.append(sampling_params)
        responses = [
            write(
                self.model,
                prompt["prompt_token_ids"],
                params,
                self.prefix_cache,
                tuple(prompt["prompt_token_ids"]),
            )
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(response))])
            for response in responses
        ]


class FakeServer:
    """`vllm serve` with room for one adapter. `answers` replaces the reply of a path."""

    def __init__(self, model):
        self.model = str(model)
        self.base = AutoModelForCausalLM.from_pretrained(model)
        self.adapters = {}
        self.prefix_cache = {}
        self.loads = []
        self.requests = []
        self.answers = {}
        self.delay = {}
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body):
                time.sleep(outer.delay.get(self.path, 0))
                with outer.lock:
                    status, reply = outer.reply(self.path, body)
                data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # a client that would not wait
                    pass

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False  # closing waits for what still generates
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def reply(self, path, body):
        if path in self.answers:
            return self.answers[path]
        if path == "/v1/models":
            cards = [{"id": "student", "root": self.model, "parent": None}]
            cards += [{"id": name, "parent": "student"} for name in self.adapters]
            return 200, {"object": "list", "data": cards}
        if path == "/v1/load_lora_adapter":
            return self.load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            if not self.adapters.pop(body["lora_name"], None):
                return 404, {"error": {"message": "cannot be found"}}
            return 200, "Success: removed"
        if path == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    def load(self, name, path):
        if name in self.adapters:
            return 400, {"error": {"message": f"'{name}' has already been loaded"}}
        if self.adapters:
            return 500, {"error": {"message": "no free slot"}}
        base = AutoModelForCausalLM.from_pretrained(self.model)
        self.adapters[name] = PeftModel.from_pretrained(base, path).eval()
        self.loads.append((name, path))
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    @torch.no_grad()
    def complete(self, body):
        self.requests.append(body)
        if body["model"] not in self.adapters:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        model = transformer(self.adapters[body["model"]])
        # The server's defaults come from the model's generation config.
        words = {"top_k": 2, "repetition_penalty": 1.5}
        names = SamplingParams.__dataclass_fields__
        words |= {name: value for name, value in body.items() if name in names}
        key = (body["model"], *body["prompt"])
        response = write(model, body["prompt"], SamplingParams(**words), self.prefix_cache, key)
        token_ids = response if body.get("return_token_ids") else None
        return 200, {"choices": [{"index": 0, "text": "", "token_ids": token_ids}]}


# ---- fixtures ----


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    FakeLLM.instances = []
    return module


@pytest.fixture
def server(student_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeServer(student_path)
    yield fake
    fake.close()


def load(path, lora=True, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if not lora:
        return model.eval()
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def step(student, seed=0):
    """An optimizer step on what trains, large enough to change what the student writes."""
    torch.manual_seed(seed)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    for _ in range(2):
        logits = transformer(student)(input_ids=torch.randint(3, 290, (4, 12))).logits
        (logits.float() ** 2).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


def written(engine, max_new_tokens=NUM_TOKENS):
    return engine.generate(PROMPTS, MASK, max_new_tokens=max_new_tokens)


def reference(student, settings=GREEDY):
    return written(HFEngine(transformer(student), settings))


@pytest.fixture
def make_engine(request, student_path, tmp_path):
    """make(mode, student, sampling, **options): an engine whose stand-in runs."""

    def make(mode, student, settings=GREEDY, **options):
        if mode == "server":
            url = request.getfixturevalue("server").url
            options = {"server_base_url": url, "adapter_dir": tmp_path, **options}
        else:
            request.getfixturevalue("vllm")
            options = {"dtype": torch.float32, **options}
        return VLLMEngine(student, settings, str(student_path), mode=mode, **options)

    return make


# ---- both modes ----


@pytest.mark.parametrize(
    ("mode", "lora"), [("colocate", True), ("colocate", False), ("server", True)]
)
def test_greedy_tokens_follow_the_students_weights(make_engine, student_path, mode, lora):
    student = load(student_path, lora)
    engine = make_engine(mode, student)
    before = reference(student)
    assert before.shape == (3, NUM_TOKENS)
    assert written(engine).tolist() == before.tolist()
    for seed in range(2):
        step(student, seed)
        after = reference(student)
        assert (after != before).any(dim=1).all()
        assert written(engine).tolist() == before.tolist()  # until it is told
        engine.update_weights()
        assert written(engine).tolist() == after.tolist()
        before = after


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_resumed_students_weights_are_there_from_the_start(make_engine, student_path, mode):
    student = load(student_path)
    step(student)
    assert written(make_engine(mode, student)).tolist() == reference(student).tolist()


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_only_our_eos_ends_a_response(make_engine, student_path, tmp_path, monkeypatch, mode):
    """It is kept, pads follow; the ids of the model's own generation config do not count."""
    student = load(student_path)
    step(student)
    first, second = reference(student)[:2].tolist()
    eos = next(t for t in first[2:-1] if t not in first[:2] and t not in second)
    ours = sampling(eos_token_ids=(eos, 298))
    # What the student writes is an EOS for vLLM, by the model's files.
    read = AutoModelForCausalLM.from_pretrained

    def with_another_eos(*args, **words):
        model = read(*args, **words)
        model.generation_config.eos_token_id = [first[1], second[3]]
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", with_another_eos)
    responses = written(make_engine(mode, student, ours))
    length = first.index(eos) + 1
    assert responses[0].tolist() == first[:length] + [PAD] * (NUM_TOKENS - length)
    assert responses[1].tolist() == second
    assert responses.dtype == torch.int64


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_short_responses_make_a_narrow_batch(make_engine, student_path, mode):
    student = load(student_path)
    ends = tuple(reference(student)[:, 0].tolist())
    responses = written(make_engine(mode, student, sampling(eos_token_ids=ends)))
    assert responses.tolist() == [[token] for token in ends]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_ids_outside_the_common_vocabulary_are_not_sampled(make_engine, student_path, mode):
    settings = sampling(temperature=2.0, suppress_from=40, eos_token_ids=(39,))
    engine = make_engine(mode, load(student_path), settings)
    prompts = torch.full((8, 2), 7)
    responses = engine.generate(prompts, prompts > 0, max_new_tokens=6)
    assert responses.max() < 40
    assert len(responses.unique()) > 10


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_samples_repeat_with_torchs_seed_and_rows_are_independent(make_engine, student_path, mode):
    engine = make_engine(mode, load(student_path), sampling(temperature=1.0))
    prompts = torch.full((4, 2), 7)

    def draw():
        return engine.generate(prompts, prompts > 0, max_new_tokens=5).tolist()

    torch.manual_seed(5)
    first, second = draw(), draw()
    assert len({tuple(row) for row in first + second}) == 8
    torch.manual_seed(5)
    assert [draw(), draw()] == [first, second]


def words_of(call):
    return {name: call[name] for name in ("temperature", "top_p", "top_k")}


def test_sampling_options_reach_vllm(make_engine, student_path, server):
    settings = sampling(temperature=0.3, top_p=0.9, top_k=7)
    expected = {"temperature": 0.3, "top_p": 0.9, "top_k": 7}
    written(make_engine("colocate", load(student_path), settings))
    assert all(words_of(vars(call)) == expected for call in FakeLLM.instances[0].calls[0])
    written(make_engine("server", load(student_path), settings))
    assert all(words_of(call) == expected for call in server.requests)
    bent = {"min_p": 0.0, "repetition_penalty": 1.0}
    bent |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert all(call.items() >= bent.items() for call in server.requests)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_response_that_was_cut_short_is_refused(
    make_engine, student_path, server, monkeypatch, mode
):
    engine = make_engine(mode, load(student_path))
    cut = SimpleNamespace(outputs=[SimpleNamespace(token_ids=(5, 6))])
    monkeypatch.setattr(FakeLLM, "generate", lambda *_, **__: [cut] * 3)
    server.answers["/v1/completions"] = 200, {"choices": [{"token_ids": [5, 6]}]}
    message = "use_vllm: a response of 2 tokens without EOS, where 8 were asked for: raise vllm_max"
    with pytest.raises(UserError, match=message):
        written(engine)
    assert written(engine, 2).tolist() == [[5, 6]] * 3
    with pytest.raises(UserError, match="a response of 2 tokens without EOS, where 1 were asked"):
        written(engine, 1)
    server.answers["/v1/completions"] = 200, {"choices": [{"token_ids": [5, 300]}]}
    cut.outputs[0].token_ids = (5, 300)
    with pytest.raises(UserError, match="vLLM wrote token 300, not among the 300 ids"):
        written(engine, 2)


def test_too_many_ids_to_suppress(student_path):
    student = load(student_path)
    transformer(student).config.vocab_size = 40 + 1025
    message = "the student has 1025 token ids more than the teacher, and vLLM can suppress 1024"
    with pytest.raises(UserError, match=message):
        VLLMEngine(student, sampling(suppress_from=40), str(student_path))


def test_unknown_mode(student_path):
    with pytest.raises(UserError, match="vllm_mode must be colocate or server, got colocated"):
        VLLMEngine(load(student_path), GREEDY, str(student_path), mode="colocated")


# ---- colocate ----


def test_merged_weights_are_those_of_peft_and_the_student_keeps_its_own(student_path):
    student = load(student_path, dtype=torch.bfloat16)  # with adapters in float32, as in training
    step(student)
    kept = {name: weight.clone() for name, weight in student.state_dict().items()}
    with torch.no_grad():
        weights = dict(full_weights(student))
    # Bitwise: merging in place and back would round.
    assert all(weight.equal(kept[name]) for name, weight in student.state_dict().items())
    expected = dict(copy.deepcopy(student).float().merge_and_unload().named_parameters())
    assert weights.keys() == expected.keys()
    assert not weights["model.layers.0.mlp.up_proj.weight"].equal(
        kept["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"]
    )
    for name, weight in weights.items():
        assert weight.equal(expected[name].to(torch.bfloat16))  # one rounding


def test_colocate_options_reach_vllm(make_engine, student_path):
    engine = make_engine(
        "colocate",
        load(student_path),
        dtype=torch.bfloat16,
        gpu_memory_utilization=0.4,
        max_model_len=77,
        trust_remote_code=True,
    )
    with torch.autocast("cpu", torch.bfloat16):
        written(engine)  # the stand-in checks that autocast is off inside
    assert FakeLLM.instances[0].words == {
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.4,
        "max_model_len": 77,
        "trust_remote_code": True,
        "generation_config": "vllm",
    }
    assert all(not call.detokenize for call in FakeLLM.instances[0].calls[0])


def test_colocate_runs_in_this_process(make_engine, student_path):
    make_engine("colocate", load(student_path))
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_missing_package(student_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setitem(sys.modules, "vllm", None)
    message = (
        "use_vllm: the package vllm is not installed; pip install 'esr-kernels[vllm]', "
        "or leave use_vllm out"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        VLLMEngine(load(student_path), GREEDY, str(student_path))


def test_a_package_that_does_not_import(student_path, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("import a_library_that_vllm_needs\n")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    message = "vllm cannot be imported (No module named 'a_library_that_vllm_needs'); reinstall"
    with pytest.raises(UserError, match=re.escape(message)):
        VLLMEngine(load(student_path), GREEDY, str(student_path))


def test_vllm_does_not_start(make_engine, student_path, vllm, monkeypatch):
    def no_memory(*_, **__):
        raise ValueError("No available memory for the cache blocks.\nTry more.")

    monkeypatch.setattr(vllm, "LLM", no_memory)
    message = "could not start (No available memory for the cache blocks.); where memory is short, "
    with pytest.raises(UserError, match=re.escape(message) + "change vllm_gpu_memory_utilization"):
        make_engine("colocate", load(student_path))


def test_sampling_that_vllm_refuses_is_refused_before_it_starts(make_engine, student_path):
    with pytest.raises(UserError, match=re.escape("temperature must be in [0, 2], got 5.0.")):
        make_engine("colocate", load(student_path), sampling(temperature=5.0))
    assert FakeLLM.instances == []


def test_a_prompt_that_vllm_refuses(make_engine, student_path, monkeypatch):
    engine = make_engine("colocate", load(student_path))

    def too_long(*_, **__):
        raise ValueError("The decoder prompt (length 90) is longer than the maximum model length")

    monkeypatch.setattr(FakeLLM, "generate", too_long)
    with pytest.raises(UserError, match="vLLM refused a prompt \\(The decoder prompt"):
        written(engine)


def test_weights_that_vllm_does_not_take(make_engine, student_path, monkeypatch):
    engine = make_engine("colocate", load(student_path))
    monkeypatch.setattr(engine.backend.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(UserError, match="vLLM kept its prefix cache"):
        engine.update_weights()

    model = engine.backend.llm.model
    model.load_weights = lambda weights: {name for name, _ in weights} - {"model.norm.weight"}
    with pytest.raises(UserError, match="got no new model.norm.weight from the student"):
        engine.update_weights()

    def other_names(weights):
        raise KeyError("layers.0.mlp")

    model.load_weights = other_names
    with pytest.raises(UserError, match="cannot take the student's weights \\(KeyError: 'layers"):
        engine.update_weights()


# ---- server ----


def test_one_adapter_at_a_time_under_new_names(
    make_engine, server, student_path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    engine = make_engine("server", load(student_path), adapter_dir=Path("."))
    for _ in range(2):
        engine.update_weights()
    names = [name for name, _ in server.loads]
    assert len(set(names)) == 3
    assert list(server.adapters) == names[-1:]
    # Absolute, inside the folder given, and only the one in use is kept.
    assert all(Path(path).is_relative_to(tmp_path) for _, path in server.loads)
    assert [Path(path).exists() for _, path in server.loads] == [False, False, True]
    server.adapters.clear()  # it was restarted
    engine.update_weights()
    assert written(engine).tolist() == reference(engine.backend.student).tolist()
    del engine
    assert list(tmp_path.iterdir()) == []

    server.adapters.clear()
    make_engine("server", load(student_path))  # the server knows names of an earlier run
    assert server.loads[-1][0] not in [name for name, _ in server.loads[:-1]]


def test_the_address_may_end_in_v1(make_engine, server, student_path):
    student = load(student_path)
    engine = make_engine("server", student, server_base_url=server.url + "/v1/")
    assert written(engine).tolist() == reference(student).tolist()


@pytest.mark.parametrize("url", [None, "", "localhost:8000", "file:///etc"])
def test_no_address(make_engine, student_path, url):
    with pytest.raises(UserError, match="vllm_server_base_url must be the server's address, such"):
        make_engine("server", load(student_path), server_base_url=url)


def test_full_fine_tuning_needs_colocate(make_engine, student_path):
    with pytest.raises(
        UserError, match="vllm_mode server needs use_peft: .* vllm_mode to colocate"
    ):
        make_engine("server", load(student_path, lora=False))


def test_server_down(make_engine, server, student_path):
    engine = make_engine("server", load(student_path))
    url = server.url
    server.http.shutdown()
    server.http.server_close()
    for use in (written, lambda engine: engine.update_weights()):
        with pytest.raises(
            UserError, match=f"vllm_server_base_url {url}: /v1/.* cannot be reached"
        ):
            use(engine)
    command = (
        f"start a server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {student_path} "
        "--enable-lora --max-lora-rank 8 --generation-config vllm"
    )
    with pytest.raises(UserError, match=f"Connection refused.*{re.escape(command)}$"):
        make_engine("server", load(student_path), server_base_url=url)


@pytest.mark.parametrize(
    ("path", "status", "body", "message"),
    [
        ("/v1/load_lora_adapter", 404, {"detail": "Not Found"}, "404 .*Not Found.*_UPDATING=True"),
        (
            "/v1/load_lora_adapter",
            500,
            "rank 32 is\n over 16",
            r"500 \(rank 32 is over 16\); start",
        ),
        ("/v1/models", 401, "Unauthorized", r"401 \(Unauthorized\); see the server's log"),
        ("/v1/models", 200, "<html>", "answered <html>, which is not vLLM's reply"),
        ("/v1/models", 200, [], "is not vLLM's reply"),
        ("/v1/models", 200, {"data": [1]}, "is not vLLM's reply"),
        ("/v1/models", 200, {"data": [{"root": "student"}]}, "is not vLLM's reply"),
        (
            "/v1/models",
            200,
            {
                "data": [
                    {"id": "other", "root": "org/other-7b"},
                    {"id": "student", "parent": "other"},
                ]
            },
            "it serves other, org/other-7b, not .*student; start it with VLLM_ALLOW",
        ),
        ("/v1/completions", 400, "too long", r"/v1/completions answered 400 \(too long\)"),
        ("/v1/completions", 200, "{", "answered {, which is not vLLM's reply"),
        ("/v1/completions", 200, {"choices": []}, "is not vLLM's reply"),
        ("/v1/completions", 200, {"choices": [{"token_ids": [5]}] * 2}, "is not vLLM's reply"),
        ("/v1/completions", 200, {"choices": [{"text": "a"}]}, "expected a server of vLLM 0.22"),
        ("/v1/completions", 200, {"choices": [{"token_ids": None}]}, "is not vLLM's reply"),
        ("/v1/completions", 200, {"choices": [{"token_ids": ["5"]}]}, "is not vLLM's reply"),
        ("/v1/completions", 200, {"object": "x" * 400}, r"x{280,} \.\.\., which is not vLLM's"),
    ],
)
def test_bad_answers(make_engine, server, student_path, path, status, body, message):
    server.answers[path] = status, body
    with pytest.raises(UserError, match=f"^vllm_server_base_url {server.url}: .*{message}"):
        written(make_engine("server", load(student_path)))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
def test_a_slow_server(make_engine, server, student_path, path):
    server.delay[path] = 0.5
    message = f"{path} gave no answer in 0.2 s; raise vllm_server_timeout"
    with pytest.raises(UserError, match=re.escape(message)):
        written(make_engine("server", load(student_path), server_timeout=0.2))


def test_a_served_name_is_enough(make_engine, server, student_path):
    """A model from a cache has a root that says nothing."""
    server.answers["/v1/models"] = 200, {"data": [{"id": "student", "root": "/snapshots/0af3"}]}
    make_engine("server", load(student_path))


def test_the_command_names_a_rank_that_vllm_takes(server, student_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(student_path)
    student = get_peft_model(model, LoraConfig(r=33, target_modules=["q_proj"]))
    server.answers["/v1/load_lora_adapter"] = 500, "no"
    with pytest.raises(UserError, match="--max-lora-rank 64 "):
        VLLMEngine(
            student,
            GREEDY,
            str(student_path),
            mode="server",
            server_base_url=server.url,
            adapter_dir=tmp_path,
        )


def test_another_architecture(tmp_path, vllm):
    """Untied head and biases: nothing of the names is Qwen2's."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = LlamaConfig(vocab_size=300, tie_word_embeddings=False, **shape, **heads)
    path = save(tmp_path / "llama", LlamaForCausalLM(config), make_tokenizer())
    student = load(path)
    engine = VLLMEngine(student, GREEDY, str(path), dtype=torch.float32)
    step(student)
    engine.update_weights()
    assert written(engine).tolist() == reference(student).tolist()
