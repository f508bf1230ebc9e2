"""The loop of Early Stopping Rollout (paper, section 3): generate at most N tokens, score, step.

    y ~ student(.|x)
    loss = sum over t <= min(N, |y|) of KL(student(.|x, y_<t) || teacher(.|x, y_<t))

divided by the response tokens of the step: with two tokenizers, those that are compared.
`rollout_tokens=0` is the same loop with no cutoff.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from esr_kernels import RolloutBatch, rollout_batch
from esr_train.align import Vocabulary, load_vocabulary
from esr_train.bridge import Coverage, coverage_error, make_bridge
from esr_train.checkpoint import (
    check_new_run_folder,
    held_run_folder,
    latest_checkpoint,
    load_state,
    new_run_folder,
    save_checkpoint,
    write_json,
)
from esr_train.config import TrainConfig
from esr_train.data import Prompts, load_prompts, mix_seed, pad_left, prompt_order
from esr_train.errors import UserError
from esr_train.eval.measure import Evaluation
from esr_train.metrics import TRACE_FILE, MetricsLog, PhaseMeter, step_profiler
from esr_train.models import Pair, load_pair, pick_device, transformer
from esr_train.report import (
    RESULTS_FILE,
    StepBar,
    announce,
    evaluate_with_bar,
    final_results,
    first_results,
    plot_curves,
    read_before,
    say,
)
from esr_train.rollout import Engine, Sampling, local_engine


def train(
    config: TrainConfig, resume: Path | None = None, before: Evaluation | None = None
) -> dict[str, Any]:
    """Distil, and return what `results.json` holds.

    resume: an interrupted run's folder, of which `config` is the configuration. before: the
    evaluation of the same student on the same prompts, where a caller has it already.
    """
    run = resume or Path(config.output_dir or default_run_folder(config))
    with ExitStack() as held:
        # What can be refused is, before weights are loaded and before anything is written.
        if resume:
            held.enter_context(held_run_folder(run))
        else:
            check_new_run_folder(run)
        vocabulary = load_vocabulary(config)
        sides = [side for side in (vocabulary, vocabulary.teacher) if side]
        limits = [max_prompt_tokens(config, side) for side in sides]
        prompts = load_prompts(config, vocabulary, *limits)
        device = pick_device()
        bridge = make_bridge(config, vocabulary, prompts, device)

        checkpoint = latest_checkpoint(run) if resume else None
        torch.manual_seed(config.seed)
        pair = load_pair(config, vocabulary, device, checkpoint, bridge)
        optimizer, scheduler = make_optimizer(config, pair)
        first_step = load_state(checkpoint, optimizer, scheduler) if checkpoint else 0
        if resume:
            before = read_before(run, first_step, config)
        else:
            held.enter_context(new_run_folder(run, config))
        announce(run, config, pair, prompts, first_step)
        try:
            return _train(run, config, pair, prompts, optimizer, scheduler, first_step, before)
        except KeyboardInterrupt:
            say(f"\ninterrupted: --resume {run} goes on from the last checkpoint")
            raise


def _train(
    run: Path,
    config: TrainConfig,
    pair: Pair,
    prompts: Prompts,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    first_step: int,
    before: Evaluation | None,
) -> dict[str, Any]:
    """Evaluate, train and evaluate, into a run folder that is ours."""
    engine = make_engine(config, pair, run)
    log = MetricsLog(run / "metrics.jsonl", keep_steps=first_step)
    if before is None:
        before = evaluate_with_bar("before", pair, engine, prompts, config)
    write_json(run / RESULTS_FILE, first_results(config, before, pair.device))

    meter = PhaseMeter(pair.device)
    trace = run / TRACE_FILE if config.profile else None
    num_steps = config.max_steps - first_step
    with StepBar(config, first_step) as bar, step_profiler(trace, num_steps) as profile:
        for step in range(first_step, config.max_steps):
            record = train_step(step, config, pair, engine, prompts, optimizer, scheduler, meter)
            if profile:
                profile.step()
            log.append(record)
            bar.advance(record)
            last = step + 1 == config.max_steps
            too_low = None if last else coverage_error(log.records)
            if (step + 1) % config.save_steps == 0 or last or too_low:
                tokenizer = pair.vocabulary.tokenizer
                save_checkpoint(run, step + 1, pair.student, tokenizer, optimizer, scheduler)
            if too_low:
                raise UserError(too_low)
    after = evaluate_with_bar("after", pair, engine, prompts, config)

    results = final_results(config, log.records, before, after, meter)
    write_json(run / RESULTS_FILE, results)
    plot_curves(run / "curves.png", results, log.records)
    return results


def train_step(
    step: int,
    config: TrainConfig,
    pair: Pair,
    engine: Engine,
    prompts: Prompts,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    phase: PhaseMeter,
) -> dict[str, Any]:
    """One optimizer step on `gradient_accumulation_steps` rollout batches; its metrics line."""
    start = time.perf_counter()
    # Every step seeds itself, so a resumed run draws what the uninterrupted one would have drawn.
    torch.manual_seed(mix_seed(config.seed, step))

    with phase("student_generation"):
        engine.update_weights()
        rollouts = [
            generate(pair, engine, batch, config.max_new_tokens)
            for batch in step_batches(step, config, prompts)
        ]
    with phase("teacher_scoring"):
        read = [pair.read(rollout, config.loss_estimator) for rollout in rollouts]
    # The mean is over the compared tokens of the whole step, not of a batch.
    num_compared = sum(rollout.num_compared for rollout in read)
    normalizer = torch.full((), num_compared, device=pair.device)
    coverage = Coverage()

    loss = torch.zeros((), device=pair.device)
    for rollout in read:
        if rollout.num_compared == 0:
            say(f"step {step + 1}: no token of a batch is aligned, so it adds nothing")
            coverage.add(rollout, None)
            continue
        with phase("teacher_scoring"):
            teacher_states = pair.score(rollout)
        with phase("student_training"):
            if config.loss_estimator == "sampled":
                estimates = pair.sampled_reverse_kl(rollout, teacher_states)
                batch_loss, stats = estimates.sum() / normalizer, None
            else:
                batch_loss, stats = pair.reverse_kl(rollout, teacher_states, normalizer=normalizer)
            batch_loss.backward()
            loss += batch_loss.detach()
            coverage.add(rollout, stats)
    with phase("student_training"):
        max_norm = config.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(pair.student.parameters(), max_norm)
        if not math.isfinite(loss.item() + grad_norm.item()):
            raise UserError(
                f"step {step + 1}: loss {loss.item()}, gradient norm {grad_norm.item()}; the run "
                "stops before they reach the weights. Lower learning_rate, or set bf16 to false"
            )
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = time.perf_counter() - start
    num_tokens = sum(len(rollout.targets) for rollout in rollouts)
    num_responses = sum(len(rollout.response_lengths) for rollout in rollouts)
    record = {
        "step": step + 1,
        "loss": loss.item(),
        "kl_per_response": loss.item() * num_compared / num_responses,
        "grad_norm": grad_norm.item(),
        "learning_rate": learning_rate,
        "response_tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "seconds": seconds,
        "phases": phase.take(),
    }
    return record if pair.bridge is None else record | {"coverage": coverage.shares()}


def step_batches(step: int, config: TrainConfig, prompts: Prompts) -> list[list[list[int]]]:
    """The prompts of one step, a list for each rollout batch."""
    size, batches = config.per_device_train_batch_size, config.gradient_accumulation_steps
    count = size * batches
    order = prompt_order(len(prompts.train), step * count, count, config.seed)
    return [
        [prompts.train[index] for index in order[first : first + size]]
        for first in range(0, count, size)
    ]


def generate(
    pair: Pair, engine: Engine, prompts: list[list[int]], max_new_tokens: int
) -> RolloutBatch:
    """Sample one response a prompt, stopped at EOS or after `max_new_tokens`."""
    prompt_ids, prompt_mask = pad_left(prompts, pair.vocabulary.pad_token_id, pair.device)
    responses = engine.generate(prompt_ids, prompt_mask, max_new_tokens=max_new_tokens)
    eos_token_ids = pair.vocabulary.eos_token_ids
    return rollout_batch(prompt_ids, prompt_mask, responses, eos_token_ids=eos_token_ids)


def make_engine(config: TrainConfig, pair: Pair, run: Path) -> Engine:
    """What writes the run's rollouts. Raises UserError where it cannot."""
    words = sampling(config, pair.vocabulary)
    if not config.use_vllm:
        return local_engine(config.rollout_engine, transformer(pair.student), words, pair.dtype)
    from esr_train.vllm_engine import VLLMEngine

    return VLLMEngine(
        pair.student,
        words,
        str(config.model_name_or_path),
        mode=config.vllm_mode,
        dtype=pair.dtype,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        max_model_len=config.vllm_max_model_length,
        trust_remote_code=config.trust_remote_code,
        server_base_url=config.vllm_server_base_url,
        server_timeout=config.vllm_server_timeout,
        adapter_dir=run,
    )


def sampling(config: TrainConfig, vocabulary: Vocabulary) -> Sampling:
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        eos_token_ids=vocabulary.eos_token_ids,
        pad_token_id=vocabulary.pad_token_id,
        suppress_from=vocabulary.size,
    )


def make_optimizer(config: TrainConfig, pair: Pair) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW on what trains, and its learning-rate schedule."""
    trained = [parameter for parameter in pair.student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.warmup_steps, config.max_steps
    )
    return optimizer, scheduler


def max_prompt_tokens(config: TrainConfig, vocabulary: Vocabulary) -> int:
    """Tokens that a prompt may have so that prompt and response fit the vocabulary's context."""
    if vocabulary.context_length is None:
        return sys.maxsize
    evaluates = config.num_eval_prompts > 0
    longest = config.max_completion_length if evaluates else config.max_new_tokens
    if longest >= vocabulary.context_length:
        # The evaluation writes whole responses, whatever the cutoff.
        cutoff = not evaluates and config.rollout_tokens > 0
        name = "rollout_tokens" if cutoff else "max_completion_length"
        raise UserError(
            f"{name} is {longest}, but student or teacher has a context of "
            f"{vocabulary.context_length} tokens: lower {name}"
        )
    return vocabulary.context_length - longest


def default_run_folder(config: TrainConfig) -> str:
    """A name that says what and when."""
    name = config.demo or Path(str(config.model_name_or_path)).name
    kind = f"esr{config.rollout_tokens}" if config.rollout_tokens else "full"
    return f"runs/{name}-{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
