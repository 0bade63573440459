"""Make converter_metadata.json and gptq_weights.json anew: python -m tests.golden.make FOLDER

FOLDER: llama.cpp's source, as in llama-cpp-python's source package under vendor/.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from convert.encode import QuantType
from convert.gguf_header import read_header
from tests import converter_cases, gptq_cases

CONVERT = """
import runpy, sys
folder, checkpoint, out_type, out = sys.argv[1:]
sys.path.insert(0, folder)
sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outtype", out_type, "--outfile", out]
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


def converted(name: str, checkpoint: Path, out_type: str) -> Path:
    """What the converter makes of a case; the program ends where it fails."""
    out = checkpoint.parent / "out.gguf"
    command = [sys.executable, "-c", CONVERT, sys.argv[1], str(checkpoint), out_type, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: the converter failed\n{done.stderr}")
    sys.stderr.write(f"{name}: converted\n")
    return out


def digests(path: Path) -> dict[str, str]:
    """Of the linears of a GGUF file in float32, under the checkpoint's names."""
    header, found = read_header(path), {}
    with path.open("rb") as file:
        for spec in gptq_cases.LINEARS:
            tensor = header.tensors[spec.gguf_name]
            assert (tensor.quant_type, tensor.shape) == (QuantType.F32, spec.shape)
            file.seek(tensor.offset)
            found[spec.name] = hashlib.sha256(file.read(tensor.nbytes)).hexdigest()
    return found


def main() -> None:
    metadata, weights = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in converter_cases.CASES:
            checkpoint = converter_cases.write_case(name, Path(temporary) / name)
            metadata[name] = converter_cases.metadata_of(converted(name, checkpoint, "bf16"))
        for name in gptq_cases.CASES:
            checkpoint = gptq_cases.write_case(name, Path(temporary) / name / "random")
            weights[name] = digests(converted(name, checkpoint, "f32"))
    for path, golden in ((converter_cases.GOLDEN, metadata), (gptq_cases.GOLDEN, weights)):
        text = json.dumps(golden, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
