"""Every model class of transformers that can be built tiny: equal, or refused by name, and never left changed."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from conformance.class_sweep import outcomes, summary
from conformance.class_trial import Outcome
from conformance.model_classes import model_classes

pytestmark = pytest.mark.model_classes

MOST_NOT_BUILT = 0.2  # a sixth want images, sounds or packages that are not here


@pytest.fixture(scope="module")
def tried(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """The outcomes of all classes whose tests were selected; their counts are printed at the end."""
    wanted = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    with outcomes(sorted(wanted)) as futures:
        yield futures
        done = [future.result() for future in futures.values() if future.done() and not future.cancelled()]
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.ensure_newline()
        reporter.write_line(summary(done))


@pytest.mark.parametrize("name", model_classes())
def test_a_model_class_is_equal_or_refused_and_never_left_changed(name: str, tried: dict[str, Future[Outcome]]) -> None:
    outcome = tried[name].result()
    if outcome.kind == "not built":
        pytest.skip(f"{name} was not built: {outcome.detail}")
    assert not outcome.failed, f"{outcome.kind}: {outcome.detail}"


def test_most_classes_are_built(tried: dict[str, Future[Outcome]]) -> None:
    missing = [outcome.name for future in tried.values() if (outcome := future.result()).kind == "not built"]
    assert len(missing) <= MOST_NOT_BUILT * len(tried), missing
