"""Checks wheel and sdist in dist/: what they hold, and that the wheel runs where the sources are not at hand."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lightning_polydis"

TINY_RUN = """
import importlib
import pkgutil
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import lightning_polydis as lp

assert Path(lp.__file__).is_relative_to(sys.prefix), f"imported from {lp.__file__}, not from the wheel"
assert metadata.version("lightning-polydis") == lp.__version__
for module in pkgutil.walk_packages(lp.__path__, "lightning_polydis."):
    importlib.import_module(module.name)

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
batches = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(4)]
settings = {"class_fraction": 0.2, "similarity_threshold": 0.99}
report = lp.find_polysemantic_channels(net, batches, layers="2", progress=False, **settings)
inputs = batches[0][0]
assert len(report.plan), "no channel is flagged, so that nothing is split"
torch.testing.assert_close(lp.disentangle(net, report.plan)(inputs), net(inputs))
report.save("report.json")
"""


def main() -> None:
    """Check the one wheel and the one sdist."""
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    sources = _sources()
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    _compare(wheel.name, found, {name for name in sources if name.startswith(f"{PACKAGE}/")})
    with tarfile.open(sdist) as file:
        found = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    made = {name for name in found if ".egg-info/" in name or name in ("PKG-INFO", "setup.cfg")}
    _compare(sdist.name, found - made, {name for name in sources if not name.startswith(".")})
    with tempfile.TemporaryDirectory() as folder:
        _try(wheel, Path(folder))
    print(f"{wheel.name} and {sdist.name} hold what they should, and the wheel works.")


def _sources() -> set[str]:
    """The files of the working tree that git knows or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def _compare(what: str, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        sys.exit(f"{what} lacks {sorted(wanted - found)} and should not have {sorted(found - wanted)}.")


def _try(wheel: Path, folder: Path) -> None:
    """Install the wheel into an environment of its own and use it there.

    Dependencies are those of this environment, reached by a path, since to install torch once more takes minutes. Such
    a path is not searched for ``.pth`` files, so that the sources, which are installed here as editable, stay out of
    sight.
    """
    site = Path(sys.prefix, "lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
    own = folder / "env"
    venv.create(own, symlinks=True)
    python = own / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    (own / site.relative_to(sys.prefix) / "dependencies.pth").write_text(f"{site}\n")
    subprocess.run([python, "-I", "-c", TINY_RUN], cwd=folder, check=True)
    command = own / "bin" / "lightning-polydis"
    subprocess.run([command, "report", "report.json", "-o", "report.html"], cwd=folder, check=True)  # needs templates
    if "</html>" not in (folder / "report.html").read_text():
        sys.exit("The page that the installed command has made is not complete.")


if __name__ == "__main__":
    main()
