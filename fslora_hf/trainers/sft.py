"""`FederatedSketchTrainer`: a whole federated run of supervised fine-tuning as one `Trainer.train()`."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer
from trl.trainer.utils import global_then_local_main_first

from ..config.federation import FederatedSketchConfig
from ..data.rows import drop_unscored, fit_rows
from ..data.tokens import tokenise_texts
from ..evaluation.round_scores import RoundScorer
from ..models.adapter_checks import check_layers
from ..models.joined_rows import StepCost, keeps_rows_apart
from ..models.scored_head import add_scored_head
from ..models.targets import unmatched_targets_told
from ..updates.part import UpdatePart
from .chat_template import borrowed_template, end_turns_alike
from .checks import check_columns, raise_together
from .federated import FederatedTrainer
from .token_metrics import TokenMetrics


class FederatedSketchTrainer(FederatedTrainer, SFTTrainer):
    """TRL's SFTTrainer for federated LoRA over clients of different ranks.

    One call of `train()` runs all rounds. In each, a cohort of clients trains sketches of the global adapter, which is
    the ordinary PEFT adapter `default`; at the round's end their changes are folded into it. `default` holds the
    global adapter whenever a round is over. The Trainer's epoch is the round.

    Args:
        model, args, ...: as SFTTrainer's, with a `FederatedSketchConfig`.
        train_dataset: one `datasets.Dataset` with an integer column, `args.client_id_column`, that says whose each row
            is. Ids may be sparse.
        peft_config: a plain `LoraConfig` with the global rank, unless `model` has such an adapter already.
        callbacks: as usual; a `RoundCallback` among them takes the built-in's place.
        update_transforms: what else happens to clients' updates, after all that is built in: instances of
            `fslora_hf.updates.part.UpdatePart`, which says when each of its places runs, and on which shapes.

    Raises:
        ValueError: lists everything that is wrong with the arguments, before the model is loaded where possible.
    """

    _tag_names = ["trl", "sft", "fslora_hf"]
    _name = "Federated sketching LoRA"
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step
    measured_metrics = ("loss", "entropy", "mean_token_accuracy")
    asked_metrics = ("accuracy", "format_validity")
    _forward_options = {"use_cache": False}

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: FederatedSketchConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable | None = None,
        update_transforms: Sequence[UpdatePart] = (),
    ):
        args = FederatedSketchConfig() if args is None else args
        given = {
            "model": model,
            "args": args,
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
            "quantization_config": quantization_config,
            "peft_config": copy.deepcopy(peft_config),  # into which PEFT writes the targets that it makes of names
            "formatting_func": formatting_func,
        }
        self._take_own_parts(update_transforms)
        unsupported = {
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "compute_loss_func": compute_loss_func,
        }
        lora = model.peft_config.get("default") if isinstance(model, PeftModel) else peft_config
        columns = check_columns(args, train_dataset, formatting_func, eval_dataset)
        self._before_loading(given, lora, unsupported, columns)
        with unmatched_targets_told(model), borrowed_template(args, model, processing_class) as tokenizer:
            super().__init__(**given, processing_class=tokenizer)
        raise_together(check_layers(self.model, self.aux_loss_enabled, args.method))
        self.train_dataset = drop_unscored(self.train_dataset, "train")  # also of rows that were not prepared here
        self._after_loading()
        self._token_metrics = TokenMetrics(partial(self.accelerator.reduce, reduction="sum"), args.device)
        self._scorer, self._asked = RoundScorer(args, eval_dataset, self.model, self.processing_class), None

    def prepare(self, base: PreTrainedModel) -> None:
        end_turns_alike(self.args, base, self._tokenizer)
        add_scored_head(base)
        # NEFTune's noise is measured by the length of sequences, and a subclass's loss reads them.
        joins = self.args.neftune_noise_alpha is None and not self._own_loss and keeps_rows_apart(base)
        self._joining = StepCost.of(base) if joins else None

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        # TRL's truncation cuts answers and drops what it emptied without a word, so it is given no length to cut to.
        uncut = copy.copy(args)
        uncut.max_length = None
        with global_then_local_main_first():
            if formatting_func is None and not args.assistant_only_loss:
                texts = args.dataset_text_field, self.completion_only_loss
                dataset = tokenise_texts(dataset, processing_class, *texts, dataset_name, args.dataset_num_proc)
        dataset = super()._prepare_dataset(dataset, processing_class, uncut, packing, formatting_func, dataset_name)
        with global_then_local_main_first():
            bos = self._tokenizer.bos_token_id
            return fit_rows(dataset, dataset_name, args.max_length, args.overlong_prompts, bos)

    # ---- Losses of clients ----

    def scored(self, batches):
        """Tokens that each client is scored on, over its micro-batches."""
        counts = [(b["labels"][:, 1:] != -100).sum(1).view(int(b["clients"]), -1).sum(1) for b in batches]
        return sum(counts)

    def client_losses(self, model, inputs, clients, scored):
        outputs = model(**inputs, **self._forward_options, fused_lm_head=True)
        if not self._step_borrowed:
            self._token_metrics.add(outputs, self._step_tokens)
        token_losses = -outputs.log_probs  # zero where nothing is scored
        if self.args.loss_type == "dft":
            token_losses = token_losses * outputs.log_probs.exp().detach()
        return token_losses.view(clients, -1).sum(1) / scored

    def trial_loss(self, inputs):
        with self.accelerator.autocast():
            log_probs = self.model(**inputs, **self._forward_options, fused_lm_head=True).log_probs
        return log_probs.sum()

    # ---- What is told of tokens ----

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._tell_tokens(self._metrics["train"])
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _tell_tokens(self, metrics: dict[str, Any]) -> None:
        self._token_metrics.tell(metrics)
        self._total_train_tokens += self._token_metrics.count()
        metrics["num_tokens"] = [self._total_train_tokens]

    def log(self, logs, start_time=None):
        # The run's last log tells of the steps since the one before, also if an evaluation came in between.
        if "train_runtime" in logs and self.state.global_step > self._globalstep_last_logged:
            counted: dict[str, Any] = {}
            self._tell_tokens(counted)
            logs.update({name: value for name, (value,) in counted.items()})
        super().log(logs, start_time)

    # ---- Scores at round ends ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        # Of several evaluation sets, the Trainer calls this again with the name of each. Rows that are handed in here
        # are scored for nothing but their loss.
        named = isinstance(self.eval_dataset, dict)
        self._asked = eval_dataset if named and isinstance(eval_dataset, str) else None
        if eval_dataset is None and not named:
            self._asked = ""
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._asked = None

    def evaluation_loop(self, *args, **kwargs):
        # In evaluation mode the layers compute with the global adapter, whatever clients are in the stack.
        self._total_train_tokens += self._token_metrics.count()  # which TRL logs with what is evaluated
        output = super().evaluation_loop(*args, **kwargs)
        if self._asked in self._scorer.rows:
            prefix, round = kwargs.get("metric_key_prefix", "eval"), self.rounds_done if self.in_run else None
            output.metrics.update(
                self._scorer.score(self.model, self.processing_class, self._asked, prefix=prefix, round=round)
            )
        return output
