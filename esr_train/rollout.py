"""Student generation: at most N response tokens a prompt, by one of several engines."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from esr_kernels import LMHead, SamplingState, sample_tokens
from esr_train.decode_weights import DecodeWeights
from esr_train.decoder import MakeDecoder, best_decoder
from esr_train.errors import UserError, first_line


@dataclass(frozen=True)
class Sampling:
    """How the student writes. suppress_from: ids from here on are outside the common vocabulary."""

    temperature: float
    top_p: float
    top_k: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    suppress_from: int


class Engine(Protocol):
    """What writes rollouts."""

    def update_weights(self) -> None:
        """Write with the student's present weights from now on."""

    def release(self) -> None:
        """Give back what is kept for the next rollouts: they will be of another kind."""

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: int) -> Tensor:
        """Responses [B, R] int64 to left-padded prompts [B, P]; anything may follow a row's EOS."""


class HFEngine:
    """`model.generate` of Transformers."""

    def __init__(self, model: Any, sampling: Sampling, dtype: torch.dtype = torch.float32) -> None:
        """model: the Transformers model itself, with any adapters inside it. dtype: of compute."""
        self.model = model
        self.dtype = dtype
        vocab_size = model.config.get_text_config().vocab_size
        words: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            words.update(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
            )
        self.generation_config = GenerationConfig(
            eos_token_id=list(sampling.eos_token_ids),
            pad_token_id=sampling.pad_token_id,
            suppress_tokens=list(range(sampling.suppress_from, vocab_size)) or None,
            **words,
        )

    def update_weights(self) -> None:
        """Nothing to do: it is the student itself that writes."""

    def release(self) -> None:
        """Nothing to do: nothing is kept."""

    @torch.no_grad()
    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: int) -> Tensor:
        # generate() fills what we leave unset from the model's own generation config; a repetition
        # penalty or min_p from there would make the rollout another distribution than the loss's.
        generation_config = copy.copy(self.generation_config)
        generation_config.max_new_tokens = max_new_tokens
        own, was_training = self.model.generation_config, self.model.training
        self.model.generation_config = GenerationConfig()
        self.model.eval()
        bf16 = self.dtype == torch.bfloat16
        try:
            with torch.autocast(prompt_ids.device.type, torch.bfloat16, enabled=bf16):
                sequences = self.model.generate(
                    input_ids=prompt_ids,
                    attention_mask=prompt_mask.long(),
                    generation_config=generation_config,
                )
        finally:
            self.model.generation_config = own
            self.model.train(was_training)
        return sequences[:, prompt_ids.shape[1] :]


# Slots of a session: a power of two, so that few lengths need a graph of their own. What it is
# depends on the batch alone, not on earlier ones, so a resumed run computes what it would have.
FEWEST_SLOTS = 256
# Sessions that are kept: a batch near a power of two goes to and fro.
MOST_SESSIONS = 2
# Tokens between two looks at whether all rows are done: the host runs at most twice as far ahead.
CHECK_EVERY = 8


class GraphEngine:
    """Our decoder: a static cache, and a step that is one CUDA graph from token to token.

    On a CPU the same step runs without a graph. The samples depend on torch's random state alone.
    error: why what it writes would not be the model's; None of a model that it can decode.
    """

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        dtype: torch.dtype = torch.float32,
        merge_adapters: bool = True,
    ) -> None:
        """As `HFEngine`. merge_adapters: False leaves LoRA's layers in the step."""
        self.sampling = sampling
        self.weights = DecodeWeights(model, dtype, merge_adapters)
        self.make_decoder, self.error = best_decoder(self.weights.model)
        self.sessions: dict[tuple[int, int], Session] = {}  # the last used last

    def update_weights(self) -> None:
        self.weights.refresh()

    def release(self) -> None:
        self.sessions.clear()

    @torch.no_grad()
    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: int) -> Tensor:
        batch_size, width = prompt_ids.shape
        # From the CPU's generator: the step's seed decides, and no device is waited for.
        seed = int(torch.randint(2**62, ()))
        with torch.autocast(prompt_ids.device.type, enabled=False):
            # At least two steps: capturing one runs two.
            num_slots = width + max(max_new_tokens, 2)
            session = self._session(batch_size, num_slots, prompt_ids.device)
            session.start(prompt_ids, prompt_mask, seed)
            count = 1
            while count < max_new_tokens and not session.all_done(count):
                session.step()
                count += 1
        return session.state.tokens[:, :count].clone()

    def _session(self, batch_size: int, num_slots: int, device: torch.device) -> Session:
        key = batch_size, max(FEWEST_SLOTS, 1 << (num_slots - 1).bit_length())
        session = self.sessions.pop(key, None)
        if session is None:
            while len(self.sessions) >= MOST_SESSIONS:  # before the new one takes its memory
                del self.sessions[next(iter(self.sessions))]
            session = Session(self.weights.model, self.make_decoder, self.sampling, *key, device)
        self.sessions[key] = session
        return session


class Session:
    """Buffers, and on a GPU the captured step, for one batch size and number of slots."""

    def __init__(
        self,
        model: Any,
        make_decoder: MakeDecoder,
        sampling: Sampling,
        batch_size: int,
        num_slots: int,
        device: torch.device,
    ) -> None:
        self.batch_size, self.num_slots = batch_size, num_slots
        self.sampling = sampling
        self.head = LMHead.from_model(model).first_rows(sampling.suppress_from)
        self.eos_token_ids = torch.tensor(sampling.eos_token_ids, dtype=torch.int64, device=device)
        self.decoder = make_decoder(batch_size, num_slots, device)
        self.state = SamplingState.create(
            batch_size, num_slots, seed=0, pad_token_id=sampling.pad_token_id, device=device
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self._done: Tensor | None = None
        self._looked: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._done = torch.zeros((), dtype=torch.bool, pin_memory=True)

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor, seed: int) -> None:
        """The first token of every row."""
        if prompt_ids.is_cuda and self.graph is None:
            self._capture(prompt_ids, prompt_mask)
        self._looked = None
        self.state.reset(seed)
        self._sample(self.decoder.prefill(prompt_ids, prompt_mask))

    def step(self) -> None:
        """One more token of every row that is not done."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    def all_done(self, count: int) -> bool:
        """Whether every row is, after `count` tokens; on a GPU as it was some tokens ago."""
        if self._done is None:
            return bool(self.state.done.all())
        if count % CHECK_EVERY:
            return False
        done = False
        if self._looked is not None:
            self._looked.synchronize()  # the stream has CHECK_EVERY more tokens to go on with
            done = bool(self._done)
        self._done.copy_(self.state.done.all(), non_blocking=True)
        self._looked = torch.cuda.Event()
        self._looked.record()
        return done

    def _step(self) -> None:
        self._sample(self.decoder.step(self.state.next_tokens))

    def _sample(self, hidden: Tensor) -> None:
        sample_tokens(
            self.head.logits(hidden, torch.float32),
            self.state,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            eos_token_ids=self.eos_token_ids,
        )

    def _capture(self, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Record one step. What it writes meanwhile, `start` writes over."""
        self.decoder.prefill(prompt_ids, prompt_mask)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, makes the libraries' workspaces
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph


def local_engine(
    name: str, model: Any, sampling: Sampling, dtype: torch.dtype = torch.float32
) -> Engine:
    """The engine "hf" or "graph", or with "auto" our decoder wherever it can decode `model`.

    Raises UserError for "graph" where it cannot.
    """
    if name == "hf":
        return HFEngine(model, sampling, dtype)
    try:
        engine = GraphEngine(model, sampling, dtype)
        reason = engine.error
    except Exception as error:  # of a copy, or a merge, that this model does not allow
        reason = first_line(error)
    if reason is None:
        return engine
    kind = type(model).__name__
    if name == "graph":
        raise UserError(f"rollout_engine graph cannot decode {kind}: {reason}; use hf, or auto")
    warnings.warn(f"rollout_engine hf, as graph cannot decode {kind}: {reason}", stacklevel=2)
    return HFEngine(model, sampling, dtype)
