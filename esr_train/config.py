"""Every option of a training run, in one dataclass that checks itself.

Options come in layers, later ones over earlier ones: the defaults below (the paper's settings), the
embedded demo's file when no model is named, `--config FILE.yaml`, the command line. A YAML file is
turned into command-line words, so both are typed and checked by the same parser.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from esr_train.demo import DEMO_DIR, pieces_teacher_path, student_path, teacher_path
from esr_train.errors import UserError

Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


def option(default: Any, help: str, **argparse_words: Any) -> Any:
    """A dataclass field whose metadata is what argparse shows and accepts."""
    return field(default=default, metadata={"help": help, **argparse_words})


@dataclass(frozen=True)
class TrainConfig:
    """Options of `python -m esr_train`; defaults are the paper's (batch 16, LoRA r 32, N 100)."""

    model_name_or_path: str | None = option(None, "Student: Hub id or local folder.")
    teacher_model_name_or_path: str | None = option(None, "Teacher: Hub id or local folder.")
    dataset_name: str | None = option(
        None, "Prompts: a .jsonl or .parquet file, or a data set on the Hub."
    )
    dataset_config: str | None = option(None, "Configuration of a Hub data set.")
    dataset_train_split: str = option("train", "Split of a Hub data set.")
    prompt_column: str = option("prompt", "Column with the prompt: a string or a list of messages.")
    apply_chat_template: bool | None = option(
        None,
        "Wrap string prompts as one user message. Default: where the student has a template.",
        nargs="?",
        const=True,
    )
    long_prompts: Literal["drop", "truncate"] = option(
        "drop", "Prompts that leave no room for the response: drop them, or cut them on the left."
    )
    demo: str | None = option(
        None,
        "Embedded demo: 'default', or 'cross-tokenizer'. The default is chosen when no model is "
        "named.",
    )

    rollout_tokens: int = option(
        100,
        "The paper's N: response tokens a rollout. 0: full rollout, up to max_completion_length.",
    )
    max_completion_length: int = option(
        2048, "Longest response of a full rollout and of the evaluation, in tokens."
    )
    temperature: float = option(0.7, "Sampling temperature; 0 is greedy. The loss is at 1.")
    top_p: float = option(1.0, "Nucleus sampling; 1 turns it off.")
    top_k: int = option(0, "Top-k sampling; 0 turns it off.")

    rollout_engine: Literal["auto", "graph", "hf"] = option(
        "auto",
        "What generates: our decoder (graph) or Transformers' generate (hf). auto: graph wherever "
        "it can decode the model.",
    )
    use_vllm: bool = option(False, "Generate with vLLM (pip install 'esr-kernels[vllm]').")
    vllm_mode: Literal["colocate", "server"] = option(
        "colocate", "vLLM in this process, or a server started with vllm serve (LoRA only)."
    )
    vllm_server_base_url: str | None = option(
        None, "Address of the vLLM server, such as http://localhost:8000."
    )
    vllm_server_timeout: float = option(240.0, "Seconds a request to the vLLM server may take.")
    vllm_gpu_memory_utilization: float = option(
        0.3, "Share of the GPU's memory that a colocated vLLM takes."
    )
    vllm_max_model_length: int | None = option(
        None, "Prompt and response tokens of a colocated vLLM. Default: the model's context."
    )
    eos_token_ids: list[int] | None = option(
        None, "Tokens that end a response. Default: the student's generation config's.", nargs="+"
    )

    teacher_eos_token_ids: list[int] | None = option(
        None,
        "Those of a teacher with another tokenizer. Default: its generation config's.",
        nargs="+",
    )
    alignment: Literal["start", "span"] = option(
        "start",
        "Two tokenizers: compare where the tokens of both begin at one byte (start), or begin and "
        "end there (span).",
    )
    vocab_projection: Literal["merge", "project", "exact"] = option(
        "merge",
        "Two tokenizers: tokens whose texts begin alike count for one (merge), a teacher's token "
        "counts for the first student token of its text (project), or for the same text (exact).",
    )
    loss_estimator: Literal["full", "sampled"] = option(
        "full",
        "Reverse KL over the vocabulary (full), or estimated from the sampled tokens alone, as a "
        "policy gradient (sampled).",
    )

    max_steps: int = option(200, "Optimizer steps.")
    per_device_train_batch_size: int = option(16, "Prompts a rollout batch.")
    gradient_accumulation_steps: int = option(1, "Rollout batches an optimizer step.")
    learning_rate: float = option(5e-5, "Peak learning rate of AdamW.")
    lr_scheduler_type: Schedule = option("constant", "Schedule of the learning rate.")
    warmup_steps: int = option(0, "Steps of linear warm-up, where the schedule has one.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = option(1.0, "Gradient-norm clip; 0 turns it off.")
    seed: int = option(42, "Seed of the prompt order, the rollouts and the LoRA initialisation.")

    use_peft: bool = option(True, "Train LoRA adapters; false: full fine-tuning.")
    lora_r: int = option(32, "LoRA rank.")
    lora_alpha: int = option(64, "LoRA alpha.")
    lora_dropout: float = option(0.0, "LoRA dropout.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules that get an adapter; 'all-linear': all but the LM head."},
    )

    bf16: bool | None = option(
        None, "bfloat16 compute. Default: on a GPU that has it.", nargs="?", const=True
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in backward.")
    attn_implementation: str | None = option(None, "eager, sdpa, flash_attention_2, ...")
    trust_remote_code: bool = option(False, "Run modelling code that comes with a checkpoint.")

    num_eval_prompts: int = option(
        16, "Prompts held out to measure KL (and score) before and after; 0: no evaluation."
    )
    num_eval_samples: int = option(1, "Sampled responses an evaluation prompt (avg@k).")
    per_device_eval_batch_size: int = option(16, "Responses an evaluation batch.")

    output_dir: str | None = option(
        None, "Run folder; must be new. Default: runs/<student>-<date>-<time>."
    )
    save_steps: int = option(50, "Steps between checkpoints; the last step is always saved.")
    logging_steps: int = option(1, "Steps between progress updates.")
    profile: bool = option(False, "Write a torch.profiler trace of three steps to the run folder.")

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _require(0 < getattr(self, name) < math.inf, name, "above 0", getattr(self, name))
        for name in _NOT_NEGATIVE:
            _require(0 <= getattr(self, name) < math.inf, name, "0 or more", getattr(self, name))
        _require(self.learning_rate <= 1, "learning_rate", "at most 1", self.learning_rate)
        warm = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6
        _require(warm, "temperature", "0 or in [1e-6, 1e6]", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)", self.lora_dropout)
        share = self.vllm_gpu_memory_utilization
        _require(0 < share <= 1, "vllm_gpu_memory_utilization", "in (0, 1]", share)
        if self.loss_estimator == "sampled" and self.temperature == 0:
            raise UserError(
                "loss_estimator sampled needs rollouts that are sampled: temperature 1, not 0"
            )
        if self.use_vllm:
            self._check_vllm()
        if self.rollout_tokens > self.max_completion_length:
            raise UserError(
                f"rollout_tokens is {self.rollout_tokens}, more than max_completion_length = "
                f"{self.max_completion_length}: lower the one or raise the other"
            )
        for name in PATHS:
            if getattr(self, name) is None and not (name == "dataset_name" and self.demo):
                raise UserError(
                    f"{name} is missing: student, teacher and data set are named together "
                    "(or none of them, for the embedded demo)"
                )

    def _check_vllm(self) -> None:
        if self.rollout_engine != "auto":
            raise UserError(
                f"use_vllm and rollout_engine {self.rollout_engine} are two engines: leave one out"
            )
        if self.vllm_mode == "server" and not self.vllm_server_base_url:
            raise UserError("vllm_mode server needs vllm_server_base_url, the server's address")
        if self.vllm_mode == "server" and not self.use_peft:
            raise UserError(
                "vllm_mode server takes LoRA adapters only: use vllm_mode colocate, or use_peft"
            )

    @property
    def max_new_tokens(self) -> int:
        """Response tokens at which a training rollout stops."""
        return self.rollout_tokens or self.max_completion_length

    def to_yaml(self) -> str:
        """For `--config`, from any folder: less output_dir, and with the paths made absolute."""
        options = dataclasses.asdict(self)
        del options["output_dir"]
        for name in PATHS:
            if options[name] and Path(options[name]).exists():
                options[name] = str(Path(options[name]).resolve())
        return yaml.safe_dump(options, sort_keys=False)


PATHS = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name")
_POSITIVE = (
    "max_completion_length",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lora_r",
    "lora_alpha",
    "num_eval_samples",
    "per_device_eval_batch_size",
    "vllm_server_timeout",
    "save_steps",
    "logging_steps",
)
_NOT_NEGATIVE = (
    "rollout_tokens",
    "temperature",
    "top_k",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "num_eval_prompts",
    "seed",
)


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UserError(f"{name} must be {expected}, got {got}")


class Parser(HfArgumentParser):
    """HfArgumentParser that raises UserError, and takes only whole option names."""

    def __init__(self) -> None:
        super().__init__(
            TrainConfig,  # type: ignore[arg-type]
            prog="python -m esr_train",
            description="Distil a student from a teacher with Early Stopping Rollout. "
            "With no arguments: the embedded demo.",
            allow_abbrev=False,
        )
        self.add_argument("--config", metavar="FILE", help="YAML file of options.")
        self.add_argument("--resume", metavar="RUN", help="Go on with an interrupted run folder.")
        self.add_argument("--debug", action="store_true", help="Show tracebacks.")

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def config(self, words: list[str]) -> TrainConfig:
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            raise UserError(_unknown_option(unknown[0].split("=")[0]))
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        return TrainConfig(**{name: getattr(namespace, name) for name in names})


def parse(argv: list[str]) -> tuple[TrainConfig, Path | None]:
    """(options, run folder to resume): the demo's file, then `--config`, then the command line.

    Raises UserError on an unknown option (with the nearest name), a bad value or a bad file.
    """
    parser = Parser()
    given, _ = parser.parse_known_args(argv)
    if given.resume:
        if given.config:
            raise UserError("--resume takes its options from the run's folder: leave --config out")
        return _resumed_config(parser, argv, Path(given.resume)), Path(given.resume)

    words = (yaml_words(Path(given.config)) if given.config else []) + argv
    layered, _ = parser.parse_known_args(words)
    if layered.demo or not any(getattr(layered, name) for name in PATHS):
        words = demo_words(layered.demo or "default") + words
    return parser.config(words), None


# What a resumed run may change: nothing that alters the numbers of the steps. The other schedules
# of the learning rate end at max_steps, so a longer run would have had other rates from the start.
RESUMABLE = ("max_steps", "save_steps", "logging_steps", "profile")
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")


def _resumed_config(parser: Parser, argv: list[str], run: Path) -> TrainConfig:
    saved = run / "config.yaml"
    if not saved.is_file():
        raise UserError(f"--resume {run}: no config.yaml there; name the folder of an earlier run")
    before = parser.config(yaml_words(saved))
    after = parser.config(yaml_words(saved) + argv)
    for item in dataclasses.fields(TrainConfig):
        if item.name not in RESUMABLE and getattr(before, item.name) != getattr(after, item.name):
            raise UserError(
                f"--resume keeps the run's options; only {', '.join(RESUMABLE)} may change, "
                f"not {item.name}: leave it out, or start a new run with --config {saved}"
            )
    if after.max_steps != before.max_steps and after.lr_scheduler_type not in ENDLESS_SCHEDULES:
        raise UserError(
            f"the learning rate's schedule, {after.lr_scheduler_type}, was made for max_steps "
            f"{before.max_steps}: only a run with a constant one can go on further"
        )
    return after


def yaml_words(path: Path) -> list[str]:
    """The options of a YAML file as command-line words; a null leaves the default."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"config file {path} is not YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(options, dict):
        raise UserError(f"config file {path} must hold 'option: value' lines")
    words = []
    for name, value in options.items():
        if name not in {item.name for item in dataclasses.fields(TrainConfig)}:
            raise UserError(f"config file {path}: {_unknown_option(str(name))}")
        if isinstance(value, dict):
            raise UserError(f"config file {path}: {name} must be one value or a list of them")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            # "--name=value" keeps values such as -1 from reading as options.
            words += (
                [f"--{name}", *map(str, values)] if len(values) != 1 else [f"--{name}={values[0]}"]
            )
    return words


def demo_words(name: str) -> list[str]:
    """The options of an embedded demo, with the shipped models' folders."""
    path = DEMO_DIR / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in DEMO_DIR.glob("*.yaml")))
        raise UserError(f"demo must be one of: {known}; got {name}")
    teacher = pieces_teacher_path() if name == "cross-tokenizer" else teacher_path()
    return [
        f"--demo={name}",
        f"--model_name_or_path={student_path()}",
        f"--teacher_model_name_or_path={teacher}",
        *yaml_words(path),
    ]


def _unknown_option(name: str) -> str:
    known = [item.name for item in dataclasses.fields(TrainConfig)] + ["config", "resume", "debug"]
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1, cutoff=0.5)
    return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "; see --help")
