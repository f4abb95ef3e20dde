"""Stacked client adapters compute, clip and train as separate plain PEFT adapters would."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fslora_hf.methods import ClientAdapter
from fslora_hf.models.adapter import global_pair, lora_layers, save_client_adapter, widen_adapter
from fslora_hf.models.stack import ClientStack
from tests.support import reference, tiny

R, RANKS = 6, [1, 3, 4]
LENGTH = 5


def make_model(**lora) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(tiny.base_model(), tiny.lora_config(R, **{"zero_b": False, **lora}))


def make_adapters(model, ranks=RANKS) -> list[ClientAdapter]:
    """Random adapters of the given ranks, each with the scale r / k."""
    generator = torch.Generator().manual_seed(0)
    adapters = []
    for k in ranks:
        A, B = (
            {
                name: torch.randn(
                    *((k, tensor.shape[1]) if side == "A" else (tensor.shape[0], k)),
                    generator=generator,
                    dtype=torch.float64,
                )
                for name, tensor in tensors.items()
            }
            for side, tensors in zip("AB", global_pair(model), strict=True)
        )
        adapters.append(ClientAdapter(A, B, R / k))
    return adapters


def make_ids(clients: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 32, (clients * rows, LENGTH), generator=torch.Generator().manual_seed(1))


def plain_model(model, adapter: ClientAdapter, config) -> PeftModel:
    """The base with the client's adapter as an ordinary one of rank k."""
    base = copy.deepcopy(model).unload()
    held = {name: (adapter.A[name], adapter.B[name]) for name in adapter.A}
    return reference.rank_k_model(base, config, held, len(next(iter(adapter.A.values()))))


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.square().mean() + logits.logsumexp(-1).mean()


def client_loss(logits: torch.Tensor, clients: int) -> torch.Tensor:
    return sum(loss_of(part) for part in logits.chunk(clients))


@pytest.fixture(params=[False, True], ids=["", "rsLoRA"])
def stacked(request):
    """A model with three clients of unequal rank in a stack of four slots, and what they hold."""
    model = make_model(rslora=request.param)
    adapters = make_adapters(model)
    stack = ClientStack(model, 4, 5)
    stack.attach()
    stack.load(adapters)
    ids = make_ids(len(adapters))
    with stack.at_work(ids.numel()):
        yield model, stack, adapters, ids


def test_forward_and_gradients_equal_separate_plain_adapters(stacked):
    model, stack, adapters, ids = stacked
    logits = model(input_ids=ids).logits
    client_loss(logits, 3).backward()
    for slot, (adapter, rows) in enumerate(zip(adapters, ids.chunk(3), strict=True)):
        plain = plain_model(model, adapter, model.peft_config["default"])
        expected = plain(input_ids=rows).logits
        torch.testing.assert_close(logits.chunk(3)[slot], expected, rtol=0, atol=1e-12)
        loss_of(expected).backward()
        rank = RANKS[slot]
        layers = lora_layers(model)
        for name, layer in reference.lora_layers(plain):
            ours_A, ours_B = layers[name].client_A.grad[slot, :rank], layers[name].client_B.grad[slot, :, :rank]
            torch.testing.assert_close(ours_A, layer.lora_A["default"].weight.grad, rtol=0, atol=1e-12)
            torch.testing.assert_close(ours_B, layer.lora_B["default"].weight.grad, rtol=0, atol=1e-12)
            assert ours_A.abs().max() > 1e-6 and ours_B.abs().max() > 1e-6


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_rows_beyond_a_clients_rank_stay_zero(stacked, optimizer):
    model, stack, adapters, ids = stacked
    local = optimizer(stack.parameters(), lr=0.1)
    for _ in range(3):
        client_loss(model(input_ids=ids).logits, 3).backward()
        for layer in lora_layers(model).values():
            for slot, rank in enumerate(RANKS):
                assert (layer.client_A.grad[slot, rank:] == 0).all()
                assert (layer.client_B.grad[slot, :, rank:] == 0).all()
        local.step()
        local.zero_grad()
    for layer in lora_layers(model).values():
        for slot, rank in enumerate(RANKS):
            assert (layer.client_A[slot, rank:] == 0).all() and (layer.client_B[slot, :, rank:] == 0).all()
    for slot, adapter in enumerate(adapters):
        A, B = stack.change(slot)
        for name in A:
            assert A[name].shape == adapter.A[name].shape and B[name].shape == adapter.B[name].shape
            assert A[name].abs().min() > 0 and B[name].abs().min() > 0


def test_a_block_takes_no_more_than_its_clients_and_its_largest_rank(stacked):
    """One client of rank 1 after three up to rank 5, and the three again: the same parameters in the same memory."""
    model, stack, adapters, ids = stacked
    parameters, places = stack.parameters(), [p.data_ptr() for p in stack.parameters()]
    before = stack.current(0), stack.current(2)
    client_loss(model(input_ids=ids).logits, 3).backward()
    small = min(adapters, key=lambda adapter: next(iter(adapter.A.values())).shape[0])
    for block in ([small], adapters):
        stack.load(block)
        rank = max(next(iter(adapter.A.values())).shape[0] for adapter in block)
        for parameter in stack.parameters()[::2]:
            assert parameter.shape[:2] == (len(block), rank) and parameter.grad is None
        for parameter in stack.parameters()[1::2]:
            assert (parameter.shape[0], parameter.shape[2]) == (len(block), rank) and parameter.grad is None
        for name, layer in lora_layers(model).items():
            assert torch.equal(layer.client_A[0, : block[0].A[name].shape[0]], block[0].A[name])
        rows = ids[: 2 * len(block)] if block is adapters else ids.chunk(3)[0]
        with stack.at_work(rows.numel()):
            client_loss(model(input_ids=rows).logits, len(block)).backward()
        assert all(p.grad.shape == p.shape and p.grad.abs().sum() > 0 for p in stack.parameters())
    assert all(a is b for a, b in zip(parameters, stack.parameters(), strict=True))
    assert places == [p.data_ptr() for p in stack.parameters()]
    after = stack.current(0), stack.current(2)
    assert all(torch.equal(a.B[name], b.B[name]) for a, b in zip(before, after, strict=True) for name in a.B)


@pytest.mark.parametrize("kept", ["loss", "outputs"])
def test_what_is_kept_over_a_hand_over_breaks_no_backward(stacked, kept):
    """Blocks of another shape, while someone holds the graph of the last one; and that graph is of no more use."""
    model, stack, adapters, ids = stacked
    hooked = []
    for number, parameter in enumerate(stack.parameters()):
        parameter.register_hook(lambda gradient, number=number: hooked.append(number))
    held = []
    for first, last in (
        (0, 3),
        (0, 1),
        (1, 3),
        (0, 1),
        (0, 3),
    ):  # of rank 1, too: a sum over wider ones is not refused
        stack.load(adapters[first:last])
        rows = ids[2 * first : 2 * last]
        with stack.at_work(rows.numel()):
            logits = model(input_ids=rows).logits
            loss = client_loss(logits, last - first)
            loss.backward(retain_graph=True)
        assert all(p.grad.shape == p.shape and p.grad.abs().sum() > 0 for p in stack.parameters())
        held.append(loss if kept == "loss" else logits)
    assert len(hooked) == 5 * len(stack.parameters())
    twin = make_model(rslora=model.peft_config["default"].use_rslora)
    fresh = ClientStack(twin, 4, 5)
    fresh.attach()
    fresh.load(adapters)
    with fresh.at_work(ids.numel()):
        client_loss(twin(input_ids=ids).logits, 3).backward()
    for parameter, expected in zip(stack.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)
    before = [parameter.grad.clone() for parameter in stack.parameters()]
    for old in held[:-1]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            old.sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(stack.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_loss_kept_breaks_no_backward_in_any_type(dtype):
    """Of rank 1, whose graph would take a wider block's gradients for its own, summed."""
    model = make_model().to(dtype)
    stack, ids = ClientStack(model, 3, 4), make_ids(3)
    stack.attach()
    kept = []
    for adapter in make_adapters(model)[:2]:
        stack.load([adapter])
        with stack.at_work(ids[:2].numel()):
            kept.append(loss_of(model(input_ids=ids[:2]).logits))
        kept[-1].backward()
        assert all(p.grad.shape == p.shape and p.dtype == dtype for p in stack.parameters())


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e6])
def test_each_client_is_clipped_as_if_alone(stacked, max_norm):
    """Client 1's gradients are a thousand times the others', which a joint norm would crush."""
    model, stack, adapters, ids = stacked
    parts = [loss_of(part) for part in model(input_ids=ids).logits.chunk(3)]
    (parts[0] + 1000 * parts[1] + parts[2]).backward()
    alone = [[p.grad[slot].clone().requires_grad_() for p in stack.parameters()] for slot in range(3)]
    expected_norms = []
    for gradients in alone:
        for gradient in gradients:
            gradient.grad = gradient.detach().clone()
        expected_norms.append(nn.utils.clip_grad_norm_(gradients, max_norm or float("inf")))
    norms = stack.clip_gradients(max_norm)
    torch.testing.assert_close(norms, torch.stack(expected_norms), rtol=1e-13, atol=0)
    assert norms[1] > 100 * norms[0]
    for slot, gradients in enumerate(alone):
        for parameter, gradient in zip(stack.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad[slot], gradient.grad, rtol=1e-12, atol=0)


def test_one_client_with_nan_does_not_touch_the_others(stacked):
    model, stack, adapters, ids = stacked
    client_loss(model(input_ids=ids).logits, 3).backward()
    stack.clip_gradients(0.1)
    clean = [parameter.grad.clone() for parameter in stack.parameters()]
    for parameter in stack.parameters():
        parameter.grad = None
    next(iter(lora_layers(model).values())).client_A.data[1, 0, 0] = float("nan")
    client_loss(model(input_ids=ids).logits, 3).backward()
    norms = stack.clip_gradients(0.1)
    assert norms.isnan().tolist() == [False, True, False]
    for parameter, expected in zip(stack.parameters(), clean, strict=True):
        assert torch.equal(parameter.grad[[0, 2]], expected[[0, 2]])
    stack.load(adapters[:1])  # and is gone with the next hand-over
    assert all(parameter.isfinite().all() for parameter in stack.parameters())


def test_change_and_current_are_copies(stacked):
    model, stack, adapters, ids = stacked
    assert all((tensor == 0).all() for side in stack.change(2) for tensor in side.values())
    before = stack.current(2)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter[2] += 1.0
    for name, tensor in stack.change(2)[0].items():
        torch.testing.assert_close(tensor, torch.ones_like(tensor))
        assert torch.equal(before.A[name], adapters[2].A[name])
    assert stack.current(2).scale == adapters[2].scale


def test_evaluation_unload_and_detach_compute_with_the_global_adapter(stacked):
    model, stack, adapters, ids = stacked
    twin = make_model(rslora=model.peft_config["default"].use_rslora)
    with torch.no_grad():
        expected, with_clients = twin(input_ids=ids).logits, model(input_ids=ids).logits
        fewer = twin(input_ids=ids[:3]).logits  # which some CPUs sum in another order
        assert not torch.equal(with_clients, expected)
        model.eval()
        assert torch.equal(model(input_ids=ids[:3]).logits, fewer)  # any number of tokens
        model.train()
        assert torch.equal(model(input_ids=ids).logits, with_clients)
        stack.unload()
        assert torch.equal(model(input_ids=ids).logits, expected)
        stack.load(adapters)
        stack.detach()
        assert torch.equal(model(input_ids=ids).logits, expected)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {name for name, parameter in twin.named_parameters() if parameter.requires_grad} != set()
    assert model.state_dict().keys() == twin.state_dict().keys()
    stack.detach()  # twice does no harm


def test_attached_only_the_clients_are_trainable(stacked):
    model, stack, adapters, ids = stacked
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in stack.parameters()}


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_safe", "merge_and_unload", "unmerge"])
def test_merging_an_active_client_is_an_error(stacked, merge):
    model, stack, adapters, ids = stacked
    message = "Expected the global adapter, found client adapters in the model: merge after training"
    with pytest.raises(RuntimeError, match=message):
        if merge == "merge_safe":
            model.merge_adapter(safe_merge=True)
        elif merge == "unmerge":
            stack.unload()
            model.merge_adapter()
            stack.load(adapters)
            model.unmerge_adapter()
        else:
            getattr(model, merge)()
    if merge != "unmerge":
        stack.unload()
        model.merge_adapter()


def test_a_routed_layer_is_an_error(stacked):
    """A layer that sees other tokens than the batch's, as experts do, cannot tell whose they are."""
    model, stack, adapters, ids = stacked
    message = r"\(31 tokens\) in a targeted layer while 3 clients share a step, found 30: set per_device_train_clients"
    with stack.at_work(ids.numel() + 1), pytest.raises(RuntimeError, match=message):
        model(input_ids=ids)


def test_widen_adapter_holds_the_global_pair_in_at_least_float32():
    for given, held in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        model = make_model()
        for tensors in global_pair(model):
            for parameter in tensors.values():
                parameter.data = parameter.data.to(given)
        widen_adapter(model)
        assert {p.dtype for tensors in global_pair(model) for p in tensors.values()} == {held}
    assert all(p.dtype == torch.float64 for p in model.get_base_model().lm_head.parameters())


def test_names_are_those_before_peft_wrapped_the_model():
    base_names = {name for name, _ in tiny.base_model().named_modules()}
    assert len(lora_layers(make_model())) == 6 and set(lora_layers(make_model())) <= base_names
    assert lora_layers(make_model(), "other") == {}


@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alphas", [{}, {"q_proj": 5, "layers.1.mlp.down_proj": 40}])
def test_a_saved_client_adapter_gives_the_same_logits_in_plain_peft(tmp_path, k, rslora, alphas):
    config = tiny.lora_config(R, rslora=rslora, zero_b=False)
    config.alpha_pattern = alphas
    model = get_peft_model(tiny.base_model(), config)
    (adapter,) = make_adapters(model, [k])
    stack = ClientStack(model, 1, k)
    stack.attach()
    stack.load([adapter])
    ids = make_ids(1)
    save_client_adapter(tmp_path / "new" / "folder", adapter, model.peft_config["default"])
    loaded = PeftModel.from_pretrained(tiny.base_model(), tmp_path / "new" / "folder", autocast_adapter_dtype=False)
    assert isinstance(loaded.peft_config["default"], LoraConfig) and loaded.peft_config["default"].r == k
    with torch.no_grad(), stack.at_work(ids.numel()):
        expected, found = model(input_ids=ids).logits, loaded(input_ids=ids).logits
        assert not torch.allclose(found, loaded.unload()(input_ids=ids).logits, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert model.peft_config["default"].r == R and model.peft_config["default"].lora_alpha == 12  # left as it was
