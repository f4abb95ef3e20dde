"""No secret of a user's in what is said or written: by its name, by its looks, wherever a slip has put it."""

import importlib
import json
import random
import secrets
import traceback

import pytest
import yaml

from fslora_hf.common.masking import find_secrets, is_secret_name, mask, scrub, scrub_quoted
from fslora_hf.common.settings import SettingsError, sentence, written
from fslora_hf.comparison.arguments import ComparisonArguments, parse_comparison
from fslora_hf.comparison.runs import runs_of
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.federation.server import FederationArguments, read_recipe
from fslora_hf.hub.errors import scrub as scrub_of_the_hub
from fslora_hf.reports.markdown import without_tokens

TYPES = (RecipeArguments, FederatedSketchConfig, ModelArguments)
TOKEN = "hf_" + "AbCdEf0123456789" * 2
WORDS = "correct-horse"  # a password that looks like nothing
RECIPE = {"model_name_or_path": "some/model", "num_clients": 2, "use_cpu": True, "bf16": False}


def told(call, *arguments) -> str:
    """All that a user sees of an error: its traceback, with the errors before it."""
    with pytest.raises((ValueError, SystemExit)) as caught:
        call(*arguments)
    lines = traceback.format_exception(caught.value)
    return "".join(line for line in lines if not line.startswith("  File "))


def read(tmp_path, text: str, *arguments: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return told(parse_recipe, TYPES, ["--config", str(file), *arguments])


@pytest.mark.parametrize("secret", [TOKEN, WORDS])
@pytest.mark.parametrize(
    "slip",
    [
        "hub_token: [{}]",
        "hub_token: {{main: {}}}",
        "hub_token: {{{}: main}}",
        "hub_token {}",
        "num_rounds: 1\nhub_token {}\nseed: 2",
        "- hub_token: {}",
        "- {}",
        "hub_token: *{}",
        "hub_token: !{} x",
        "hub_token: '{}",
        "hub_token: !!int {}",
        "hub_token: @{}",
        "env:\n- HF_TOKEN={}",
        "env: {{HF_TOKEN: [{}]}}",
        "env: {{HF_TOKEN: {{a: {}}}}}",
        "env: {{'HF TOKEN': {}}}",
        "env: HF_TOKEN={}",
        "token: {}",
        "hub_tok: {}",
        "api_key: {}",
        "model_init_kwargs: [token, {}]\nnum_rounds: {{token: {}}}",
        "lr_scheduler_kwargs: 'token: {}'\nnum_rounds: 'hub_token={}'",
        "num_rounds: {{a: {{hub_token: [x, {}]}}}}",
        "use_cpu: true\nbf16: false\nmodel_name_or_path: m\nseed: '--hub_token {}'",
    ],
)
def test_a_slip_in_a_recipe_does_not_show_the_secret(tmp_path, slip, secret):
    if secret == WORDS and slip == "model_init_kwargs: [token, {}]\nnum_rounds: {{token: {}}}":
        slip = "model_init_kwargs: 5\nnum_rounds: {{token: {}}}"
    text = read(tmp_path, slip.replace("{}", secret).replace("{{", "{").replace("}}", "}"))
    assert secret not in text and text.splitlines()[-1].startswith(("fslora_hf.", "- Expected"))
    assert "Expected" in text and len(text) < 20_000


@pytest.mark.parametrize(
    "slip", ["num_rounds: {}", "{}: 1", "seed: [{}]", "method: {}", "optim: {}", "client_ranks: {}", "partition: {}"]
)
def test_a_token_in_any_place_is_known_by_its_looks(tmp_path, slip):
    assert TOKEN not in read(tmp_path, slip.format(TOKEN))


@pytest.mark.parametrize(
    "arguments", [[TOKEN], ["--hub_token", "x", WORDS], ["--hub_tok", TOKEN], [f"--tokn={WORDS}"], ["--seed", TOKEN]]
)
def test_a_slip_on_the_command_line(tmp_path, arguments):
    text = read(tmp_path, yaml.safe_dump(RECIPE), *arguments)
    assert TOKEN not in text and WORDS not in text and "Expected" in text


def test_a_slip_in_the_overrides_of_a_federation(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    for overrides in (f"--hub_token '{WORDS}", f"--tokn {TOKEN}", f"--hub_token {WORDS} {WORDS}"):
        text = told(read_recipe, FederationArguments(recipe=str(file), overrides=overrides))
        assert TOKEN not in text and WORDS not in text and "Expected" in text
    text = told(lambda: FederationArguments(recipe=str(file), overrides=[f"--hub_token {TOKEN}"]))
    assert TOKEN not in text


@pytest.mark.parametrize(
    "slip",
    [
        {"settings": {"hub_tok": [WORDS]}},
        {"settings": [f"hub_token={WORDS}"]},
        {"cases": {"one": {"num_rounds": TOKEN}}},
        {"methods": [TOKEN]},
        {"seeds": [TOKEN]},
        {"recipe": TOKEN},
        {"method_settings": {"fslora": {"token": WORDS}}},
        {"settings": {"model_init_kwargs": {"token": WORDS}}},
    ],
)
def test_a_slip_in_a_comparison(tmp_path, slip):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "rounds": 1, "methods": ["fslora"]} | slip))
    text = told(lambda: runs_of(parse_comparison(["--config", str(file)])))
    assert TOKEN not in text and WORDS not in text and "Expected" in text


def test_a_comparison_writes_no_token_down(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"hub_token": TOKEN}))
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "rounds": 1}))
    runs = runs_of(parse_comparison(["--config", str(file)]))[1]
    assert TOKEN not in str([run.settings for run in runs])
    assert ComparisonArguments(recipe="recipe.yaml", rounds=1).seeds is None


def test_what_is_written_down_has_no_secret_and_every_other_setting():
    settings = dict(
        output_dir="runs/one",
        use_cpu=True,
        bf16=False,
        hub_token=WORDS,
        eos_token="<|end|>",
        pad_token="<pad>",
        hub_revision="0123456789abcdef0123456789abcdef01234567",
        model_init_kwargs={"token": WORDS, "deep": [{"api_key": WORDS}], "num_tokens": 3},
        dataset_kwargs={"note": f"with {TOKEN}"},
        run_name=TOKEN,
    )
    with pytest.warns(FutureWarning, match="_token` is deprecated"):
        args = FederatedSketchConfig(**settings)
    values = written(args)
    assert TOKEN not in json.dumps(values, default=str) and WORDS not in json.dumps(values, default=str)
    assert (values["eos_token"], values["pad_token"], values["hub_token"]) == ("<|end|>", "<pad>", "<HUB_TOKEN>")
    assert values["model_init_kwargs"] == {"token": "<TOKEN>", "deep": [{"api_key": "<API_KEY>"}], "num_tokens": 3}
    same = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
    for name in same.keys() - {"model_init_kwargs", "dataset_kwargs", "run_name"}:
        assert values[name] == same[name], name


def test_names_of_secrets_and_of_words_of_a_vocabulary():
    for name in (
        "hub_token token HF_TOKEN hubToken accessTokens api_key apiKey OPENAI_API_KEY key secrets client_secret "
        "password db_passwd passphrase hub_tok Authorization credentials hub_tokens"
    ).split():
        assert is_secret_name(name), name
    for name in (
        "pad_token eos_token average_tokens_across_devices num_tokens eval_max_new_tokens tokenizer tokenized_rows "
        "include_num_input_tokens_seen pad_token_id token_type_ids image_token keep keyword hub_model_id num_rounds"
    ).split():
        assert not is_secret_name(name), name


def test_drawn_texts_are_known_by_their_looks_and_others_are_not():
    draw = random.Random(0)
    for _ in range(200):
        drawn = "".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789", k=40))
        for text in (f"{draw.getrandbits(160) | 1 << 159:040x}a0", drawn, f"hf_{drawn[:8]}", f"sk-proj-{drawn}"):
            assert scrub(f"found '{text}': x") == "found '***': x", text
    for text in (
        "/data/3f2b1c4e-aaaa-bbbb-cccc-1234567890ab/rows.json",
        "outputs/Llama3SketchedAdapterForCommonsense",
        f"/cache/models--x/snapshots/{secrets.token_hex(20)}/config.json",
        "meta-llama/Llama-3.2-3B-Instruct",
        "average_tokens_across_devices_and_some_more",
        "checkpoint20240101experiment1234567",
        "hf_hub_download",
        "1" * 50,
    ):
        assert scrub(text) == text
    assert scrub("https://me:pass@host/x") == "https://***@host/x"
    assert scrub(f"Authorization: Bearer {WORDS}-battery") == "Authorization: Bearer ***"


def test_quoted_texts_lose_what_stands_beside_a_secrets_name():
    assert scrub_quoted(f"x --hub_token {WORDS} --pad_token <p> --max_new_tokens 5") == (
        "x --hub_token *** --pad_token <p> --max_new_tokens 5"
    )
    assert scrub_quoted(f"a: 1, hub_token: {WORDS}, 'key': ['{WORDS}'], b: 2") == (
        "a: 1, hub_token: ***, 'key': ***, b: 2"
    )
    assert without_tokens(f"--hub_token {WORDS} --eval_max_new_tokens 5") == (
        "--hub_token $HF_TOKEN --eval_max_new_tokens 5"
    )
    assert scrub_of_the_hub(f"refused {TOKEN}") == "refused ***"


def test_secrets_are_found_by_their_place():
    values = {"a": {"token": "x"}, "num_tokens": 4, "b": [1, {"c": TOKEN}], "hub_token": None, "pad_token": "y"}
    assert [*find_secrets(values)] == ["a.token", "b.c"]
    assert mask(values)["pad_token"] == "y" and mask(values)["hub_token"] is None


def test_a_sentence_tells_only_the_kind_of_a_secret():
    assert sentence("hub_token under cases", "a text", [WORDS], "r") == (
        "Expected hub_token under cases to be a text, found a list: r."
    )
    assert WORDS not in sentence("other", "a number", {"a": [{"password": WORDS}]}, "r")
    assert SettingsError([f"found {TOKEN}"]).problems == ["found ***"]


@pytest.mark.parametrize("script", ["push", "push_results"])
@pytest.mark.parametrize("slip", [["--tokn", WORDS], [f"--tokens={WORDS}"], ["--token", "x", WORDS], ["--x", TOKEN]])
def test_a_slip_on_the_command_line_of_a_push(capsys, script, slip):
    module = importlib.import_module(f"recipes.{script}")
    with pytest.raises(SystemExit):
        module.parse(["runs/one", *(["--repo_id", "a/b"] if script == "push_results" else []), "--y", *slip])
    printed = capsys.readouterr().err
    assert "unrecognized" in printed and TOKEN not in printed and WORDS not in printed


def test_a_list_that_never_ends_is_masked_at_once():
    assert scrub_quoted("token:[" * 20_000) == "token:***"
    assert scrub_quoted("token: [a, b] and more") == "token: *** and more"
