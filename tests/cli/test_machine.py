"""The command env: what this machine is, for people and for scripts."""

import json
from dataclasses import fields
from importlib.metadata import version

from isthmus.runtime import Machine, machine, versions


def test_env_names_machine_and_versions(isthmus):
    result = isthmus("env")
    assert (result.status, result.err) == (0, "")
    here = machine()
    assert here.name in result.out
    assert f"networks run on {here.device} in {here.precision}" in result.out
    for library in ("torch", "torchvision", "safetensors"):
        assert version(library) in result.out


def test_env_json(isthmus):
    found = json.loads(isthmus("env", "--json").out)
    assert set(found) == {"machine", "versions"}
    assert set(found["machine"]) == {field.name for field in fields(Machine)}
    assert found["versions"] == versions()
    assert found["versions"]["isthmus"] == version("isthmus")
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory"] > 2**28
