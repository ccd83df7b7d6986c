"""What other tools do with converted models: scripts, exporters, quantisation, wrappers, copies."""

import copy
import io
from collections.abc import Iterator
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from support.conversion_cases import bn, cbr, net
from support.conversions import assert_inferred, images, patterns, prepared, results
from support.leave_group import leave_group
from support.oracles import timm, torchvision
from support.tolerance import assert_same
from torch import Tensor, fx, nn

from fastcnn import convert, revert
from fastcnn.convert.converted import Converted
from fastcnn.convert.report import rows

# Only what fastcnn says is an error: other tools warn of much.
pytestmark = pytest.mark.filterwarnings("ignore", "error:fastcnn")


def _model() -> Any:
    return prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))).float().eval()


# Graphs


def test_a_graph_may_be_compiled_again() -> None:
    graph, eager = (fx.symbolic_trace(prepared(cbr(nn.ReLU()))) for _ in range(2))
    convert(graph)
    x = images(2, 4, 5, 5)
    for m in (graph, eager):
        m(x)
        for node in m.graph.nodes:
            if node.target == "2":  # the ReLU
                with m.graph.inserting_after(node):
                    doubled = m.graph.call_function(torch.mul, (node, 2))
                node.replace_all_uses_with(doubled)
                doubled.args = (node, 2)
        m.recompile()
    assert patterns(graph) == ["conv-bn-relu"]
    assert_same(results(graph, x), results(eager, x))
    assert type(revert(graph)).__name__ == type(eager).__name__


@pytest.mark.parametrize("first", ["convert", "extract"])
def test_extracted_features_stay_fused(first: str) -> None:
    """torchvision's extractor compiles its graph again at each train() and eval()."""
    create_feature_extractor = torchvision.models.feature_extraction.create_feature_extractor

    def extractor(converts: bool) -> Any:
        torch.manual_seed(0)
        model = torchvision.models.resnet18().double()
        if converts and first == "convert":
            convert(model)
        made = create_feature_extractor(model, ["layer1", "layer2"])
        return convert(made) if converts and first == "extract" else made

    model, eager = extractor(True), extractor(False)
    if first == "convert":  # a graph of the layers, which is another model
        convert(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (True, False, True):
        for m in (model, eager):
            m.train(training)
        assert_same(results(model, x), results(eager, x))
        assert len(patterns(model)) > 3


def test_a_graph_within_a_model_stays_fused() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            backbone = torchvision.models.resnet18().double()
            extract = torchvision.models.feature_extraction.create_feature_extractor
            self.backbone = extract(backbone, {"layer1": "out"})
            self.head = nn.Sequential(nn.Conv2d(64, 4, 1), nn.BatchNorm2d(4)).double()

        def forward(self, x: Tensor) -> Any:
            return self.head(self.backbone(x)["out"])

    torch.manual_seed(0)
    model: Any = Head()
    eager = copy.deepcopy(model)
    convert(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        for m in (model, eager):
            m.train(training)
        assert_same(results(model, x), results(eager, x))
    assert patterns(model.backbone)[0] == "conv-bn-relu-pool"
    assert len(patterns(model.backbone)) == 3
    assert all(row.fused for row in rows(model) if row.pattern)


# Exporters


def test_a_script_is_of_the_model_as_it_is_written() -> None:
    model, x = _model(), images(2, 4, 8, 8).float()
    want = model(x)
    convert(model)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), want)
    assert patterns(model) == ["conv-bn-relu > conv-bn-relu"]
    assert all(isinstance(m, nn.Module) for m in model)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_is_of_the_model_as_it_is_written(dynamo: bool) -> None:
    if dynamo:
        pytest.importorskip("onnxscript")
    model, x = convert(_model()), images(2, 4, 8, 8).float()
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False)
    graph = onnx.load_from_string(file.getvalue())
    (found,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    assert_inferred(torch.from_numpy(found), revert(model).double(), x)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}


# Quantisation and fusion by others


def test_quantisation_sees_the_layers() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = images(2, 4, 8, 8).float()

    def quantised(model: Any) -> tuple[list[str], Tensor]:
        made = prepare_fx(model, get_default_qconfig_mapping("fbgemm"), (x,))
        made(x)
        made = convert_fx(made)
        return [type(m).__name__ for m in made.modules()], made(x)

    (found, y), (expected, want) = quantised(convert(_model())), quantised(_model())
    assert found == expected
    assert torch.equal(y, want)  # the graph is the same, and no kernel of fastcnn in it


def test_fusers_see_the_layers() -> None:
    from torch.ao.quantization import fuse_modules
    from torch.fx.experimental.optimization import fuse

    x = images(2, 4, 8, 8)
    model, eager = convert(_model().double()), _model().double()
    found, expected = fuse(model), fuse(eager)
    assert [type(m) for m in found.modules()][1:] == [type(m) for m in expected.modules()][1:]
    assert_same(found(x), expected(x))
    names = [["0.0", "0.1", "0.2"], ["1.0", "1.1", "1.2"]]
    assert_same(fuse_modules(model, names)(x), fuse_modules(eager, names)(x))


def test_stacked_models_are_made_of_reverted_ones() -> None:
    """torch.func.stack_module_state asks for one class, and each converted model has its own."""
    models = [convert(_model().double()) for _ in range(2)]
    with pytest.raises(RuntimeError, match="same class"):
        torch.func.stack_module_state(models)
    written = [revert(copy.deepcopy(m)) for m in models]
    parameters, buffers = torch.func.stack_module_state(written)
    x = images(2, 4, 8, 8)

    def call(p: Any, b: Any) -> Any:
        return torch.func.functional_call(models[0], (p, b), (x,))

    stacked = torch.vmap(call)(parameters, buffers)
    assert_same(stacked[0], models[0](x))


# Wrappers, and layers in other spellings


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield
    leave_group()


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.parallel.DistributedDataParallel])
@pytest.mark.usefixtures("group")
def test_a_report_of_a_wrapped_model_has_its_rows(wrap: Any) -> None:
    for model in (wrap(convert(_model())), convert(wrap(_model()))):
        assert [(r.module, r.fused) for r in rows(model) if r.pattern] == [
            ("module: 0.0 .. 1.2", True)
        ]


class Named(nn.BatchNorm2d):
    """A class of somebody's own, which adds nothing to what the layer does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation."""
        return super().train(False)


class Doubled(nn.BatchNorm2d):
    """One that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        """Double it."""
        return 2 * super().forward(x)


class Activation(nn.SiLU):
    """An activation in another spelling."""


def test_subclasses_that_add_nothing_are_fused() -> None:
    model, eager = (
        prepared(nn.Sequential(nn.Conv2d(4, 4, 3), Named(4), Activation())) for _ in range(2)
    )
    convert(model)
    assert patterns(model) == ["conv-bn-silu"]
    assert_same(results(model, images(2, 4, 5, 5)), results(eager, images(2, 4, 5, 5)))
    assert type(model[1]) is Named


def test_subclasses_that_compute_something_else_are_not() -> None:
    model, eager = (
        prepared(nn.Sequential(cbr(nn.ReLU()), nn.Conv2d(4, 4, 3), Doubled(4))) for _ in range(2)
    )
    convert(model)
    assert patterns(model) == ["conv-bn-relu"]
    assert_same(results(model, images(2, 4, 8, 8)), results(eager, images(2, 4, 8, 8)))
    assert any("does not trace" in row.reason for row in rows(model) if not row.fused)


def test_norms_called_as_functions_have_a_row() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        b = m.bn
        y = F.batch_norm(m.conv(x), b.running_mean, b.running_var, b.weight, b.bias, b.training)
        return m.inner(F.relu(y))

    model = convert(prepared(net(run, inner=nn.Sequential(bn(), nn.ReLU()))))
    reasons = {row.module: row.reason for row in rows(model) if not row.fused}
    assert reasons["batch_norm"] == "called as a function: norms are fused where they are layers"


def test_timm_s_synchronised_norm_is_known() -> None:
    layers = nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4)
    model = timm.layers.convert_sync_batchnorm(nn.Sequential(*layers))
    assert isinstance(model[1], timm.layers.SyncBatchNormAct)
    convert(model)
    assert patterns(model) == ["conv-bn-relu"]


def test_copies_by_replication_are_no_constructions() -> None:
    model: Any = convert(_model())
    assert isinstance(model._replicate_for_data_parallel(), Converted)
