"""Keep the benchmark from measuring, where only its files and words are tested."""

import pytest


@pytest.fixture
def unmeasured(monkeypatch):
    """Interrupt the benchmark at once."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.benchmark.command.measure", interrupted)
