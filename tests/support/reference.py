"""The slow twin: a federated run with plain PEFT and torch.optim, one client at a time.

Written from the published contract (a round's plan, the initial global adapter, the prepared data set) and the papers,
not from the trainer. Every client gets its own copy of the base with an ordinary adapter of rank k, and full logits;
what a method does with products is done with the products themselves, `[out, in]`.

An adapter is `{module name: (A [rank, in], B [out, rank])}`, the name as it was before PEFT wrapped the model.
"""

import copy
import math
from fractions import Fraction

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
Returned = list[tuple[object, Adapter, Adapter]]  # of each client of a round: its plan, what it received, what it held


def replay(
    base, lora_config, start: Adapter, dataset, plans, args, clip_log: list | None = None, bases: list | None = None
) -> list[Adapter]:
    """The global adapter after each of the rounds `plans`, starting from `start`; `base` is left as it is.

    `args` needs what any `TrainingArguments` has, and `method`, `server_optim`, `server_learning_rate`, and
    `upload_top_k`, `error_feedback`. `clip_log`
    collects the gradient norm of every local step as it was before clipping, `bases` the base after each round.
    """
    base, held_back = copy.deepcopy(base), {}
    state = {name: [half.clone().requires_grad_() for half in pair] for name, pair in start.items()}
    server = server_optimizer([half for pair in state.values() for half in pair], args)
    restrict, aggregate = METHODS[args.method]
    after_rounds = []
    for plan in plans:
        now = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in state.items()}
        ground = merged(base, now, global_scale(lora_config)) if args.method.startswith("flora") else base
        returned = []
        for client in plan.clients:
            held = restrict(now, client)
            trained = train_client(ground, lora_config, held, dataset, client, plan.learning_rate, args, clip_log)
            if args.upload_top_k is not None:
                trained = compressed(client, held, trained, held_back.setdefault(client.client_id, {}), args)
            returned.append((client, held, trained))
        if args.method == "flora":
            products = sum_of_products(now, returned)
            whole = {name: (torch.eye(a.shape[1], dtype=a.dtype), products[name]) for name, (a, _) in now.items()}
            base = merged(base, whole, global_scale(lora_config))
        if bases is not None:
            bases.append(base)
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
    products = {
        name: sum(client.weight * trained[name][1] @ trained[name][0] for client, _, trained in returned)
        for name in now
    }
    return best_part(now, products)


def best_part(now: Adapter, products: dict[str, torch.Tensor]) -> Adapter:
    """How the pairs change to become the best part of dense products that has their rank."""
    result = {}
    for name, (a, b) in now.items():
        product = products[name]
        u, s, vh = torch.linalg.svd(product)
        new_a, new_b = a.clone(), torch.zeros_like(b)
        for j in range(min(len(a), len(s))):
            if s[j] > 1e-13 * s[0]:
                sign = vh[j][vh[j].abs().argmax()].sign()
                new_a[j], new_b[:, j] = sign * s[j].sqrt() * vh[j], sign * s[j].sqrt() * u[:, j]
        result[name] = new_a - a, new_b - b
    return result


def new_adapter(pairs, client) -> Adapter:
    """FLoRA: rows of A that the plan draws, and B zero."""
    return {
        name: (torch.from_numpy(client.fresh_rows(name, a.shape[1])).to(a), b.new_zeros(len(b), client.rank))
        for name, (a, b) in pairs.items()
    }


def sum_of_products(now: Adapter, returned: Returned) -> dict[str, torch.Tensor]:
    """FLoRA: `sum_i w_i r/k_i B_i A_i`, `[out, in]`, each client at the scale of a plain adapter of its rank."""
    return {
        name: sum(c.weight * len(a) / c.rank * trained[name][1] @ trained[name][0] for c, _, trained in returned)
        for name, (a, _) in now.items()
    }


def nothing(now: Adapter, returned: Returned) -> Adapter:
    """FLoRA: the global pairs stay, since the base changes."""
    return {name: (torch.zeros_like(a), torch.zeros_like(b)) for name, (a, b) in now.items()}


def residual(now: Adapter, returned: Returned) -> Adapter:
    """FLoRA with a bounded residual: the best part of the old product and the stack."""
    stack = sum_of_products(now, returned)
    return best_part(now, {name: b @ a + stack[name] for name, (a, b) in now.items()})


def merged(base, pairs: Adapter, scale: float):
    """A copy of the base with `scale * B A` added to its weights."""
    base = copy.deepcopy(base)
    for name, (a, b) in pairs.items():
        base.get_submodule(name).weight.data += scale * b @ a
    return base


METHODS = {
    "fslora": (sketched, mean_of_sketches),
    "fedit": (sketched, mean_of_sketches),
    "hetlora": (first_part, mean_by_norm),
    "flexlora": (first_part, mean_product),
    "ffa_lora": (sketched, mean_of_sketches),
    "flora": (new_adapter, nothing),
    "flora_residual": (new_adapter, residual),
}


# ---- Compression ----


def compressed(client, held: Adapter, trained: Adapter, held_back: dict, args) -> Adapter:
    """What the server takes the client to hold: the largest changes are made, the others are not.

    With error feedback `held_back`, single numbers by their place in the global pair, is added first and holds the
    rest afterwards.
    """
    entries = {}  # place in the global pair: (size of the change, module, side, row, column)
    for name in held:
        rows = range(client.rank) if args.method in ("hetlora", "flexlora") else client.sketch(name).tolist()
        for side in (0, 1):
            if args.method == "ffa_lora" and side == 0:
                continue
            change = trained[name][side] - held[name][side]
            for (i, j), value in np.ndenumerate(change.numpy()):
                place = (name, side, rows[i], j) if side == 0 else (name, side, i, rows[j])
                entries[place] = value + held_back.pop(place, 0.0), name, side, i, j
    largest = sorted(entries, key=lambda place: -abs(entries[place][0]))[
        : math.ceil(Fraction(str(args.upload_top_k)) * len(entries))
    ]
    result = {name: tuple(half.clone() for half in pair) for name, pair in held.items()}
    for place in largest:
        value, name, side, i, j = entries.pop(place)
        result[name][side][i, j] += value
    if args.error_feedback:
        held_back.update({place: entry[0] for place, entry in entries.items()})
    return result


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
    """A sketch makes up for the rows it leaves out, and a new adapter has alpha / k; a truncated one keeps the global
    scale."""
    own = method in ("fslora", "flora", "flora_residual")
    return global_scale(lora_config) * (lora_config.r / rank if own else 1.0)


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
