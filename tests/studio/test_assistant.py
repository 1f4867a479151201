"""The child process that replies to questions."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectune.errors import InputError, SpectuneError
from spectune.studio.assistant import client
from spectune.studio.assistant.client import Assistant, Superseded

CHILD = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    values = question["values"]
    if question["ask"] == "die":
        sys.exit(3)
    if question["ask"] == "sleep":
        time.sleep(values["seconds"])
    reply = {"id": question["id"], "answer": values, "last": question["ask"] == "card"}
    if question["ask"] == "refuse":
        reply = {"id": 0, "last": False, "error": {"what": "wrong", "hint": "do this"}}
    print(json.dumps(reply), flush=True)
    if reply["last"]:
        break
"""


@pytest.fixture
def assistant(tmp_path: Path) -> Iterator[Assistant]:
    """Return an assistant whose child echoes, without torch."""
    made = Assistant(tmp_path / "assistant.log", command=("-c", CHILD))
    yield made
    made.close()


def test_an_answer_comes_back_and_nan_becomes_none(assistant: Assistant) -> None:
    assert assistant.ask("echo", {"a": [1, "ü"], "b": float("nan")}) == {"a": [1, "ü"], "b": None}


def test_an_error_of_the_library_is_raised_with_its_hint(assistant: Assistant) -> None:
    with pytest.raises(InputError, match="wrong") as caught:
        assistant.ask("refuse", {})
    assert caught.value.hint == "do this"


def test_a_child_that_ends_is_an_error_and_is_replaced(assistant: Assistant) -> None:
    with pytest.raises(SpectuneError, match="ended while it worked on `die`"):
        assistant.ask("die", {})
    assert assistant.ask("echo", {"a": 1}) == {"a": 1}


def test_a_question_that_takes_too_long_is_stopped(assistant: Assistant) -> None:
    with pytest.raises(SpectuneError, match=r"took more than 0\.3 seconds"):
        assistant.ask("sleep", {"seconds": 60}, seconds=0.3)
    assert assistant.ask("echo", {"a": 1}) == {"a": 1}


def test_the_time_of_a_question_begins_when_the_child_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "START_SECONDS", 0.3)
    slow = Assistant(tmp_path / "assistant.log", command=("-c", "import time; time.sleep(60)"))
    with pytest.raises(SpectuneError, match=r"the start of the assistant took more than 0\.3 seconds"):
        slow.ask("echo", {}, seconds=60)


def test_a_child_that_holds_a_card_is_replaced(assistant: Assistant) -> None:
    assert assistant.ask("card", {"a": 1}) == {"a": 1}
    assert assistant.ask("echo", {"a": 2}) == {"a": 2}


def test_a_newer_question_of_a_topic_replaces_the_waiting_ones(assistant: Assistant) -> None:
    results: dict[int, object] = {}

    def ask(number: int) -> None:
        try:
            results[number] = assistant.ask("sleep", {"seconds": 0.4, "n": number}, topic="rank")["n"]
        except Superseded:
            results[number] = "superseded"

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
        threading.Event().wait(0.05)
    for thread in threads:
        thread.join()
    assert results == {0: 0, 1: "superseded", 2: "superseded", 3: 3}


def test_the_table_of_questions(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Ask the real questions in this process."""
    from spectune.studio.assistant import questions

    roots = [str(tmp_path), str(tiny_checkpoint.parent)]
    summary = questions.reply("inspect", {"model": str(tiny_checkpoint)}, roots)
    assert summary["label"] == tiny_checkpoint.name
    with pytest.raises(SpectuneError, match="no question `eval`"):
        questions.reply("eval", {}, roots)
    with pytest.raises(SpectuneError, match="outside of the folders"):
        questions.reply("inspect", {"model": str(tiny_checkpoint)}, [str(tmp_path / "other")])
    assert json.dumps(questions.reply("device", {}, []))


def test_a_recipe_is_checked_key_by_key(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from spectune.studio.assistant import questions

    roots = [str(tmp_path), str(tiny_checkpoint.parent)]
    model = {"base": str(tiny_checkpoint), "rank": 2}
    recipe = {
        "model": model,
        "data": {"folders": ["pictures"]},
        "run": {"name": "a", "output": "out", "steps": -1},
    }
    asked = {"values": recipe, "folder": str(tmp_path)}
    (problem,) = questions.reply("check", asked, roots)["problems"]
    assert problem["key"] == "run.steps"
    assert "greater than or equal to 0, got -1" in problem["what"]
    recipe["run"]["steps"] = 3
    problems = questions.reply("check", asked, [str(tmp_path / "out"), str(tmp_path / "pictures")])[
        "problems"
    ]
    assert [one["key"] for one in problems] == ["model.base"]
    assert "outside of the folders" in problems[0]["what"]
    (problem,) = questions.reply("check", asked, roots)["problems"]
    assert problem["key"] == ""
    assert "pictures" in problem["what"]


def test_text_and_values_of_a_recipe_are_inverses(tmp_path: Path) -> None:
    from spectune.studio.assistant import questions

    values = {
        "model": {"base": str(tmp_path / "a.safetensors"), "rank": 8},
        "data": {"sets": [{"path": str(tmp_path / "p"), "repeats": 2}], "caption": {"shuffle": True}},
        "optimizer": {
            "name": "lion",
            "options": {"weight_decay": 0.1},
            "part_learning_rates": {"unet": 1e-5},
        },
    }
    text = questions.reply("recipe_text", {"values": values}, [])["text"]
    assert "rank = 8 # Split the base at this rank" in text
    assert questions.reply("recipe_values", {"text": text, "folder": str(tmp_path)}, [])["values"] == values
    with pytest.raises(InputError, match=r"no key `run\.stepz`"):
        questions.reply("recipe_text", {"values": {"run": {"stepz": 1}}}, [])


def test_the_schema_has_limits_choices_and_registries() -> None:
    from spectune.studio.assistant import questions

    schema = questions.reply("recipe_schema", {}, [])
    fields = {field["key"]: field for section in schema["sections"] for field in section["fields"]}
    assert fields["model.rank"] == {
        "key": "model.rank", "name": "rank", "help": "Split the base at this rank when the run starts. "
        '`"full"` trains complete tensors instead: full fine-tuning.',
        "required": False, "default": None, "optional": True, "kind": "integer", "minimum": 1,
        "maximum": 16384, "other": [{"optional": False, "kind": "choice", "choices": ["full"]}],
    }  # fmt: skip
    assert "huber" in fields["loss.kind"]["choices"]
    assert fields["data.folders"]["items"]["kind"] == "path"
    assert fields["data.sets.path"]["required"]
    options = {field["name"] for field in schema["optimizers"]["adamw"]["fields"]}
    assert "weight_decay" in options
