"""The embedded default: tiny language models, the task they differ on, and how they were made.

A student and its teacher share one tokenizer; a second teacher, as good as the first, has another.

The files under `models/` are what `python -m esr_train.demo.build` writes; nothing is downloaded.
"""

from pathlib import Path

DEMO_DIR = Path(__file__).parent


def student_path() -> Path:
    """Folder of the shipped student: loads with AutoModelForCausalLM and AutoTokenizer."""
    return DEMO_DIR / "models" / "student"


def teacher_path() -> Path:
    """Folder of the shipped teacher: same architecture and tokenizer as the student."""
    return DEMO_DIR / "models" / "teacher"


def pieces_teacher_path() -> Path:
    """Folder of a shipped teacher with another tokenizer than the student's."""
    return DEMO_DIR / "models" / "teacher-pieces"
