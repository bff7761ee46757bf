"""/metrics of a server that knows its machine, and of one that does not."""

from __future__ import annotations

from tests.server.serving import running

NAMES = ("flexmoe_step_seconds_predicted_total", "flexmoe_step_seconds_measured_total", "flexmoe_step_time_ratio")


def test_the_ratio_is_there_only_with_a_machine() -> None:
    with running({"machine": "cpu2", "device": "cpu"}) as server:
        answer = server.post("/v1/completions", {"prompt": "Once", "max_tokens": 4, "temperature": 0})
        assert answer.status_code == 200
        lines = dict(line.rsplit(" ", 1) for line in server.get("/metrics").text.splitlines() if line[0] != "#")
        found = {line.partition("{")[0]: float(value) for line, value in lines.items()}
        assert all(found[name] > 0 for name in NAMES)
    with running() as server:
        assert "step_time_ratio" not in server.get("/metrics").text
