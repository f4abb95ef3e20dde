"""The eight tasks from their originals: fetched by the real client, turned into the published rows."""

import io
import json
import re

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fslora_hf.data import TASKS, load_commonsense, load_originals
from fslora_hf.data.originals import original_rows
from fslora_hf.data.sources import load_rows
from tests.support.published import taken_apart

pytest_plugins = ("tests.support.hub_client",)

ROWS = 200  # of each real file, which holds thousands
LETTERS = "ABCDE"


def parquet(rows: list[dict], features: Features | None = None) -> bytes:
    file = io.BytesIO()
    Dataset.from_list(rows, features=features).to_parquet(file)
    return file.getvalue()


# The card of a repository may state the fields, in this older way of writing a list.
OPENBOOKQA_FIELDS = """dataset_info:
- config_name: main
  features:
  - {name: id, dtype: string}
  - {name: question_stem, dtype: string}
  - name: choices
    sequence:
    - {name: text, dtype: string}
    - {name: label, dtype: string}
  - {name: answerKey, dtype: string}"""


def repository(configs: dict[str, dict[str, bytes]], *fields: str) -> dict[str, bytes]:
    """Files of a data set repository, laid out and described by its card as those of the Hub are."""
    card, files = ["---", *fields, "configs:"], {}
    for name, splits in configs.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, content in splits.items():
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
            files[f"{name}/{split}-00000-of-00001.parquet"] = content
    return files | {"README.md": "\n".join([*card, "---", "# Rows"]).encode()}


def listed(question: str, choices: list[str], correct: int, labels: str, field: str = "question", **others) -> dict:
    """A row of ARC or OpenBookQA."""
    labels = list(labels[: len(choices)])
    return {field: question, "choices": {"text": choices, "label": labels}, "answerKey": labels[correct]} | others


def original(task: str, number: int, row: dict[str, str]) -> dict:
    """A published row put back into the fields of its original."""
    question, choices, correct = taken_apart(task, row)
    match task:
        case "ARC-Challenge" | "ARC-Easy":
            labels = LETTERS if number % 3 else "12345"
            return listed(question, choices, correct, labels, id=f"Mercury_{number}")
        case "openbookqa":
            return listed(question, choices, correct, LETTERS, "question_stem", id=str(number))
        case "boolq":
            return {"question": question, "answer": choices[correct] == "true", "passage": "Not shown."}
        case "winogrande":
            return {
                "sentence": question,
                "option1": choices[0],
                "option2": choices[1],
                "answer": str(correct + 1),
            }


@pytest.fixture(scope="module")
def published_dir(commonsense_dir, tmp_path_factory):
    """The first rows of each real file, and those of ARC with other than four choices."""
    folder = tmp_path_factory.mktemp("commonsense")
    for path in commonsense_dir.glob("*/*.json"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        arc = path.parent.name.startswith("ARC")
        unusual = [row for row in rows[ROWS:] if arc and not row["instruction"].endswith("answer3/answer4")]
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_text(json.dumps(rows[:ROWS] + unusual), encoding="utf-8")
    return folder


def published(folder, task: str, split: str) -> list[dict[str, str]]:
    return json.loads((folder / task / f"{split}.json").read_text(encoding="utf-8"))


def columns(**arguments) -> dict[str, list[str]]:
    return load_originals(**arguments).to_dict()


# Repository, name of the split that is `test`, and name of the configuration, of the tasks with real rows.
PLACES = {
    "ARC-Challenge": ("allenai/ai2_arc", "test", "ARC-Challenge"),
    "ARC-Easy": ("allenai/ai2_arc", "test", "ARC-Easy"),
    "boolq": ("google/boolq", "validation", "default"),
    "openbookqa": ("allenai/openbookqa", "test", "main"),
    "winogrande": ("allenai/winogrande", "validation", "winogrande_xl"),
}


def test_real_rows_come_back_from_their_originals_character_by_character(hub, on_client, published_dir):
    contents: dict[str, dict[str, dict[str, bytes]]] = {}
    for task, (repo_id, held_out, config) in PLACES.items():
        for split in ("train", "test"):
            if (published_dir / task / f"{split}.json").exists():
                rows = [original(task, i, row) for i, row in enumerate(published(published_dir, task, split))]
                name = held_out if split == "test" else "train"
                contents.setdefault(repo_id, {}).setdefault(config, {})[name] = parquet(rows)
    # Sets that must not be taken: other configurations, and splits whose labels are not public.
    decoy = [original("openbookqa", 0, published(published_dir, "openbookqa", "test")[0])]
    contents["allenai/openbookqa"] = {"additional": {"test": parquet(decoy)}} | contents["allenai/openbookqa"]
    contents["allenai/openbookqa"]["main"]["validation"] = parquet(decoy)
    unlabelled = {"sentence": "_", "option1": "a", "option2": "b", "answer": ""}
    contents["allenai/winogrande"]["winogrande_xl"]["test"] = parquet([unlabelled])
    for repo_id, configs in contents.items():
        fields = [OPENBOOKQA_FIELDS] if repo_id == "allenai/openbookqa" else []
        hub.add(repo_id, repository(configs, *fields), repo_type="dataset")

    lengths = set()
    for split, tasks in (("train", [task for task in PLACES if task != "winogrande"]), ("test", list(PLACES))):
        for task in tasks:
            expected = published(published_dir, task, split)
            assert on_client(original_rows, task, split) == expected, (task, split)
            lengths |= {len(taken_apart(task, row)[1]) for row in expected if task.startswith("ARC")}
        for limit in (None, 50):
            given = {"tasks": tasks, "split": split, "limit": limit, "seed": 3}
            assert on_client(columns, **given) == load_commonsense(published_dir, **given).to_dict()
    assert lengths == {3, 4, 5}
    # What is loaded once is there without the Hub.
    hub.clear()
    assert on_client(original_rows, "boolq", "test") == published(published_dir, "boolq", "test")


HELLASWAG = {
    "ind": 4,
    "activity_label": "Removing ice from car",
    "ctx_a": "Then, the man writes over the snow.",
    "ctx_b": "then",
    "ctx": "Then, the man writes over the snow. then",
    "endings": [", he  adds wax.", ", he scrapes it.", ", he sings.", ", he sleeps."],
    "label": "1",
}
PIQA = {
    "goal": "When boiling butter, when it's ready, you can",
    "sol1": "Pour it onto a plate",
    "sol2": "Pour it into a jar",
}
SIQA = {
    "context": "Cameron gave Jordan a ride. ",
    "question": "Why did Cameron do this?",
    "answerA": "be kind",
    "answerB": "be late",
    "answerC": "find  Jordan",
}
BY_HAND = {
    "hellaswag": (
        "Rowan/hellaswag",
        [HELLASWAG, HELLASWAG | {"label": "3"}],
        "Please choose the correct ending to complete the given sentence: Removing ice from car: Then, the man writes "
        "over the snow. then\n\nEnding1: , he  adds wax. Ending2: , he scrapes it. Ending3: , he sings. Ending4: , he "
        "sleeps.\n\nAnswer format: ending1/ending2/ending3/ending4",
        ["ending2", "ending4"],
    ),
    "piqa": (
        "baber/piqa",
        [PIQA | {"label": 1}, PIQA | {"label": 0}],
        "Please choose the correct solution to the question: When boiling butter, when it's ready, you can\n\n"
        "Solution1: Pour it onto a plate\n\nSolution2: Pour it into a jar\n\nAnswer format: solution1/solution2",
        ["solution2", "solution1"],
    ),
    "social_i_qa": (
        "lighteval/siqa",
        [SIQA | {"label": "3"}, SIQA | {"label": "1"}],
        "Please choose the correct answer to the question: Cameron gave Jordan a ride.  Why did Cameron do this?\n\n"
        "Answer1: be kind Answer2: be late Answer3: find  Jordan\n\nAnswer format: answer1/answer2/answer3",
        ["answer3", "answer1"],
    ),
}


def add_by_hand(hub, task: str, rows: list[dict] | None = None, features: Features | None = None) -> None:
    repo_id, own, *_ = BY_HAND[task]
    # Without a card: the client finds the splits by the names of the files.
    files = {
        f"data/{split}-00000-of-00001.parquet": parquet(rows or own, features) for split in ("train", "validation")
    }
    hub.add(repo_id, files, repo_type="dataset")


def expected_by_hand(task: str) -> list[dict[str, str]]:
    *_, instruction, answers = BY_HAND[task]
    return [
        {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
        for answer in answers
    ]


@pytest.mark.parametrize("task", BY_HAND)
def test_tasks_without_published_rows_read_as_the_paper_words_them(hub, on_client, task):
    add_by_hand(hub, task)
    for split in ("train", "test"):
        assert on_client(original_rows, task, split) == expected_by_hand(task)


def test_a_label_may_be_stored_as_a_class(hub, on_client):
    features = Features(dict.fromkeys(PIQA, Value("string")) | {"label": ClassLabel(names=["0", "1"])})
    add_by_hand(hub, "piqa", features=features)
    assert on_client(original_rows, "piqa") == expected_by_hand("piqa")
    # The name counts, not its number, which begins at 0.
    features = Features(dict.fromkeys(SIQA, Value("string")) | {"label": ClassLabel(names=["1", "2", "3"])})
    add_by_hand(hub, "social_i_qa", features=features)
    assert on_client(original_rows, "social_i_qa") == expected_by_hand("social_i_qa")


def test_white_space_around_a_label_is_not_part_of_it(hub, on_client):
    rows = [listed("Why?", ["a", "b"], 1, LETTERS) | {"answerKey": " B"}]
    hub.add("allenai/ai2_arc", repository({"ARC-Easy": {"test": parquet(rows)}}), repo_type="dataset")
    assert [row["answer"] for row in on_client(original_rows, "ARC-Easy", "test")] == ["answer2"]


def commonsense_columns(split: str, **arguments) -> dict[str, list[str]]:
    return load_rows("commonsense", split, **arguments).to_dict()


def test_commonsense_without_a_folder_is_that_of_the_hub(hub, on_client):
    add_by_hand(hub, "hellaswag")
    add_by_hand(hub, "piqa")
    rows = on_client(commonsense_columns, "test", tasks=["piqa", "hellaswag"], rows_per_task=1, seed=1)
    assert rows["task"] == ["piqa", "hellaswag"]
    assert rows == on_client(columns, tasks=["piqa", "hellaswag"], split="test", limit=1, seed=1)


def arc(**change) -> list[dict]:
    return [listed("Why?", ["a", "b", "c", "d"], 2, LETTERS) | change]


@pytest.mark.parametrize(
    ("task", "rows", "found"),
    [
        (
            "ARC-Easy",
            arc(answerKey="E"),
            "answerKey to be one of A, B, C, D, found 'E' in row 0 of allenai/ai2_arc ARC-Easy test (from 0): the",
        ),
        ("ARC-Easy", arc(answerKey=""), "answerKey to be one of A, B, C, D, found no label in row 0"),
        (
            "ARC-Easy",
            arc(choices={"text": ["a"], "label": ["A"]}, answerKey="A"),
            "two or more choices with a label each, found 1 with the labels A in row 0",
        ),
        (
            "ARC-Easy",
            arc(choices={"text": ["a", "b"], "label": ["A", "A"]}, answerKey="A"),
            "two or more choices with a label each, found 2 with the labels A, A in row 0",
        ),
        (
            "ARC-Easy",
            [*arc(), *arc(choices=None)],
            "two or more choices with a label each, found 0 with the labels (none) in row 1",
        ),
        ("ARC-Easy", [*arc(), *arc(question=None)], "a text in each field that the prompt shows, found a field or"),
        (
            "hellaswag",
            [HELLASWAG, HELLASWAG | {"label": ""}],
            "label to be one of 0, 1, 2, 3, found no label in row 1 of",
        ),
        ("hellaswag", [HELLASWAG | {"endings": ["a", "b"]}], "two or more choices with a label each, found 2 with"),
        ("piqa", [PIQA | {"label": -1}], "label to be one of 0, 1, found no label in row 0 of baber/piqa validation"),
        (
            "piqa",
            [{"goal": "x", "sol1": ["a"], "label": True}],
            "baber/piqa validation to have the fields of the original, found sol1 as a list of text instead of text, "
            "sol2 as nothing instead of text, label as true or false instead of text or integer or class label: the",
        ),
        (
            "ARC-Easy",
            [{"question": "Why?", "choices": ["a", "b"], "answerKey": 1}],
            "found choices as a list of text instead of (text: a list of text, label: a list of text), answerKey as "
            "integer instead of text: the",
        ),
    ],
)
def test_rows_that_are_not_the_originals_are_refused(hub, on_client, task, rows, found):
    if task in BY_HAND:
        add_by_hand(hub, task, rows)
    else:
        hub.add("allenai/ai2_arc", repository({task: {"test": parquet(rows)}}), repo_type="dataset")
    with pytest.raises(ValueError, match=rf"^Expected .*{re.escape(found)}.* so give data_dir a folder of"):
        on_client(original_rows, task, "test")


def test_what_the_hub_does_not_have_is_named(hub, on_client):
    remedy = ": load it once where the Hub can be reached, or give data_dir a folder of the published files.$"
    with pytest.raises(OSError, match=f"^Expected the validation split of baber/piqa for .* piqa, found .*{remedy}"):
        on_client(original_rows, "piqa", "test")
    hub.add("baber/piqa", {"data/train-0.parquet": parquet([PIQA | {"label": 1}])}, repo_type="dataset")
    with pytest.raises(
        OSError, match=f'^Expected the validation split .*, found Unknown split "validation".*{remedy}'
    ):
        on_client(original_rows, "piqa", "test")
    hub.add("allenai/winogrande", repository({"winogrande_xs": {"train": parquet([PIQA])}}), repo_type="dataset")
    with pytest.raises(
        OSError, match=f"^Expected the train .*, found BuilderConfig 'winogrande_xl' not found.*{remedy}"
    ):
        on_client(original_rows, "winogrande")


def test_the_arguments_are_those_of_the_local_files():
    for arguments, message in (
        ({"split": "dev"}, "one of train, test, found 'dev'"),
        ({"limit": 0}, "at least 1 row per task, found 0"),
        ({"tasks": ["copa"]}, r"tasks out of ARC-Challenge, .*, found \['copa'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_originals(**arguments)
    with pytest.raises(OSError, match=f"for the task {TASKS[0]}, found .*OfflineMode"):  # as the tests' process is
        load_originals()
