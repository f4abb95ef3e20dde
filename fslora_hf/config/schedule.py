"""The learning rate as a function of the round."""

from collections.abc import Callable

import torch
from transformers import TrainingArguments, get_scheduler


def round_schedule(args: TrainingArguments, num_rounds: int) -> Callable[[int], float]:
    """The factor on `args.learning_rate` in each round: transformers' schedule with its steps, and warm-up, in rounds.

    Every client of a round trains at the same rate, however many steps came before it in the round.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(num_rounds),
        num_training_steps=num_rounds,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    (factor,) = schedule.lr_lambdas
    return factor
