"""llama.cpp's tokenizer on a GGUF file, through its C functions."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Tokenize = Callable[[bytes], list[int]]


@contextmanager
def tokenizer_of(path: Path) -> Iterator[Tokenize]:
    """Load a file's vocabulary alone; special tokens inside a text are taken for what they are."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def silent(_level: int, _text: bytes, _data: object) -> None:
        """The package's own callback fails on a log line that is cut inside a character."""

    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(silent, None)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model is not None
    vocab = llama_cpp.llama_model_get_vocab(model)
    assert vocab is not None

    def tokenize(text: bytes) -> list[int]:
        capacity = len(text) + 1
        ids = (llama_cpp.llama_token * capacity)()
        n = llama_cpp.llama_tokenize(vocab, text, len(text), ids, capacity, False, True)
        assert n >= 0
        return list(ids[:n])

    try:
        yield tokenize
    finally:
        llama_cpp.llama_model_free(model)
        llama_cpp.llama_log_set(before, data)
