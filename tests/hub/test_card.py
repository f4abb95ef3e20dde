"""The model card: what it tells, that the Hub and its client read it, and that what people wrote in it stays."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries

from fslora_hf.hub.card import BEGIN, COMMONSENSE, END, CardContext, eval_results_yaml, merge_card, render_card
from fslora_hf.hub.card_text import _METHODS
from fslora_hf.methods import METHODS
from tests.support.result_files import adapter, evaluation

pytest_plugins = ("tests.support.hub_client",)

TOTALS = {
    "bytes_up": 60_000_000,
    "bytes_down": 65_000_000,
    "bytes_total": 125_000_000,
    "bytes_full_rank": 250_000_000,
    "ratio": 0.5,
    "seconds": 240.0,
    "rounds": 10,
    "refused": 0,
}
CONTEXT = CardContext(
    name="smol run",
    repo_id="ann/smol-run",
    base_model="HuggingFaceTB/SmolLM2-135M",
    base_revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    data="1,200 rows",
    datasets=["google/boolq"],
    method="fslora",
    rank=16,
    alpha=32.0,
    target_modules=["v_proj", "q_proj"],
    client_ranks="2 to 16",
    num_clients=8,
    clients_per_round=4,
    local_steps=20,
    rounds_done=10,
    num_rounds=12,
    totals=TOTALS,
    benchmarks=COMMONSENSE,
    pushed_rounds=[5],
)


class Strict(yaml.SafeLoader):
    """Refuses a key that stands twice, as the Hub does."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return super().construct_mapping(node, deep=deep)


def front(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.load(card.split("---\n")[1], Loader=Strict)  # noqa: S506


def body(card: str) -> str:
    return card.split("---\n", 2)[2]


def table_row(card: str, first: str) -> list[str]:
    """The other cells of the only row that begins with a cell."""
    (line,) = (line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


@pytest.fixture
def results(tmp_path):
    """Of the base and of rounds 5 and 10; boolq stands in the benchmark, the other task does not."""

    def make(name, marks, **changes):
        path = evaluation(tmp_path / "results", name, {"boolq": marks, "own": "10"}, **changes)
        return json.loads(path.read_text())

    return [
        make("base", "10000000"),
        make("round-0005", "11000000", adapter=adapter(5)),
        make("round-0010", "11111111", norm={"boolq": "11110000", "own": "10"}, adapter=adapter(10)),
    ]


def test_the_facts_of_a_run():
    card = render_card(CONTEXT)
    for text in (
        "# smol run",
        "after 10 of 12 rounds",
        "4 clients of 8",
        "[HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M) at `12fd25f77366`",
        "[google/boolq](https://huggingface.co/datasets/google/boolq)",
        "[arXiv:2501.19389](https://arxiv.org/abs/2501.19389)",
        "LoRA of rank 16, alpha 32, on q\\_proj, v\\_proj",
        "125.0 MB (65.0 MB to clients, 60.0 MB back): **50.0 %** of the 250.0 MB of full-rank federated LoRA",
        "| 4 minutes |",
        "(`round-0005`, `round-0010`)",
    ):
        assert text in card, text
    assert "## Scores" not in card and "## Plots" not in card and "## Reproduce" not in card
    assert "best" not in card
    best = render_card(replace(CONTEXT, best="5, by eval_loss 1.25"))
    assert table_row(best, "best&nbsp;round") == ["5, by eval\\_loss 1.25"]


def test_the_citation_is_the_readmes():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert " ".join(re.search(r"```bibtex\n(.*?)```", readme, re.DOTALL)[1].split()) in " ".join(
        render_card(CONTEXT).split()
    )


def test_the_code_of_the_card_names_base_repository_and_round():
    (code,) = re.findall(r"```python\n(.*?)```", render_card(CONTEXT), re.DOTALL)
    calls = []

    class Model:
        @staticmethod
        def from_pretrained(*arguments, **keywords):
            calls.append((*arguments, keywords))
            return "base"

    lines = [line for line in code.splitlines() if not line.startswith("from ")]
    exec("\n".join(lines), dict.fromkeys(("AutoModelForCausalLM", "AutoTokenizer", "PeftModel"), Model))  # noqa: S102
    assert calls == [
        ("HuggingFaceTB/SmolLM2-135M", {"revision": CONTEXT.base_revision}),
        ("base", "ann/smol-run", {"revision": "round-0010"}),
        ("ann/smol-run", {"revision": "round-0010"}),
    ]


def test_scores_of_the_latest_round_and_the_average_by_round(results):
    card = render_card(replace(CONTEXT, results=results))
    assert "### Log-likelihood of the options, after 10 rounds" in card
    assert table_row(card, "boolq") == ["100.0 ± 0.0", "50.0 ± 17.7", "12.5 ± 11.7", "50.0", "8"]
    assert table_row(card, "own")[0] == "50.0 ± 35.4"
    assert "Above the majority rate by more than 1.96 standard errors: boolq." in card
    assert table_row(card, "0")[0] == "the base model"
    assert table_row(card, "5")[0] == "`round-0005`"
    assert table_row(card, "10")[0] == "`round-0010`"
    assert table_row(render_card(replace(CONTEXT, results=results, pushed_rounds=())), "5")[0] == "-"


def test_protocols_and_other_questions_have_tables_of_their_own(results, tmp_path):
    generated = evaluation(
        tmp_path / "g",
        "g",
        {"boolq": "1-"},
        protocol="generate",
        adapter=adapter(10),
        settings={"num_beams": 4},
        tied=3,
        not_finite=1,
    )
    other = {**results[1], "rows_hash": "c" * 16}
    card = render_card(replace(CONTEXT, results=[*results, json.loads(generated.read_text()), other]))
    assert card.count("\n### ") == 3
    assert "### Generated answers, after 10 rounds" in card and "Settings: num\\_beams 4." in card
    assert "In 1 question the model computed" in card and "In 3 questions the best options are equally likely" in card
    assert "after 5 rounds" in card


def test_many_rounds_are_folded_up(results):
    many = [{**results[1], "adapter": adapter(number)} for number in range(1, 31)]
    pushed = range(1, 30)
    card = render_card(replace(CONTEXT, results=many, rounds_done=30, num_rounds=30, pushed_rounds=pushed))
    assert "<details>" in card and "| 17 | `round-0017` |" in card
    assert "(`round-0001`, `round-0002`, ..., `round-0028`, `round-0029`, `round-0030`)" in card


def test_metadata(results):
    card = render_card(replace(CONTEXT, results=results, license="apache-2.0"))
    found = front(card)
    index = found.pop("model-index")
    assert found == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "datasets": ["google/boolq"],
        "metrics": ["accuracy"],
        "tags": ["fslora_hf", "federated-learning", "lora"],
    }
    (model,) = index
    boolq, own = model["results"]
    assert model["name"] == "smol run" and own["dataset"]["type"] == "own"
    assert boolq["dataset"] == {"name": "boolq, 8 questions", "type": "google/boolq", "split": "validation"}
    assert [(metric["type"], metric["value"]) for metric in boolq["metrics"]] == [("accuracy", 1.0), ("acc_norm", 0.5)]
    assert boolq["metrics"][0]["name"] == "Accuracy after round 10"


def test_scores_of_the_base_are_not_the_adapters(results):
    found = front(render_card(replace(CONTEXT, results=results[:1])))
    assert "model-index" not in found


def test_two_tasks_of_one_data_set_stay_apart(tmp_path):
    marks = {"ARC-Easy": "1100", "ARC-Challenge": "1000"}
    result = json.loads(evaluation(tmp_path / "r", "r", marks, adapter=adapter(10)).read_text())
    (model,) = front(render_card(replace(CONTEXT, results=[result])))["model-index"]
    found = {(r["dataset"]["type"], r["dataset"]["config"]): r["metrics"][0]["value"] for r in model["results"]}
    assert found == {("allenai/ai2_arc", "ARC-Easy"): 0.5, ("allenai/ai2_arc", "ARC-Challenge"): 0.25}


def test_a_local_base_is_not_given_away(tmp_path):
    folder = tmp_path / "private" / "my-model"
    folder.mkdir(parents=True)
    card = render_card(replace(CONTEXT, base_model=str(folder), base_revision=None))
    assert "base_model" not in front(card) and str(tmp_path) not in card
    assert 'from_pretrained("my-model")  # your copy of it' in card


def test_a_relative_folder_that_reads_like_a_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/model").mkdir(parents=True)
    assert "base_model" not in front(render_card(replace(CONTEXT, base_model="outputs/model")))


def test_names_stay_text(results):
    name = "a|b `c` <img src=x> [d](e) *f*\n# g ---"
    results[2]["scores"] = [{**line, "task": line["task"].replace("own", "x|<b>")} for line in results[2]["scores"]]
    card = render_card(replace(CONTEXT, name=name, data="rows | of <b>", client_ranks="2|4", results=results))
    text = body(card)
    assert "<img" not in text and "<b>" not in text
    heading = text.split(BEGIN)[1].strip().splitlines()[0]
    assert heading == r"# a\|b \`c\` &lt;img src=x&gt; \[d\](e) \*f\* # g ---"
    assert table_row(card, "data") == [
        r"rows \| of &lt;b&gt; ([google/boolq](https://huggingface.co/datasets/google/boolq))"
    ]
    assert front(card)["model-index"][0]["name"] == " ".join(name.split())


@pytest.mark.parametrize("name", ["1e-3", "no", "0o17", "010", "null", "2026-11-22", ": {", "~", "- x", "é\U0001f600"])
def test_a_name_is_a_text_in_either_yaml(name, results):
    card = render_card(replace(CONTEXT, name=name, results=results))
    assert front(card)["model-index"][0]["name"] == name
    (line,) = (line for line in card.splitlines() if line.startswith("- name:"))
    if name[0] in "01":  # what YAML 1.2 alone takes for a number
        assert line == f"- name: '{name}'"


def test_tokens_in_the_command_are_masked():
    secret = "hf_abcdefghijklmnopqrst"
    for command in (
        f"train --hub_token {secret} --x 1",
        f"train --hub_token={secret} --x 1",
        f"HF_TOKEN={secret} train --x 1",
    ):
        card = render_card(replace(CONTEXT, command=command))
        assert secret not in card and "$HF_TOKEN" in card and "--x 1" in card
    card = render_card(replace(CONTEXT, command="train --hub_token 'another key' --x 1"))
    assert "another key" not in card and "--x 1" in card


def test_code_cannot_end_its_block_or_our_section():
    command = f"echo '```'\n{END}\n# loud"
    once = render_card(replace(CONTEXT, command=command))
    assert "````sh\n" in once and once.count(END) == 1
    assert render_card(replace(CONTEXT, command=command), once) == once


def test_plots_are_links_that_work():
    card = render_card(replace(CONTEXT, plots={"Loss [all]": "plots/a b.png"}))
    assert r"![Loss \[all\]](plots/a%20b.png)" in card


def test_a_run_that_moved_nothing_and_refused_some():
    nothing = {**TOTALS, "ratio": None, "bytes_full_rank": 0, "refused": 2}
    card = render_card(replace(CONTEXT, totals=nothing))
    assert table_row(card, "bytes&nbsp;moved") == ["none"] and table_row(card, "refused&nbsp;updates") == ["2"]


# ---- what people wrote stays ----


def test_hand_edits_survive(results):
    first = render_card(replace(CONTEXT, rounds_done=5))
    edited = first.replace("library_name: peft\n", "library_name: peft\nlanguage: no\nlicense: mit\nwidget: 010\n")
    edited = edited.replace("tags:\n", "tags:\n- mine\n").replace(BEGIN, f"Read this first.\n\n{BEGIN}")
    edited += "\n## My notes\n\n---\n\nKept.\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = render_card(replace(CONTEXT, results=results, license="apache-2.0"), edited)
        assert render_card(replace(CONTEXT, results=results), second) == second
    found = front(second)
    assert (found["language"], found["license"], found["widget"]) == ("no", "mit", "010")
    assert found["tags"] == ["fslora_hf", "federated-learning", "lora", "mine"]
    before, rest = second.split(BEGIN)
    ours, after = rest.split(END)
    assert "Read this first." in before and after.strip() == "## My notes\n\n---\n\nKept."
    assert "after 10 of 12 rounds" in ours and "after 5 of 12" not in second


def test_a_card_without_our_section_gets_it_in_front():
    card = render_card(CONTEXT, "---\nlicense: mit\n---\n# Mine\n\nText.\n")
    assert front(card)["license"] == "mit"
    assert card.index(BEGIN) < card.index(END) < card.index("# Mine\n\nText.\n")


def test_a_card_rendered_before_is_merged_later(results):
    """A round's card waits in the queue while someone edits the one on the Hub."""
    context = replace(CONTEXT, results=results)
    edited = render_card(replace(CONTEXT, rounds_done=5)).replace("tags:\n", "tags:\n- mine\n") + "\nKept.\n"
    assert merge_card(render_card(context), edited) == render_card(context, edited)


def test_results_that_someone_added_stay_and_ours_are_replaced(results):
    card = render_card(replace(CONTEXT, results=results[:2]))
    theirs = {"task": {"type": "text-generation"}, "dataset": {"type": "x/y", "name": "Y"}}
    theirs["metrics"] = [{"type": "bleu", "value": 7}]
    found = front(card)
    found["model-index"][0]["results"].append(theirs)
    found["model-index"].append({"name": "other", "results": [theirs]})
    edited = f"---\n{yaml.safe_dump(found)}---\n{body(card)}"
    index = front(render_card(replace(CONTEXT, results=results), edited))["model-index"]
    ours, other = index
    assert other == {"name": "other", "results": [theirs]}
    assert [result["dataset"]["type"] for result in ours["results"]] == ["google/boolq", "own", "x/y"]
    assert "after round 5" not in str(index)


def test_a_result_that_cannot_be_read_is_left_out_with_a_warning():
    edited = "---\nmodel-index:\n- name: x\n  results:\n  - metrics: 3\n---\nText\n"
    with pytest.warns(UserWarning, match="Expected results with task, dataset and metrics"):
        card = render_card(CONTEXT, edited)
    assert "model-index" not in front(card) and card.endswith("Text\n")


@pytest.mark.parametrize(
    ("damaged", "found"),
    [
        ("---\nlicense: [mit\n---\n# Mine\n", "metadata in YAML"),
        ("---\n- a\n- b\n---\n# Mine\n", "found a list"),
        ("---\ndate: 2026-99-99\n---\n# Mine\n", "metadata in YAML"),
        ("---\nlicense: mit\n# Mine\n", "found no second one"),
        ("---\na: " + "[" * 5000 + "\n---\n# Mine\n", "metadata in YAML"),
    ],
)
def test_damaged_metadata_is_written_anew_and_the_text_kept(damaged, found):
    with pytest.warns(UserWarning, match="^Expected ") as caught:
        card = render_card(CONTEXT, damaged)
    assert found in str(caught[0].message) and len(caught) == 1
    assert front(card)["library_name"] == "peft" and card.endswith("# Mine\n")


@pytest.mark.parametrize("lost", [BEGIN, END])
def test_a_lone_marker_keeps_the_text_and_the_next_card_is_clean(lost):
    edited = render_card(CONTEXT).replace(lost, "") + "\nMine.\n"
    with pytest.warns(UserWarning, match="one without the other"):
        card = render_card(CONTEXT, edited)
    assert card.count(BEGIN) == card.count(END) == 1 and card.endswith("Mine.\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render_card(CONTEXT, card) == card


def test_a_second_copy_of_our_section_goes():
    card = render_card(CONTEXT)
    twice = card + "\nBetween.\n\n" + card[card.index(BEGIN) :] + "\nAfter.\n"
    again = render_card(CONTEXT, twice)
    assert again.count(BEGIN) == 1 and "Between." in again and again.endswith("After.\n")


def test_line_ends_and_the_byte_order_mark():
    edited = "\ufeff" + render_card(CONTEXT).replace("\n", "\r\n") + "Mine.\r\n"
    card = render_card(CONTEXT, edited)
    assert card == render_card(CONTEXT, edited.removeprefix("\ufeff").replace("\r\n", "\n")).replace("\n", "\r\n")
    assert "\n" not in card.replace("\r\n", "")


# ---- the Hub's own readers ----


def upload(card: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token="key")
    api.create_repo("ann/smol-run", exist_ok=True)
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="ann/smol-run")


def load_and_validate() -> tuple[dict, str]:
    card = ModelCard.load("ann/smol-run")
    card.validate()
    return card.data.to_dict(), str(card)


def test_the_hub_takes_the_card_and_its_client_reads_it(hub, on_client, results):
    hub.users["key"] = {"name": "ann", "role": "write", "orgs": []}
    card = render_card(replace(CONTEXT, name='x: "y" | [z]', results=results, license="mit"))
    on_client(upload, card)
    data, text = on_client(load_and_validate)
    assert data == front(card) and body(text) == body(card)
    checks = [request for request in hub.requests if request.path == "/api/validate-yaml"]
    assert checks and all(request.status == 200 for request in checks)


def test_eval_results(results):
    text = eval_results_yaml(replace(CONTEXT, results=results))
    (entry,) = parse_eval_result_entries(yaml.load(text, Loader=Strict))  # noqa: S506
    assert (entry.dataset_id, entry.task_id, entry.value) == ("google/boolq", "default", 1.0)
    assert entry.date == results[2]["time"]
    assert "8 questions" in entry.notes and "standard error 0.0000" in entry.notes and "round 10" in entry.notes
    assert eval_results_yaml(replace(CONTEXT, results=results, benchmarks={})) is None


def test_every_built_in_method_is_named():
    assert _METHODS.keys() == METHODS.keys()
