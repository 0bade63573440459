"""Make converter_metadata.json anew: python -m tests.golden.make LLAMA_CPP_FOLDER

LLAMA_CPP_FOLDER: llama.cpp's source, as in llama-cpp-python's source package under vendor/.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.converter_cases import CASES, GOLDEN, metadata_of, write_case

CONVERT = """
import runpy, sys
folder, checkpoint, out = sys.argv[1:]
sys.path.insert(0, folder)
sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outtype", "bf16", "--outfile", out]
from conversion import base
def no_sentencepiece(self):
    raise FileNotFoundError("tokenizer.model")
base.TextModel._set_vocab_sentencepiece = no_sentencepiece
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""
"""The converter as it is, but for two questions that it answers by downloads and tables: there is
no sentencepiece model, and the pre-tokenizer is Qwen2's.
"""


def main() -> None:
    golden = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            out = root / "out.gguf"
            checkpoint = write_case(name, root)
            command = [sys.executable, "-c", CONVERT, sys.argv[1], str(checkpoint), str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: the converter failed\n{done.stderr}")
            golden[name] = metadata_of(out)
            sys.stderr.write(f"{name}: {len(golden[name])} keys\n")
    text = json.dumps(golden, indent=1, ensure_ascii=False, sort_keys=True)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
