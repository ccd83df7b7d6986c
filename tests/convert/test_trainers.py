"""Other people's trainers run a converted model, unmodified, as they run the unconverted one."""

import copy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.oracles import timm
from support.tolerance import assert_same
from support.trainers import (
    CLASSES,
    STEPS,
    assert_trains_as_before,
    loader,
    moved,
    plain,
    sgd,
    small,
)
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

# Only what fastcnn says is an error: trainers warn of much.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore", "error:fastcnn")]


def unet() -> nn.Module:
    torch.manual_seed(0)
    made = oracles.segmentation_models_pytorch.Unet(
        "resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(32, 16, 8),
        classes=CLASSES,
    )  # fmt: skip
    return made.double()


def monai_unet() -> nn.Module:
    """Residual units, convolutions that are transposed, batch norms."""
    torch.manual_seed(0)
    made = oracles.monai.networks.nets.UNet(
        2, 3, CLASSES, (8, 16, 32), (2, 2), num_res_units=2, norm="batch", act="relu"
    )
    return made.double()


def monai_basic_unet() -> nn.Module:
    """Instance norms and activations in place, as it is by default."""
    torch.manual_seed(0)
    return oracles.monai.networks.nets.BasicUNet(2, 3, CLASSES, (8, 8, 16, 16, 16, 8)).double()


SEGMENT = {"unet": unet, "monai_unet": monai_unet, "monai_basic_unet": monai_basic_unet}


@pytest.mark.parametrize("name", ["small", *SEGMENT])
def test_roundings_stay_small_over_the_steps(name: str) -> None:
    """What the other tests take for granted: larger errors than roundings change no result."""
    make = SEGMENT.get(name, small)
    model, other = make(), make()
    with moved(other):
        found = plain(other, name in SEGMENT)
    want = plain(model, name in SEGMENT)
    assert not torch.equal(found["losses"], want["losses"])
    assert_same(found, want)


# Lightning


class _Shared:
    """What follows makes a LightningModule of it: its package is imported by the tests alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.history: dict[str, list[Tensor]] = {"train": [], "validation": []}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self: Any, batch: Any, _: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self: Any, batch: Any, _: int) -> None:
        self._step(batch, "validation")

    def _step(self: Any, batch: Any, stage: str) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.history[stage].append(loss.detach())
        self.log(f"{stage}_loss", loss)
        return loss

    def configure_optimizers(self: Any) -> Any:
        return sgd(self)


def _lightning(net: nn.Module) -> Any:
    return type("Lightning", (_Shared, oracles.pytorch_lightning.LightningModule), {})(net)


def _fit(model: Any, folder: Path, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    """Train for 2 epochs of 10 batches, each followed by a validation."""
    trainer = oracles.pytorch_lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, limit_train_batches=STEPS // 2,
        limit_val_batches=3, callbacks=[*callbacks], default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=True, num_sanity_val_steps=2,
    )  # fmt: skip
    trainer.fit(model, loader(), loader(), **options)
    return trainer


def _of_history(model: Any) -> dict[str, Any]:
    found = {stage: torch.stack(losses) for stage, losses in model.history.items()}
    # An average of weights goes through the data once more, for its batch norms' statistics.
    losses, later = found["train"][:STEPS], found["train"][STEPS:]
    return {"losses": losses, "later": later, "validation": found["validation"]}


@pytest.mark.parametrize("whole", [False, True])
def test_lightning(whole: bool, tmp_path: Path) -> None:
    """With a checkpoint, which is read again and trained on; of the network, or of the module."""
    saved = oracles.pytorch_lightning.callbacks.ModelCheckpoint

    def train(model: Any, folder: Path) -> dict[str, Any]:
        module = model if whole else _lightning(model)
        _fit(module, folder, saved(folder, save_last=True), epochs=1)
        trainer = _fit(
            module, folder, saved(folder, monitor="validation_loss", save_last=True),
            ckpt_path=folder / "last.ckpt", weights_only=False,
        )  # fmt: skip
        read = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
        logged = {name: t.detach() for name, t in trainer.callback_metrics.items()}
        return {**_of_history(module), "read": read, "logged": logged}

    assert_trains_as_before(train, tmp_path, (lambda: _lightning(small())) if whole else small)


AVERAGES = {
    "StochasticWeightAveraging": {"swa_lrs": 0.02, "swa_epoch_start": 1},
    "EMAWeightAveraging": {"decay": 0.9},
}


@pytest.mark.parametrize("name", AVERAGES)
def test_lightning_s_averages(name: str, tmp_path: Path) -> None:
    def train(model: Any, folder: Path) -> dict[str, Any]:
        module = _lightning(model)
        average = getattr(oracles.pytorch_lightning.callbacks, name)
        _fit(module, folder, average(**AVERAGES[name]))
        return _of_history(module)

    assert_trains_as_before(train, tmp_path)


# accelerate


def test_accelerate(tmp_path: Path) -> None:
    """Gradients of two batches, clipped; a state that is saved, left and loaded again."""

    def train(model: Any, folder: Path) -> dict[str, Any]:
        accelerator = oracles.accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = sgd(model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        model, optimizer, data, schedule = accelerator.prepare(model, optimizer, loader(), schedule)
        losses, norms = [], []

        def step(x: Tensor, y: Tensor) -> Tensor:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.1))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            return loss.detach()

        for at, (x, y) in enumerate(data):
            if at == STEPS // 2:
                accelerator.save_state(folder / "state")
                for _ in range(2):
                    step(x, y)
                accelerator.load_state(folder / "state")
            losses.append(step(x, y))
        accelerator.save_model(model, folder / "model")
        assert accelerator.unwrap_model(model) is model
        return {"losses": torch.stack(losses), "norms": torch.stack(norms)}

    assert_trains_as_before(train, tmp_path)


# timm


@pytest.mark.parametrize("clip", ["agc", "norm", "value"])
def test_timm(clip: str, tmp_path: Path) -> None:
    """The parts of its train.py: average, scaler, clipping, schedule, checkpoints."""
    utils = timm.utils

    def train(model: Any, folder: Path) -> dict[str, Any]:
        optimizer = create_optimizer_v2(model, "momentum", lr=0.05, momentum=0.9)
        average, scaler = utils.ModelEmaV3(model, decay=0.9), utils.NativeScaler(device="cpu")
        args = Namespace(model="small")
        saver = utils.CheckpointSaver(
            model, optimizer, args, average, scaler, checkpoint_dir=folder, recovery_dir=folder
        )
        schedule = CosineLRScheduler(optimizer, STEPS, t_in_epochs=False)
        losses = []
        for at, (x, y) in enumerate(loader()):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            scaler(
                loss, optimizer, clip_grad=0.05, clip_mode=clip,
                parameters=timm.models.model_parameters(model, exclude_head=clip == "agc"),
            )  # fmt: skip
            average.update(model, step=at)
            schedule.step_update(at + 1)
            losses.append(loss.detach())
            if at == STEPS // 2:
                saver.save_recovery(0, at)
        saver.save_checkpoint(0, losses[-1].item())
        read = copy.deepcopy(model)
        timm.models.resume_checkpoint(read, folder / "last.pth.tar", sgd(read))
        assert_same(dict(read.state_dict()), dict(model.state_dict()))
        with torch.no_grad():
            averaged = average.module.eval()(x)
        return {
            "losses": torch.stack(losses),
            "average": dict(average.module.state_dict()),
            "averaged": averaged,
        }

    assert_trains_as_before(train, tmp_path)


# segmentation_models_pytorch


class _Recorded(nn.Module):
    """A loss that keeps what it has returned."""

    def __init__(self, loss: nn.Module, losses: list[Tensor]) -> None:
        super().__init__()
        self.loss, self.losses, self.__name__ = loss, losses, "loss"

    def forward(self, found: Tensor, y: Tensor) -> Tensor:
        loss = self.loss(found, y)
        self.losses.append(loss.detach())
        return loss


@pytest.mark.parametrize("loss", ["DiceLoss", "JaccardLoss", "FocalLoss"])
def test_segmentation_models(loss: str, tmp_path: Path) -> None:
    smp = oracles.segmentation_models_pytorch
    epochs = pytest.importorskip("segmentation_models_pytorch.utils.train")

    def train(model: Any, folder: Path) -> dict[str, Any]:
        losses: list[Tensor] = []
        recorded = _Recorded(getattr(smp.losses, loss)(mode="multiclass"), losses)
        epochs.TrainEpoch(model, recorded, [], sgd(model), verbose=False).run(loader(segments=True))
        epochs.ValidEpoch(model, recorded, [], verbose=False).run(loader(segments=True))
        model.save_pretrained(folder)
        return {"losses": torch.stack(losses[:STEPS]), "validation": torch.stack(losses[STEPS:])}

    assert_trains_as_before(train, tmp_path, unet)


# MONAI


def _monai(model: Any, data: Any) -> dict[str, Any]:
    """Train by SupervisedTrainer, with a validation behind it."""
    monai, iteration = oracles.monai, oracles.ignite.engine.Events.ITERATION_COMPLETED
    losses: list[Tensor] = []
    validated: list[Tensor] = []
    evaluator = monai.engines.SupervisedEvaluator("cpu", data, model, decollate=False)
    trainer = monai.engines.SupervisedTrainer(
        "cpu", 1, data, model, sgd(model),
        monai.losses.DiceCELoss(to_onehot_y=True, softmax=True),
        train_handlers=[monai.handlers.ValidationHandler(1, evaluator)], decollate=False,
    )  # fmt: skip
    trainer.add_event_handler(
        iteration,
        lambda e: losses.append(torch.as_tensor(e.state.output["loss"]).double()),
    )
    evaluator.add_event_handler(
        iteration, lambda e: validated.append(e.state.output["pred"].detach())
    )
    trainer.run()
    return {"losses": torch.stack(losses), "validated": validated}


def _dicts(wrap: Callable[[Tensor], Tensor]) -> Any:
    found = loader(segments=True)
    return DataLoader(
        [{"image": wrap(x), "label": y[None]} for x, y in found.dataset],
        found.batch_size,
        collate_fn=_collated,
    )


def _collated(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([one[key] for one in samples]) for key in ("image", "label")}


@pytest.mark.parametrize("make", [monai_unet, monai_basic_unet, unet])
def test_monai(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    def train(model: Any, folder: Path) -> dict[str, Any]:
        return _monai(model, _dicts(lambda x: x))

    assert_trains_as_before(train, tmp_path, make)


@pytest.mark.parametrize("make", [monai_unet, monai_basic_unet])
def test_monai_s_tensors(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    tensor = oracles.monai.data.MetaTensor

    def train(model: Any, folder: Path) -> dict[str, Any]:
        return _monai(model, _dicts(tensor))

    assert_trains_as_before(train, tmp_path, make, tensor)
