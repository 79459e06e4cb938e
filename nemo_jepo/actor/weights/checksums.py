"""Where the SHA-256 of a Hugging Face folder's files is known, and whether they have it.

    nemo_jepo.sha256.json       {file: checksum} of every file beside it; `nemo-jepo export` writes it
    models--owner--name/blobs/  the hub's cache names large files by their checksum, and folders link to them

Any other folder's weights are read as they are: safetensors has no checksum of its own.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_jepo.actor.parallel import on_every_rank
from nemo_jepo.actor.weights.hf_folder import KEY
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.reading import COPY_AGAIN, read_json, reason
from nemo_jepo.utils.files import OTHER_BYTES, hashing_threads, sha256_of

CHECKSUMS = "nemo_jepo.sha256.json"


def known_checksums(folder: Path) -> dict[str, str]:
    """File -> SHA-256 in hexadecimal, of those files of a folder whose checksum is known.

    Raises:
        ConfigError: the folder's list of checksums is none.
    """
    linked = {path.name: path.resolve().name for path in folder.glob("*.safetensors") if path.is_symlink()}
    known = {name: blob for name, blob in linked.items() if re.fullmatch(r"[0-9a-f]{64}", blob)}
    file = folder / CHECKSUMS
    if not file.exists():
        return known
    listed = read_json(KEY, file)
    if not all(map(_is_checksum, listed.items())):
        raise ConfigError(KEY, str(file), "cannot be read (no list of files with their checksums)", COPY_AGAIN)
    return known | listed


@contextmanager
def compared(folder: Path, verify: str, rank: int, size: int) -> Iterator[None]:
    """Read a folder in the block, while threads compute the checksums that are known; all ranks of the world.

    Args:
        verify: checkpoint.verify_on_load; none computes nothing. Otherwise every file is compared by one of the ranks.
        rank, size: of the world.
    Raises:
        ConfigError: on every rank, where a file has other bytes than when it was written; names it.
    """
    known = known_checksums(folder) if verify != "none" else {}
    mine = sorted(known)[rank::size]
    with hashing_threads() as threads:
        found = {name: threads.submit(sha256_of, folder / name) for name in mine}

        def compare() -> None:
            for name, checksum in found.items():
                try:
                    same = checksum.result() == known[name]
                except OSError as error:
                    raise _fault(folder / name, f"cannot be read ({reason(error)})") from error
                if not same:
                    raise _fault(folder / name, OTHER_BYTES)

        yield
        on_every_rank(compare)


def _is_checksum(entry: tuple[str, object]) -> bool:
    name, checksum = entry
    return Path(name).name == name and isinstance(checksum, str) and bool(re.fullmatch(r"[0-9a-f]{64}", checksum))


def _fault(file: Path, rule: str) -> ConfigError:
    fix = f"Copy the file again; if you changed it yourself, take it out of {CHECKSUMS}"
    return ConfigError(KEY, str(file), rule, fix)
