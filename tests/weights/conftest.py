"""A web server that stands for the whole network, and caches of one's own."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from web_server import Web, serving


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """The hub, torch's host and every other address are this server; both caches are empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as web:
        monkeypatch.setenv("ISTHMUS_TORCH_MIRROR", web.address)
        monkeypatch.setattr(constants, "ENDPOINT", web.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{web.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        yield web
        huggingface_hub.close_session()
