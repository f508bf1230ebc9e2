"""Make the demo's tokenizers, teachers and student from nothing: `python -m esr_train.demo.build`.

1. A tokenizer is trained on the task's text: `words`, which the shipped student and its teacher
   share, or with `--tokenizer pieces` another one.
2. A model learns from both writers; the careful one is rarer the longer the chain. That is the
   student: it carries out its plans well and plans badly.
3. The same weights go on with the careful writer alone. That is the teacher.

The shipped teacher-pieces is the teacher of `--tokenizer pieces`: it is there to distil the shipped
student across tokenizers.

Training sees the train split only, the scores printed at the end are of the validation split. The
same seed on the same machine, with the same number of threads, gives the same weights.
"""

import argparse
import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from esr_train.demo import DEMO_DIR
from esr_train.demo.task import (
    Problem,
    grade,
    make_problems,
    plan_result,
    write_careful,
    write_hasty,
)
from esr_train.demo.tokenizer import MAX_POSITIONS, TOKENIZERS

NUM_PROBLEMS = 20_000
BATCH_SIZE = 16
MIXED_STEPS, CAREFUL_STEPS = 1600, 400
# How often the careful writer answers in the mixed text, by the number of people.
CAREFUL_SHARE = {4: 0.6, 5: 0.4, 6: 0.2, 7: 0.1}
MUON_LR, ADAMW_LR = 0.02, 4e-3
# The teacher's training starts from a trained model, so at a smaller learning rate.
CAREFUL_LR_FACTOR = 0.5
SAVED_DTYPE = torch.bfloat16
LONGEST_RESPONSE = 340  # tokens; the careful writer needs up to 323 words with the end, 300 pieces
IGNORED = -100  # the label cross_entropy leaves out

Writer = Callable[[Problem, random.Random], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="words")
    parser.add_argument("--output", type=Path, help="default for words: the package's folder")
    parser.add_argument("--steps", type=int, help="at most this many steps a phase (for a trial)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace existing models")
    args = parser.parse_args()
    if args.output is None and args.tokenizer != "words":
        parser.error(f"--tokenizer {args.tokenizer} needs an --output")
    output = args.output or DEMO_DIR / "models"
    began = time.perf_counter()
    try:
        build(
            output,
            tokenizer_kind=args.tokenizer,
            max_steps=args.steps,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(f"built {output} in {time.perf_counter() - began:.0f} s")
    for role in ("student", "teacher"):
        report(output / role, make_problems("validation", 200))


def build(
    output: Path,
    *,
    tokenizer_kind: str = "words",
    max_steps: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write `output`/student and `output`/teacher: complete, or not at all."""
    taken = [path for role in ("student", "teacher") if (path := output / role).exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{taken[0]} exists; --overwrite replaces it")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    mixed_steps, careful_steps = (
        steps if max_steps is None else min(steps, max_steps)
        for steps in (MIXED_STEPS, CAREFUL_STEPS)
    )
    torch.manual_seed(seed)
    rng = random.Random(seed)
    problems = make_problems("train", NUM_PROBLEMS, seed=seed)
    tokenizer = TOKENIZERS[tokenizer_kind](
        [problem.prompt for problem in problems[:2000]]
        + [write_careful(problem) for problem in problems[:2000]]
        + [write_hasty(problem, rng) for problem in problems[:2000]]
    )
    model = new_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    # Beside the destination, so that moving into place is a rename.
    with tempfile.TemporaryDirectory(dir=output, prefix=".building-") as folder:
        unfinished = Path(folder)
        data = batches(tokenizer, problems, write_mixed, rng)
        train(model, data, mixed_steps, lr_factor=1.0, name="student")
        save(model, tokenizer, unfinished / "student")
        data = batches(tokenizer, problems, lambda problem, _: write_careful(problem), rng)
        train(model, data, careful_steps, lr_factor=CAREFUL_LR_FACTOR, name="teacher")
        save(model, tokenizer, unfinished / "teacher")
        for path in taken:
            path.rename(unfinished / f"old-{path.name}")
        for role in ("student", "teacher"):
            (unfinished / role).rename(output / role)


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3-style model of about 0.5 M parameters with random float32 weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def write_mixed(problem: Problem, rng: random.Random) -> str:
    """What one of the two writers answers."""
    careful = rng.random() < CAREFUL_SHARE[problem.num_people]
    return write_careful(problem) if careful else write_hasty(problem, rng)


def batches(
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    write: Writer,
    rng: random.Random,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input_ids, labels), both [BATCH_SIZE, T] int64 and right-padded.

    The labels leave out the prompts. A batch holds chains of neighbouring lengths to waste few
    positions on padding.
    """
    pool_size = 8 * BATCH_SIZE
    while True:
        pool = sorted(rng.sample(problems, pool_size), key=lambda problem: problem.num_people)
        starts = list(range(0, pool_size, BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            chunk = pool[start : start + BATCH_SIZE]
            prompts = tokenizer([problem.prompt for problem in chunk]).input_ids
            responses = tokenizer([write(problem, rng) for problem in chunk]).input_ids
            rows = [
                [*p, *r, tokenizer.eos_token_id] for p, r in zip(prompts, responses, strict=True)
            ]
            length = max(map(len, rows))
            input_ids = torch.full((BATCH_SIZE, length), tokenizer.pad_token_id)
            labels = torch.full((BATCH_SIZE, length), IGNORED)
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
                input_ids[i, : len(row)] = torch.tensor(row)
                labels[i, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
            yield input_ids, labels


def train(
    model: Qwen3ForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    num_steps: int,
    *,
    lr_factor: float,
    name: str,
) -> None:
    """Train in place: Muon on the hidden matrices, AdamW on embedding and norms.

    Both learning rates are scaled by `lr_factor`, rise for 5 % of the steps and then fall to 0.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_LR * lr_factor, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAMW_LR * lr_factor, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warmup = max(1, num_steps // 20)

    def scale(step: int) -> float:
        return min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup + 1))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, scale) for o in optimizers]
    model.train()
    began = time.perf_counter()
    for step in range(1, num_steps + 1):
        input_ids, labels = next(data)
        # Right padding: under the causal mask no real token sees a pad, so no mask is needed.
        hidden = model.model(input_ids, use_cache=False).last_hidden_state[:, :-1]
        kept = labels[:, 1:] != IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), labels[:, 1:][kept])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        if step % 50 == 0 or step == num_steps:
            seconds = time.perf_counter() - began
            print(
                f"{name} step {step}/{num_steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True
            )
    model.eval()


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a half-precision copy in Hugging Face format; the model itself stays float32."""
    half: Any = copy.deepcopy(model)
    half.to(SAVED_DTYPE).save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)  # written for its owner alone
    tokenizer.save_pretrained(path)


def report(path: Path, problems: list[Problem]) -> None:
    """Print how well a saved model does, greedily and sampled at temperature 0.7."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for temperature in (0.0, 0.7):
        responses = respond(model, tokenizer, problems, temperature=temperature)
        right, executed = score(responses, problems)
        num_tokens = sum(map(len, tokenizer(responses).input_ids)) / len(responses)
        print(
            f"{path.name} temperature {temperature}: accuracy {right:.3f}, "
            f"executes its plan {executed:.3f}, {num_tokens:.0f} tokens a response"
        )


@torch.inference_mode()
def respond(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    temperature: float,
) -> list[str]:
    """One response of a causal LM per problem; temperature 0 is greedy."""
    prompts = [problem.prompt for problem in problems]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=LONGEST_RESPONSE,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    return tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def score(responses: list[str], problems: list[Problem]) -> tuple[float, float]:
    """Share of responses that are right, and share that carry out their own plan to the end."""
    right = sum(grade(r, problem.answer) for r, problem in zip(responses, problems, strict=True))
    plans = [plan_result(r) for r in responses]
    executed = sum(
        plan is not None and grade(r, plan) for r, plan in zip(responses, plans, strict=True)
    )
    return right / len(responses), executed / len(responses)


if __name__ == "__main__":
    main()
