"""Pictures that networks are settled on, and others that they are diagnosed on, in crops of the same photographs."""

import pytest

from diagnosed import crops


@pytest.fixture(scope="session")
def settling(photos):
    return crops(photos, 96, seed=1)


@pytest.fixture(scope="session")
def shown(photos):
    return crops(photos, 48, seed=2)
