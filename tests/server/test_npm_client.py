"""The npm client `openai`: client.mjs run by node."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.serving import Running

_PACKAGE = "openai@6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package. Skipped where there is no node, no npm or no way to the registry."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", _PACKAGE]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if result.returncode:
        pytest.skip(f"npm cannot install {_PACKAGE}: {result.stderr.strip()[-200:]}")
    shutil.copy(Path(__file__).parent / "client.mjs", folder)
    return folder


def test_the_npm_client(server: Running, folder: Path) -> None:
    command = ["node", "client.mjs", server.url]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all is well\n"
