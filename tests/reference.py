"""The slow twin: a federated run with plain PEFT and torch.optim, one client at a time.

Written from the published contract (a round's plan, the initial global adapter, the prepared data set) and the papers,
not from the trainer. Every client gets its own copy of the base with an ordinary adapter of rank k, and full logits;
what a method does with products is done with the products themselves, `[out, in]`.

An adapter is `{module name: (A [rank, in], B [out, rank])}`, the name as it was before PEFT wrapped the model.
"""

import copy
import math

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
Returned = list[tuple[object, Adapter, Adapter]]  # of each client of a round: its plan, what it received, what it held


def replay(base, lora_config, start: Adapter, dataset, plans, args, clip_log: list | None = None) -> list[Adapter]:
    """The global adapter after each of the rounds `plans`, starting from `start`; `base` is left as it is.

    `args` needs what any `TrainingArguments` has, and `method`, `server_optim`, `server_learning_rate`. `clip_log`
    collects the gradient norm of every local step as it was before clipping.
    """
    state = {name: [half.clone().requires_grad_() for half in pair] for name, pair in start.items()}
    server = server_optimizer([half for pair in state.values() for half in pair], args)
    restrict, aggregate = METHODS[args.method]
    after_rounds = []
    for plan in plans:
        now = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in state.items()}
        returned = []
        for client in plan.clients:
            held = restrict(now, client)
            trained = train_client(base, lora_config, held, dataset, client, plan.learning_rate, args, clip_log)
            returned.append((client, held, trained))
        changes = aggregate(now, returned)
        for name, pair in state.items():
            for half, change in zip(pair, changes[name], strict=True):
                half.grad = -change
        server.step()
        after_rounds.append({name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in state.items()})
    return after_rounds


# ---- Methods: what a client receives of the global pairs, and how the global pairs change by what clients return ----


def sketched(pairs, client) -> Adapter:
    """The client's rows and columns of every pair."""
    chosen = {name: torch.as_tensor(client.sketch(name)) for name in pairs}
    return {name: (a[chosen[name]], b[:, chosen[name]]) for name, (a, b) in pairs.items()}


def mean_of_sketches(now: Adapter, returned: Returned) -> Adapter:
    average = {name: (torch.zeros_like(a), torch.zeros_like(b)) for name, (a, b) in now.items()}
    for client, held, trained in returned:
        for name, (a, b) in average.items():
            i = torch.as_tensor(client.sketch(name))
            a[i] += client.weight * (trained[name][0] - held[name][0])
            b[:, i] += client.weight * (trained[name][1] - held[name][1])
    return average


def first_part(pairs, client) -> Adapter:
    return {name: (a[: client.rank], b[:, : client.rank]) for name, (a, b) in pairs.items()}


def mean_by_norm(now: Adapter, returned: Returned) -> Adapter:
    """HetLoRA: padded with zeros up to the largest rank of the round, weighted by the norm of all products."""
    norms = [torch.cat([(b @ a).flatten() for a, b in trained.values()]).norm() for _, _, trained in returned]
    parts = torch.stack([client.weight * n for (client, _, _), n in zip(returned, norms, strict=True)])
    parts, result = parts / parts.sum(), {}
    for name, (a, b) in now.items():
        new_a, new_b, most = a.clone(), b.clone(), max(client.rank for client, _, _ in returned)
        new_a[:most], new_b[:, :most] = 0.0, 0.0
        for part, (client, _, trained) in zip(parts, returned, strict=True):
            new_a[: client.rank] += part * trained[name][0]
            new_b[:, : client.rank] += part * trained[name][1]
        result[name] = new_a - a, new_b - b
    return result


def mean_product(now: Adapter, returned: Returned) -> Adapter:
    """FlexLoRA: singular values of the dense average; where they are zero, A keeps its rows and B has none."""
    result = {}
    for name, (a, b) in now.items():
        product = sum(client.weight * trained[name][1] @ trained[name][0] for client, _, trained in returned)
        u, s, vh = torch.linalg.svd(product)
        new_a, new_b = a.clone(), torch.zeros_like(b)
        for j in range(min(len(a), len(s))):
            if s[j] > 1e-13 * s[0]:
                sign = vh[j][vh[j].abs().argmax()].sign()
                new_a[j], new_b[:, j] = sign * s[j].sqrt() * vh[j], sign * s[j].sqrt() * u[:, j]
        result[name] = new_a - a, new_b - b
    return result


METHODS = {
    "fslora": (sketched, mean_of_sketches),
    "fedit": (sketched, mean_of_sketches),
    "hetlora": (first_part, mean_by_norm),
    "flexlora": (first_part, mean_product),
    "ffa_lora": (sketched, mean_of_sketches),
}


# ---- One client ----


def train_client(base, lora_config, held: Adapter, dataset, client, learning_rate, args, clip_log=None) -> Adapter:
    """What a client holds after its local steps: an ordinary adapter of rank k, an ordinary optimizer.

    `client.example_ids` is `[local_steps, per_device_train_batch_size * gradient_accumulation_steps]`.
    """
    rank = len(next(iter(held.values()))[0])
    model = rank_k_model(base, lora_config, held, rank, client_scale(lora_config, args.method, rank))
    if args.method == "ffa_lora":
        for _, layer in lora_layers(model):
            layer.lora_A["default"].weight.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = client_optimizer(parameters, learning_rate, args)
    for step in client.example_ids.tolist():
        scored = sum(label != -100 for row in step for label in dataset[row]["labels"][1:])
        for i in range(0, len(step), args.per_device_train_batch_size):
            rows = [dataset[row] for row in step[i : i + args.per_device_train_batch_size]]
            (summed_loss(model, rows) / scored).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        if clip_log is not None:
            clip_log.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return read_adapter(model)


def global_scale(lora_config) -> float:
    """The LoRA scale of the global adapter, alpha / r or alpha / sqrt(r)."""
    return lora_config.lora_alpha / (math.sqrt(lora_config.r) if lora_config.use_rslora else lora_config.r)


def client_scale(lora_config, method: str, rank: int) -> float:
    """A sketch makes up for the rows it leaves out; a truncated adapter keeps the global scale."""
    return global_scale(lora_config) * (lora_config.r / rank if method == "fslora" else 1.0)


def rank_k_model(base, lora_config, held: Adapter, rank: int, scale: float | None = None):
    """A copy of the base with `held` as a plain adapter of rank k, whose scale is that of a sketch unless given."""
    scale = client_scale(lora_config, "fslora", rank) if scale is None else scale
    config = LoraConfig(
        r=rank, lora_alpha=scale * rank, target_modules=lora_config.target_modules, task_type="CAUSAL_LM"
    )  # PEFT divides alpha by k
    model = get_peft_model(copy.deepcopy(base), config)
    write_adapter(model, held)
    return model.train()


def summed_loss(model, rows) -> torch.Tensor:
    """Negative log-likelihood summed over the scored tokens, from the full logits of the padded batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    padding = [longest - len(row["input_ids"]) for row in rows]
    ids = torch.tensor([row["input_ids"] + [0] * n for row, n in zip(rows, padding, strict=True)])
    mask = torch.tensor([[1] * (longest - n) + [0] * n for n in padding])
    labels = torch.tensor([row["labels"] + [-100] * n for row, n in zip(rows, padding, strict=True)])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def client_optimizer(parameters, learning_rate, args) -> torch.optim.Optimizer:
    if args.optim == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=args.weight_decay)
    assert args.optim.startswith("adamw_torch"), args.optim
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay
    )


def server_optimizer(parameters, args) -> torch.optim.Optimizer:
    """Its gradient is the negative average change; `sgd` at rate 1 is plain averaging."""
    rate = args.server_learning_rate
    if args.server_optim in ("sgd", "sgd_momentum"):
        momentum = 0.9 if args.server_optim == "sgd_momentum" else 0.0
        return torch.optim.SGD(parameters, lr=1.0 if rate is None else rate, momentum=momentum)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.server_optim]
    return kind(parameters, lr=1e-3 if rate is None else rate, weight_decay=0.0)


def read_adapter(model, name: str = "default") -> Adapter:
    """A copy of the adapter `name` of a PEFT model."""
    return {
        module: (layer.lora_A[name].weight.detach().clone(), layer.lora_B[name].weight.detach().clone())
        for module, layer in lora_layers(model)
    }


@torch.no_grad()
def write_adapter(model, pairs: Adapter, name: str = "default") -> None:
    """Puts `pairs` into the adapter `name` of a PEFT model, every module and nothing else."""
    layers = dict(lora_layers(model))
    assert layers.keys() == pairs.keys()
    for module, (a, b) in pairs.items():
        layers[module].lora_A[name].weight.copy_(a)
        layers[module].lora_B[name].weight.copy_(b)


def lora_layers(model):
    prefix = "base_model.model."
    return [(n.removeprefix(prefix), layer) for n, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def max_difference(left: Adapter, right: Adapter) -> float:
    """The largest absolute difference of any entry; infinite if one of them is not finite."""
    assert left.keys() == right.keys()
    gaps = [(x - y).abs().max() for n in left for x, y in zip(left[n], right[n], strict=True)]
    return torch.stack(gaps).nan_to_num(nan=math.inf).max().item()
