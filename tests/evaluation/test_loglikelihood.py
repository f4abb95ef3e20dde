"""Scoring against a naive twin: every option on its own, one row at a time, all logits, in float64."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fslora_hf.data import completions, load_miniature, options
from fslora_hf.evaluation import held_out_loss, score_rows
from tests.support import tiny

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer(merge: tuple[str, str] | None = None, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a byte, so that any text has tokens and options have ends of several."""
    vocabulary = {token: i for i, token in enumerate(["</s>", *BYTES, *(["".join(merge)] if merge else [])])}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[merge] if merge else []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="</s>", padding_side=padding_side)


def fitted(model: torch.nn.Module) -> torch.nn.Module:
    """The model with a vocabulary for `tokenizer`, and room for rows of bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.resize_token_embeddings(len(BYTES) + 1, mean_resizing=False)
    model.config.max_position_embeddings = 512  # what it computes does not depend on it; what it is asked does
    return model


@pytest.fixture(scope="module")
def model():
    return fitted(tiny.base_model())


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Rows of all tasks in an order that keeps neither tasks nor lengths together."""
    whole = load_miniature("test", rows_per_task=12)
    return whole.select([(i * 35) % len(whole) for i in range(22)])


def naive_log_likelihood(model, tokenizer, prompt: str, completion: str) -> float:
    prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt_ids), len(ids)))


def naive(model, tokenizer, rows) -> list[list[float]]:
    model.eval()
    return [
        [naive_log_likelihood(model, tokenizer, row["prompt"], completion) for completion in completions(row)]
        for row in rows
    ]


def largest_difference(scores, expected) -> float:
    pairs = zip(scores.outcomes, expected, strict=True)
    return max(abs(a - b) for outcome, values in pairs for a, b in zip(outcome.log_likelihoods, values, strict=True))


def test_log_likelihoods_and_choices_are_those_of_the_naive_twin_for_any_batch_size(model, rows):
    expected = naive(model, tokenizer(), rows)
    for batch_size in (1, 3, 8, 100):
        scores = score_rows(model, tokenizer(), rows, batch_size=batch_size)
        assert largest_difference(scores, expected) < 1e-9
        for outcome, row, values in zip(scores.outcomes, rows, expected, strict=True):
            assert outcome.task == row["task"] and outcome.answer == row["answer"]
            assert outcome.options == tuple(options(row))
            assert outcome.choice == options(row)[values.index(max(values))]
            by_character = [v / (len(c) - 1) for v, c in zip(values, completions(row), strict=True)]
            assert outcome.choice_norm == options(row)[by_character.index(max(by_character))]
            assert outcome.correct == (outcome.choice == row["answer"])


def test_an_option_that_begins_another(model):
    row = {"prompt": "how many?\n\nAnswer format: 1/12/123", "completion": " 12", "answer": "12", "task": "counts"}
    scores = score_rows(model, tokenizer(), Dataset.from_list([row, row]))
    assert largest_difference(scores, naive(model, tokenizer(), [row, row])) < 1e-9


def test_accuracy_by_task_is_counted_from_the_outcomes(model, rows):
    scores = score_rows(model, tokenizer(), rows)
    assert list(scores.tasks) == list(dict.fromkeys(rows["task"][:]))
    for task, score in scores.tasks.items():
        right = [outcome.correct for outcome in scores.outcomes if outcome.task == task]
        answers = [row["answer"] for row in rows if row["task"] == task]
        assert score.rows == len(right) == len(answers) and score.invalid == 0
        assert score.accuracy == sum(right) / len(right)
        assert score.standard_error == pytest.approx(math.sqrt(score.accuracy * (1 - score.accuracy) / len(right)))
        assert score.majority_rate == max(map(answers.count, answers)) / len(answers)


def test_a_peft_model_is_scored_with_its_adapter(rows):
    adapted = get_peft_model(fitted(tiny.base_model()), tiny.lora_config(zero_b=False)).double()
    with_adapter = score_rows(adapted, tokenizer(), rows, batch_size=3)
    assert largest_difference(with_adapter, naive(adapted, tokenizer(), rows)) < 1e-9
    with adapted.disable_adapter():
        assert largest_difference(with_adapter, naive(adapted, tokenizer(), rows)) > 1e-3


def test_a_sliding_window_and_capped_logits():
    """Gemma 2 sees 32 tokens back in every other layer and caps its logits; its norms are float32."""
    config = Gemma2Config(
        vocab_size=len(BYTES) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=32,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gemma = Gemma2ForCausalLM(config).eval()
    some = load_miniature("test", ["piqa", "boolq"], rows_per_task=12).select(range(8, 16))
    expected = naive(gemma, tokenizer(), some)
    for batch_size in (1, 8):
        assert largest_difference(score_rows(gemma, tokenizer(), some, batch_size=batch_size), expected) < 1e-3


def test_the_side_on_which_the_tokenizer_pads_does_not_matter(model, rows):
    left, right = (score_rows(model, tokenizer(padding_side=side), rows) for side in ("left", "right"))
    assert left == right


def test_only_scored_positions_are_projected_and_the_prompt_runs_once(model, rows):
    """One pass where the options differ in their last token alone, and a second one over what differs elsewhere."""
    projected, embedded = [], []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, shapes=shapes: shapes.append(output.shape[:2]))
        for module, shapes in ((model.lm_head, projected), (model.get_input_embeddings(), embedded))
    ]
    boolq = next(i for i, row in enumerate(rows) if row["task"] == "boolq")
    assert rows[0]["task"] != "boolq"
    for i, after, second in ((0, " the correct answer is answer", []), (boolq, " the correct answer is ", [(2, 4)])):
        score_rows(model, tokenizer(), rows.select([i]), batch_size=1)
        assert embedded == [(1, len((rows[i]["prompt"] + after).encode())), *second]
        assert projected == [(1, 1 + len(after)), *second]
        embedded.clear(), projected.clear()
    for hook in hooks:
        hook.remove()


def test_equally_likely_options_give_the_first(rows):
    flat = fitted(tiny.base_model())
    flat.lm_head.weight.data.zero_()
    same_length = rows.filter(lambda row: row["task"] != "boolq")
    scores = score_rows(flat, tokenizer(), same_length)
    assert {outcome.choice for outcome in scores.outcomes} == {"answer1", "ending1", "solution1", "option1"}


def test_a_log_likelihood_that_is_no_number_counts_as_wrong_and_is_reported(rows, caplog):
    broken = fitted(tiny.base_model())
    broken.get_input_embeddings().weight.data[tokenizer()("Q")["input_ids"]] = math.nan
    some = rows.select(range(6))
    marked = some.map(lambda row, i: {"prompt": ("Q" if i in (1, 4) else "") + row["prompt"]}, with_indices=True)
    assert not any("Q" in prompt for prompt in some["prompt"])
    scores, whole = (score_rows(broken, tokenizer(), rows, batch_size=3) for rows in (marked, some))
    for i, (outcome, sound) in enumerate(zip(scores.outcomes, whole.outcomes, strict=True)):
        if i in (1, 4):
            assert outcome.choice is None and not outcome.correct and math.isnan(outcome.log_likelihoods[0])
        else:
            assert outcome.choice == sound.choice is not None
    assert sum(score.invalid for score in scores.tasks.values()) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "In 2 of 6 questions the model computed something that is not a number; they count as wrong."
    ]


def test_held_out_loss_is_the_mean_over_completion_tokens(model, rows):
    tokens = [len(tokenizer()(row["completion"] + "</s>")["input_ids"]) for row in rows]
    losses = [-naive_log_likelihood(model, tokenizer(), row["prompt"], row["completion"] + "</s>") for row in rows]
    for batch_size in (1, 3, 8):
        found = held_out_loss(model, tokenizer(), rows, batch_size)
        assert abs(found.overall - sum(losses) / sum(tokens)) < 1e-9 and found.tokens == sum(tokens)
        for task, value in found.tasks.items():
            own = [i for i, row in enumerate(rows) if row["task"] == task]
            assert abs(value - sum(losses[i] for i in own) / sum(tokens[i] for i in own)) < 1e-9
    assert held_out_loss(model, tokenizer(), rows.remove_columns(["task", "answer"])).tasks == {}


def test_held_out_loss_is_what_training_minimises(rows, tmp_path):
    """SFTTrainer's evaluation of the same rows in one batch, prepared by TRL."""
    single = fitted(tiny.base_model(torch.float32))
    expected = held_out_loss(single, tokenizer(), rows).overall
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=len(rows))
    trainer = SFTTrainer(single, args, eval_dataset=rows, train_dataset=rows, processing_class=tokenizer())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(rows, training):
    adapted = get_peft_model(fitted(tiny.base_model()), tiny.lora_config(dropout=0.5, zero_b=False)).train(training)
    first, second = (score_rows(adapted, tokenizer(), rows.select(range(4))) for _ in range(2))
    assert first == second  # dropout was off
    assert all(module.training == training for module in adapted.modules())
    adapted(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()


def test_a_tokenizer_that_merges_across_the_prompts_end(model, rows):
    merging = tokenizer(merge=(":", "Ġ"))
    with pytest.raises(ValueError, match=r"^Expected a prompt with tokens that stay .* in row 0 \(from 0\): end the"):
        score_rows(model, merging, rows)
    with pytest.raises(ValueError, match="^Expected a prompt with tokens, found none in row 0"):
        held_out_loss(model, tokenizer(), rows.map(lambda row: {"prompt": ""}))


def test_rows_that_are_too_long(model, rows):
    lengths = [max(len((row["prompt"] + text).encode()) for text in completions(row)) for row in rows]
    longest = lengths.index(max(lengths))
    score_rows(model, tokenizer(), rows.select([longest]), max_length=max(lengths))
    message = f"^Expected rows of at most {max(lengths) - 1} tokens, found {max(lengths)} in row {longest} "
    with pytest.raises(ValueError, match=message):
        score_rows(model, tokenizer(), rows, max_length=max(lengths) - 1)


def test_what_cannot_be_scored(model, rows):
    for unfit in (rows.select([]), rows.remove_columns("task")):
        with pytest.raises(ValueError, match="^Expected a dataset with rows and the columns prompt, .*found"):
            score_rows(model, tokenizer(), unfit)
    with pytest.raises(ValueError, match="^Expected a dataset with rows"):
        held_out_loss(model, tokenizer(), rows.select([]))
    with pytest.raises(ValueError, match="^Expected an answer that is one of .*, found answer 'none'"):
        score_rows(model, tokenizer(), rows.map(lambda row: {"answer": "none"}))
    with pytest.raises(ValueError, match="^Expected a batch size of at least 1, found 0: ask"):
        score_rows(model, tokenizer(), rows, batch_size=0)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_folding_adapters_in_changes_neither_scores_nor_any_bit_of_the_model(rows, fan_in_fan_out):
    """With a Llama's linear layers and with GPT-2's, which hold their weights transposed."""
    base = fitted(tiny.base_model()) if not fan_in_fan_out else gpt2()
    targets = ["c_attn", "c_proj"] if fan_in_fan_out else tiny.TARGETS
    model = get_peft_model(base, LoraConfig(r=3, init_lora_weights=False, target_modules=targets)).double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = score_rows(model, tokenizer(), rows, batch_size=5)
    seen = []
    hook = (
        model.get_base_model()
        .get_input_embeddings()
        .register_forward_hook(
            lambda *_: seen.append(next(m for m in model.modules() if isinstance(m, LoraLayer)).disable_adapters)
        )
    )
    folded = score_rows(model, tokenizer(), rows, batch_size=5, merge=True)
    hook.remove()
    assert all(seen) and seen  # the adapters' own products were not computed
    assert largest_difference(folded, [outcome.log_likelihoods for outcome in plain.outcomes]) < 1e-9
    with model.disable_adapter():
        without = score_rows(model, tokenizer(), rows, batch_size=5)
    assert largest_difference(folded, [outcome.log_likelihoods for outcome in without.outcomes]) > 1e-3
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert score_rows(model, tokenizer(), rows, batch_size=5) == plain


def test_half_precision_is_not_folded(rows):
    model = get_peft_model(fitted(tiny.base_model(torch.bfloat16)), tiny.lora_config(zero_b=False))
    plain, asked = (score_rows(model, tokenizer(), rows.select(range(4)), merge=merge) for merge in (False, True))
    assert asked == plain


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=len(BYTES) + 1, n_positions=512, n_embd=16, n_layer=2, n_head=2, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return GPT2LMHeadModel(config)


def test_the_beginning_that_questions_share_runs_once(model, rows):
    """Of a batch of one task: its prefix alone, then each question's rest; and the same numbers as one by one."""
    some = rows.filter(lambda row: row["task"] == "piqa")
    assert len(some) >= 2
    embedded = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, i, output: embedded.append(output.shape[:2]))
    scores = score_rows(model, tokenizer(), some, batch_size=8)
    hook.remove()
    begin = len("### Instruction:\nPlease choose the correct solution to the question: ")
    assert embedded[0][0] == 1 and embedded[0][1] >= begin and embedded[1][0] == len(some)
    longest = max(len((row["prompt"] + " the correct answer is solution").encode()) for row in some)
    assert embedded[0][1] + embedded[1][1] == longest
    assert largest_difference(scores, naive(model, tokenizer(), some)) < 1e-9
