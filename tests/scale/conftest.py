"""A rollout server that tests of serving share, and engines on it."""

import pytest
import torch

from pact_fast.distributed import Sharded, World
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.rollout.http.engine import HTTPEngine
from pact_fast.rollout.http.publish import Publisher
from tests.helpers.servers import base_model, served, url_of


@pytest.fixture(scope="module")
def model():
    """The trainer's model: not what the server starts with."""
    model, generator = base_model(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.005 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def weights_root(tmp_path_factory):
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def server(weights_root):
    with served(base_model_path(), model_root=weights_root) as server:
        yield server


@pytest.fixture
def url(server):
    """The server, as a test should find it."""
    server.service.engine.resume()
    return url_of(server)


@pytest.fixture
def engine_on(weights_root, model):
    """Makes engines that publish `model`."""
    made = []

    def make(*urls, source=model, **options):
        options = {
            "retry_timeout": 60.0,
            "publisher": Publisher(Sharded(source, World()), weights_root / "w"),
        } | options
        made.append(HTTPEngine(urls, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
