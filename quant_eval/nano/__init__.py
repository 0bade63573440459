"""nano-qwq, the bundled reference model: corpus, training recipe and, in checkpoint/, weights."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
