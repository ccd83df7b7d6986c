"""Public reports about tools that fuse, patch, copy or hook models: each situation, converted.

Every test is one report, in its smallest form: what was done there is done to an unconverted model
and to a converted copy, and the outcomes compared, errors included. docs/conversion.md lists them.
"""

import copy
import inspect
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import oracles
from support.conversion_cases import bn, cbr, conv, net
from support.conversions import images, patterns, prepared, results
from support.paths import ROOT
from support.tolerance import assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastcnn import convert
from fastcnn.convert.report import rows

Make = Callable[[], Any]
REPORTS: dict[str, str] = {}  # the test's name by the report

# Only what fastcnn says is an error: other tools warn of much.
pytestmark = pytest.mark.filterwarnings("ignore", "error:fastcnn")


def report(*sources: str) -> Callable[[Any], Any]:
    def note(test: Any) -> Any:
        REPORTS.update(dict.fromkeys(sources, test.__name__))
        return test

    return note


@pytest.fixture
def x() -> Tensor:
    return images(2, 4, 8, 8)


def chain() -> Any:
    """Two steps of convolution, batch norm and activation in place: one call."""
    return prepared(nn.Sequential(cbr(nn.ReLU(inplace=True)), cbr(nn.ReLU(inplace=True))))


def assert_alike(use: Callable[[Any], Any], make: Make = chain, **options: Any) -> Any:
    """Compare what is done to a model and to its converted copy, and return this copy."""
    model = make()
    converted = convert(copy.deepcopy(model), **options)
    assert any(row.fused for row in rows(converted))
    want, got = _outcome(use, model), _outcome(use, converted)
    if isinstance(want, type):
        assert got is want, f"expected {want}, got {got}"
    else:
        assert_same(got, want)
    return converted


def _outcome(use: Callable[[Any], Any], model: Any) -> Any:
    try:
        return use(model)
    except (RuntimeError, AttributeError, ValueError, TypeError) as error:
        if "fastcnn" in str(error):
            raise
        return type(error)


def assert_fused(model: Any) -> None:
    assert all(row.fused for row in rows(model) if row.pattern)
    assert any(row.fused for row in rows(model))


def warned(use: Callable[[], Any]) -> Any:
    """Do something after which a converted model says once that it has changed."""
    with pytest.warns(UserWarning, match="has changed since it was converted"):
        return use()


# Fusion by others


@pytest.mark.parametrize("mode", ["train", "infer"])
@report("pytorch/pytorch#197539", "pytorch/pytorch#104593")
def test_a_convolution_that_is_normalised_on_one_path_only(mode: Any, x: Tensor) -> None:
    def use(model: Any) -> Any:
        trained = results(model.train(), x)
        return trained, results(model.eval(), x)

    def make() -> Any:
        return prepared(net(lambda m, x: m.conv(x) + m.relu(m.bn(m.conv(x + 1)))))

    assert_alike(use, make, mode=mode)


class YoloConv(nn.Module):
    """As of yolov5: fused by deleting the norm and by another forward of the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(bias=False), bn(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def fuseforward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@report("Bobo-y/flexible-yolov5#7")
def test_a_fuser_that_deletes_the_norm(x: Tensor) -> None:
    def use(model: Any) -> Any:
        for m in model.eval().modules():
            if isinstance(m, YoloConv):
                m.conv = nn.utils.fuse_conv_bn_eval(m.conv, m.bn)
                del m.bn
                m.forward = m.fuseforward
        return model(x)

    def make() -> Any:
        return prepared(nn.Sequential(YoloConv(), YoloConv()))

    converted = convert(make())
    got = warned(lambda: use(converted))
    assert_same(got, use(make()))


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation, as timm's."""

    def __init__(self) -> None:
        super().__init__(4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


@report("pytorch/pytorch#187298", "huggingface/pytorch-image-models#1254")
def test_synchronised_norms_lose_what_they_lose_unconverted(x: Tensor) -> None:
    """A norm's activation; and nothing of a plain one, which fuses when it is converted again."""

    def make() -> Any:
        return prepared(nn.Sequential(cbr(nn.ReLU()), conv(), NormAct()))

    def use(model: Any) -> Any:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)(x)

    converted = convert(make())
    got = warned(lambda: use(converted))
    assert_same(got, use(make()))
    assert isinstance(converted[0][1], nn.SyncBatchNorm)
    assert "conv-bn-relu" in " ".join(patterns(convert(converted)))


class BatchNormXd(nn.modules.batchnorm._BatchNorm):
    """What a synchronised norm is made again, where nobody knows of how many dimensions it was."""

    def _check_input_dim(self, _: Tensor) -> None:
        return


@report("pytorch/pytorch#41081")
def test_norms_of_any_number_of_dimensions(x: Tensor) -> None:
    def make() -> Any:
        model = chain()
        for block in model:
            norm = BatchNormXd(4)
            norm.load_state_dict(block[1].state_dict())
            block[1] = norm.double()
        return model

    model, converted = make(), make()
    with pytest.warns(UserWarning, match="nothing in Sequential runs fused"):
        convert(converted)
    assert_same(results(converted, x), results(model, x))


# Surgery


class Lora(nn.Module):
    """A convolution with an adapter, as of PEFT."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Conv2d(4, 2, 3, padding=1, bias=False)
        self.up = nn.Conv2d(2, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))

    def merge(self) -> nn.Conv2d:
        delta = torch.einsum("ormn,rcij->ocij", self.up.weight, self.down.weight)
        self.base_layer.weight.data += delta
        return self.base_layer


@pytest.mark.parametrize("mode", ["train", "infer"])
@report("huggingface/peft#637")
def test_adapters_come_are_merged_and_go(mode: Any, x: Tensor) -> None:
    def inject(model: Any) -> Any:
        model[0][0] = prepared(Lora(model[0][0]))
        return results(model.train(), x)

    def merge(model: Any) -> Any:
        model[0][0] = model[0][0].merge()
        return results(model, x), model.eval()(x)

    model, converted = chain(), convert(chain(), mode=mode)
    got = warned(lambda: inject(converted))
    assert_same(got, inject(model))
    assert_same(merge(converted), merge(model))
    assert_fused(converted)


@report("meta-pytorch/opacus#828", "meta-pytorch/opacus#638")
def test_batch_norms_become_group_norms(x: Tensor) -> None:
    """And full backward hooks, which refuse an activation in place behind them."""

    def replace(model: Any) -> Any:
        for block in model:
            block[1] = nn.GroupNorm(2, 4).double()
        return results(model, x)

    def hook(model: Any) -> Any:
        for m in model.modules():
            if not [*m.children()]:
                m.register_full_backward_hook(lambda *_: None)
        return results(model, x)

    model, converted = chain(), convert(chain())
    got = warned(lambda: replace(converted))
    assert_same(got, replace(model))
    convert(converted)
    assert all(row.fused for row in rows(converted) if "group_norm" in row.pattern)
    assert_same(results(converted, x), results(model, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _outcome(hook, converted) is _outcome(hook, model) is RuntimeError


@report("VainF/Torch-Pruning#374")
def test_channels_are_pruned(x: Tensor) -> None:
    """Hooks on all modules find the graph, are removed; the model is copied; channels go."""

    def trace(model: Any) -> Any:
        seen: list[str] = []
        hooks = [
            m.register_forward_hook(lambda m, _, y: seen.append(type(m).__name__))
            for m in model.modules()
        ]
        model(x)
        for hook in hooks:
            hook.remove()
        return seen

    def cut(model: Any) -> Any:
        copied = copy.deepcopy(model)
        first, norm, second = copied[0][0], copied[0][1], copied[1][0]
        for m, name, dim in (
            (first, "weight", 0), (first, "bias", 0), (norm, "weight", 0), (norm, "bias", 0),
            (second, "weight", 1),
        ):  # fmt: skip
            kept = getattr(m, name).data.narrow(dim, 0, 3).clone()
            setattr(m, name, nn.Parameter(kept))
        norm.running_mean, norm.running_var = norm.running_mean[:3], norm.running_var[:3]
        first.out_channels = norm.num_features = second.in_channels = 3
        return results(copied, x), copied

    model, converted = chain(), convert(chain())
    assert warned(lambda: trace(converted)) == trace(model)
    (want, pruned), (got, copied) = cut(model), cut(converted)
    assert_same(got, want)
    assert_fused(convert(copied))
    assert_same(results(copied, x), results(pruned, x))


@report("pytorch/pytorch#37322", "WongKinYiu/yolov7#1835")
def test_unstructured_pruning(x: Tensor) -> None:
    def use(model: Any) -> Any:
        wanted = [(block[0], "weight") for block in model]
        prune.global_unstructured(wanted, pruning_method=prune.L1Unstructured, amount=0.5)
        copied = _outcome(copy.deepcopy, model)
        kept = results(model, x)
        for m, name in wanted:
            prune.remove(m, name)
        return kept, results(model, x), isinstance(copied, type)

    model, converted = chain(), convert(chain())
    *want, fails = use(model)
    *got, fails_too = warned(lambda: use(converted))
    assert_same(got, want)
    assert fails == fails_too


@report("pytorch/pytorch#102981", "pytorch/pytorch#102983")
@pytest.mark.parametrize("how", [nn.utils.weight_norm, parametrizations.weight_norm])
def test_copies_of_weight_norms(how: Any, x: Tensor) -> None:
    def make() -> Any:
        model = nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))
        how(model[0][0])
        return model.double()

    def use(model: Any) -> Any:
        copied = copy.deepcopy(model)
        return results(copied, x), results(copied.eval(), x)

    torch.manual_seed(0)
    model = make()
    converted = make()
    converted.load_state_dict(model.state_dict())
    convert(converted)
    want, got = _outcome(use, model), _outcome(use, converted)
    assert got is want if isinstance(want, type) else assert_same(got, want) is None
    assert _outcome(pickle.dumps, model).__class__ is _outcome(pickle.dumps, converted).__class__


# Hooks


@report("Lyken17/pytorch-OpCounter#82")
def test_counters_leave_buffers_behind(x: Tensor) -> None:
    def count(m: Any, _: Any, y: Tensor) -> None:
        m.total_ops.add_(y.numel())

    def use(model: Any) -> Any:
        hooks = []
        for m in model.modules():
            if not [*m.children()]:
                m.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
                hooks.append(m.register_forward_hook(count))
        model.eval()(x)
        for hook in hooks:
            hook.remove()
        return dict(model.state_dict()), results(model.train(), x)

    model, converted = chain(), convert(chain())
    got = warned(lambda: use(converted))
    assert_same(got, use(model))
    assert_fused(converted)


@report("pytorch/pytorch#131041")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_flops_are_those_of_the_layers(mode: Any, x: Tensor) -> None:
    def use(model: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            model.train()(x).sum().backward()
            model.eval()(x)
        by_module = {k: sum(v.values()) for k, v in counter.flop_counts.items() if "." in k}
        return torch.tensor([counter.get_total_flops(), *by_module.values()])

    model, converted = chain(), convert(chain(), mode=mode)
    assert torch.equal(warned(lambda: use(converted)), use(model))
    assert_fused(converted)


@report("pytorch/pytorch#61519", "pytorch/vision#4164", "jacobgil/pytorch-grad-cam#147")
def test_a_backward_hook_before_an_activation_in_place(x: Tensor) -> None:
    """It is an error without a conversion, and the same one with it."""

    def make() -> Any:
        return prepared(nn.Sequential(cbr(), nn.ReLU(inplace=True), cbr(nn.ReLU())))

    def use(model: Any) -> Any:
        model[0].register_full_backward_hook(lambda *_: None)
        return results(model, x)

    converted = convert(make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _outcome(use, make()) is RuntimeError
        assert _outcome(use, converted) is RuntimeError


@report("meta-pytorch/captum#199")
def test_attributions_keep_the_inputs_of_activations(x: Tensor) -> None:
    def use(model: Any) -> Any:
        kept: list[Tensor] = []
        hooks = []
        for m in model.modules():
            if isinstance(m, nn.ReLU):
                hooks.append(m.register_forward_pre_hook(lambda _, x: kept.append(x[0].clone())))
        first = results(model, x)
        for hook in hooks:
            hook.remove()
        return first, [t.detach() for t in kept], results(model, x)

    model, converted = chain(), convert(chain())
    got = warned(lambda: use(converted))
    assert len(got[1]) == 2
    assert_same(got, use(model))
    assert_fused(converted)


@report("facebookresearch/fairscale#1035")
def test_norms_that_are_hooked_for_checkpoints(x: Tensor) -> None:
    """Hooks stop statistics in the forward pass: the recomputation updates them."""

    def before(m: Any, _: Any) -> None:
        if not torch.is_grad_enabled():
            m.kept, m.track_running_stats = m.track_running_stats, False

    def after(m: Any, *_: Any) -> None:
        if not torch.is_grad_enabled():
            m.track_running_stats = m.kept

    def make() -> Any:
        model = chain()
        for block in model:
            block[1].register_forward_pre_hook(before)
            block[1].register_forward_hook(after)
        return prepared(nn.Sequential(model, cbr(nn.ReLU())))

    def use(model: Any) -> Any:
        y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
        y.sum().backward()
        return y.detach(), dict(model.state_dict())

    assert_alike(use, make)


# Training


@report("pytorch/pytorch#96136", "deepinsight/insightface#2053")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_count_batches_twice(reentrant: bool, x: Tensor) -> None:
    def use(model: Any) -> Any:
        y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
        y.square().sum().backward()
        return dict(model.state_dict()), [p.grad for p in model.parameters()]

    converted = assert_alike(use)
    assert converted[0][1].num_batches_tracked.item() % 2 == 0
    assert_fused(converted)


def _train(model: Any, x: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@report("pytorch/ignite#2590")
@pytest.mark.parametrize("buffers", ["copy", "update", "ema_train"])
def test_averages_of_ignite(buffers: str, x: Tensor) -> None:
    engines, handlers = oracles.ignite.engine, oracles.ignite.handlers

    def use(model: Any) -> Any:
        handler = handlers.EMAHandler(model, momentum=0.25, handle_buffers=buffers)

        def step(*_: Any) -> None:
            handler.ema_model(x)
            _train(model, x, 1)

        engine = engines.Engine(step)
        handler.attach(engine, event=engines.Events.ITERATION_COMPLETED)
        engine.run(range(3))
        average = handler.ema_model
        return dict(average.state_dict()), average.eval()(x).detach(), dict(model.state_dict())

    assert_fused(assert_alike(use))


@report("facebookresearch/moco#70")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_momentum_encoder_whose_data_is_another(mode: Any, x: Tensor) -> None:
    def use(model: Any) -> Any:
        keys, found = copy.deepcopy(model).eval(), []
        for _ in range(3):
            _train(model.train(), x, 1)
            with torch.no_grad():
                for k, q in zip(keys.parameters(), model.parameters(), strict=True):
                    k.data = k.data * 0.5 + q.data * 0.5
                for k, q in zip(keys.buffers(), model.buffers(), strict=True):
                    k.copy_(q)
                found.append(keys(x))
        return found, dict(keys.state_dict())

    assert_fused(assert_alike(use, mode=mode))


@report("Lightning-AI/pytorch-lightning#14866")
@pytest.mark.parametrize("momentum", [None, 0.0])
def test_statistics_of_an_average_of_weights(momentum: float | None, x: Tensor) -> None:
    def use(model: Any) -> Any:
        average = AveragedModel(model)
        for _ in range(2):
            _train(model, x, 1)
            average.update_parameters(model)
        if momentum is None:
            update_bn([x, 2 * x, x + 1], average)
        else:
            for m in average.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.reset_running_stats()
                    m.momentum = momentum
            for data in (x, 2 * x, x + 1):
                average.train()(data)
        return dict(average.state_dict()), average.eval()(x).detach()

    assert_fused(assert_alike(use))


@report("pgniewko/gt-pyg#112", "Lightning-AI/pytorch-lightning#15062")
def test_frozen_norms_that_train_wakes(x: Tensor) -> None:
    def use(model: Any) -> Any:
        model.train()
        model[0][1].eval().requires_grad_(False)
        frozen = results(model, x)
        return frozen, results(model.train(), x)

    assert_fused(assert_alike(use))


@report("open-mmlab/mmsegmentation#2441")
def test_dropout_alone_in_training(x: Tensor) -> None:
    """With p = 1, so that each draws the same mask."""

    def make() -> Any:
        return prepared(nn.Sequential(cbr(nn.ReLU()), nn.Dropout2d(1.0), cbr(nn.ReLU())))

    def use(model: Any) -> Any:
        evaluated = results(model.eval(), x)
        for m in model.modules():
            if isinstance(m, nn.Dropout2d):
                m.train()
        return evaluated, results(model, x), dict(model.state_dict())

    assert_fused(assert_alike(use, make))


@report("pytorch/pytorch#175024", "pytorch/pytorch#110363")
def test_two_passes_between_which_buffers_are_broadcast(x: Tensor) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:

        def use(model: Any) -> Any:
            wrapped = nn.parallel.DistributedDataParallel(model)
            first = wrapped(x.clone())
            (first.square().sum() + wrapped(x + 1).square().sum()).backward()
            return [p.grad.clone() for p in model.parameters()], dict(model.state_dict())

        assert_fused(assert_alike(use))
    finally:
        dist.destroy_process_group()


# Wrappers, functions, files


@report("huggingface/accelerate#866")
def test_a_patched_forward_is_taken_back_and_saved(x: Tensor) -> None:
    def use(model: Any) -> Any:
        patched = accelerator.prepare(model.eval())
        assert patched(x.float()).dtype is torch.float32  # of bfloat16
        saved = _outcome(pickle.dumps, patched)
        written = accelerator.unwrap_model(patched, keep_fp32_wrapper=False)
        file = io.BytesIO()
        torch.save(written, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        return read.double()(x).detach(), written.double()(x).detach(), isinstance(saved, type)

    model, converted = chain().float(), convert(chain().float())
    oracles.accelerate.state.AcceleratorState._reset_state(True)
    try:
        accelerator = oracles.accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        *want, fails = use(model)
        *got, fails_too = use(converted)
    finally:
        oracles.accelerate.state.AcceleratorState._reset_state(True)
    assert_same(got, want)
    assert fails == fails_too
    assert_fused(converted)


class _Ours(TorchDispatchMode):
    """Counts fastcnn's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op.namespace == "fastcnn"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("keeps", [True, False])
def test_a_model_stays_fused_when_it_is_unwrapped(keeps: bool, x: Tensor) -> None:
    model = convert(prepared(cbr(nn.ReLU())).float())
    oracles.accelerate.state.AcceleratorState._reset_state(True)
    try:
        accelerator = oracles.accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        patched = accelerator.prepare(model)
        with _Ours() as while_patched:
            patched(x.float())
        assert while_patched.count > 0
        with _Ours() as unwrapped:
            accelerator.unwrap_model(patched, keep_fp32_wrapper=keeps)(x.float())
        assert unwrapped.count > 0
    finally:
        oracles.accelerate.state.AcceleratorState._reset_state(True)


class Two(nn.Module):
    """A forward with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(nn.ReLU())

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        y = self.body(pixel_values)
        return y if labels is None else y - labels


@report("huggingface/transformers#27865")
def test_a_forward_s_signature_is_its_own(x: Tensor) -> None:
    def use(model: Any) -> Any:
        columns = [name for name in inspect.signature(model.forward).parameters if name != "args"]
        data = {"pixel_values": x, "labels": x / 2, "path": x}
        given = {name: data[name] for name in columns}
        return model(**given).detach(), model(pixel_values=x).detach()

    assert_alike(use, lambda: prepared(Two()))


@report("pytorch/functorch#867")
def test_jacobians_of_each_sample(x: Tensor) -> None:
    def use(model: Any) -> Any:
        model.eval()
        return torch.func.vmap(torch.func.jacrev(lambda one: model(one[None])[0].sum(0)))(x)

    assert_alike(use)


@report("pytorch/functorch#505", "pytorch/functorch#273")
def test_norms_without_statistics_in_functional_calls(x: Tensor) -> None:
    def use(model: Any) -> Any:
        torch.func.replace_all_batch_norm_modules_(model)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(p: Any, one: Tensor) -> Tensor:
            return torch.func.functional_call(model, p, (one[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    model, converted = chain(), convert(chain())
    got = warned(lambda: use(converted))
    assert_same(got, use(model))


@report("pytorch/pytorch#121651")
def test_both_layouts_compute_the_same(x: Tensor) -> None:
    def use(model: Any) -> Any:
        first = results(model, x)
        model.to(memory_format=torch.channels_last)
        found = results(model, x.to(memory_format=torch.channels_last)), results(model, x)
        return first, *found

    assert_fused(assert_alike(use))


# The table


def test_the_table_in_the_docs_has_all_reports() -> None:
    text = (ROOT / "docs" / "conversion.md").read_text()
    _, _, table = text.partition("## Public reports")
    listed = re.findall(r"\[([\w./-]+#\d+)\]\((https://github.com/[\w./-]+)\)", table)
    assert {name for name, _ in listed} == set(REPORTS)
    for name, link in listed:
        repository, number = name.split("#")
        assert re.fullmatch(rf"https://github.com/{repository}/(?:issues|pull)/{number}", link)
    assert len(set(REPORTS.values())) >= 20
