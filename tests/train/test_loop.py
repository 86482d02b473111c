"""The loop: stopped and gone on with it gives the bits of not stopping; what is frozen stays; what fails says why."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import isthmus
from isthmus.arch.spec import HeadSpec
from isthmus.data.augment import Augment, augmented
from isthmus.data.decode import decode
from isthmus.data.order import permutation, sample_generator
from isthmus.data.transform import normalise
from isthmus.errors import RecipeError, RunError
from isthmus.evaluation.inference import Inference
from isthmus.train.checkpoint import Checkpoints, load_state, save_state
from isthmus.train.compiled import Trial
from isthmus.train.distributed import World
from isthmus.train.log import read_log
from isthmus.train.loop import LOG, Interrupted, train_network, validation_loader
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter
from oracles import relative_error
from small_runs import SPEC, Recorder, copied, network, same

RECIPE = Recipe(
    data="pictures",
    weights="w",
    freeze="none",
    epochs=3,
    batch_size=6,
    lr=0.02,
    augment=Augment(vflip=True, rotate90=True),
    label_smoothing=0.1,
    balance="weights",
    train_norm=True,
    ema=0.7,
    precision="fp32",
)
STEPS = 3  # of an epoch: 20 pictures to train on in batches of 6


def fresh():
    """A network that drops paths, so that torch's own random numbers count."""
    return network(replace(SPEC, num_classes=2, drop_path=0.3))


MEASURED = {"time", "pictures_per_second", "memory"}  # differs from run to run


def log(folder) -> list[dict]:
    """The log without what differs from run to run."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in read_log(folder / LOG)]


def rows(folder) -> list[dict]:
    """The rows of whole epochs."""
    return [row for row in log(folder) if "step" not in row]


def newest(folder) -> Path:
    return Checkpoints(folder).files()[0]


def equal(one, other) -> bool:
    """Whether nested states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


class Stops(Reporter):
    """Raises a signal after so many steps."""

    def __init__(self, steps: int, number: signal.Signals = signal.SIGINT) -> None:
        self.left, self.number = steps, number

    def progress(self, task, done, total, facts=None):
        assert 0 < done <= total
        self.left -= task == "train"
        if self.left == 0:
            signal.raise_signal(self.number)


@pytest.fixture
def train(data, here, tmp_path):
    def call(name="run", recipe=RECIPE, reporter=None, *, resume=False, net=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        found, _ = train_network(net or fresh(), data, recipe, here, folder, reporter or Reporter(), resume=resume)
        return folder, found

    return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_stopping_anywhere_changes_nothing(train, number, ema):
    recipe = replace(RECIPE, ema=ema)
    straight, wanted = train("straight", recipe)
    assert [row["epoch"] for row in rows(straight)] == [1, 2, 3]
    wanted_state = load_state(newest(straight))
    for steps in (1, STEPS, STEPS + 2, 3 * STEPS):  # in the middle, at the last step of an epoch, at the very last step
        handler = signal.getsignal(number)
        with pytest.raises(
            Interrupted, match=rf"epoch {-(-steps // STEPS)} after {(steps - 1) % STEPS + 1} of 3 steps"
        ):
            train(f"stopped{steps}", recipe, Stops(steps, number))
        assert signal.getsignal(number) is handler
        folder, found = train(f"stopped{steps}", recipe, resume=True)
        assert same(copied(wanted), copied(found)), steps
        state = load_state(newest(folder))
        for part in ("net", "optimizer", "ranks", *(["average"] if ema else [])):
            assert equal(wanted_state[part], state[part]), (steps, part)
        assert log(folder) == log(straight), steps


def test_stopping_at_every_step(train):
    straight, wanted = train("straight")
    for resume in [False] + [True] * (3 * STEPS - 1):
        with pytest.raises(Interrupted):
            train("stopped", reporter=Stops(1), resume=resume)
    folder, found = train("stopped", resume=True)
    assert same(copied(wanted), copied(found))
    assert log(folder) == log(straight)


def test_a_crash_after_saving_changes_nothing(train, monkeypatch):
    """The power fails while an epoch is evaluated: its state is saved and its log line is not."""
    straight, wanted = train("straight")
    evaluate, calls = Inference.evaluate, []

    def fails(self, *others, **options):
        calls.append(1)
        if len(calls) == 2:
            raise SystemError("the power fails")
        return evaluate(self, *others, **options)

    monkeypatch.setattr(Inference, "evaluate", fails)
    with pytest.raises(SystemError):
        train("crashed")
    assert [row["epoch"] for row in rows(straight.parent / "crashed")] == [1]
    monkeypatch.undo()
    folder, found = train("crashed", resume=True)
    assert same(copied(wanted), copied(found))
    assert log(folder) == log(straight)


def test_without_a_checkpoint_it_begins_anew(train):
    straight, wanted = train("straight")
    with pytest.raises(Interrupted):
        train("stopped", reporter=Stops(STEPS + 1))
    for path in Checkpoints(straight.parent / "stopped").files():
        path.unlink()
    folder, found = train("stopped", resume=True)
    assert same(copied(wanted), copied(found))
    assert log(folder) == log(straight)


def test_a_finished_run_resumes_to_itself(train):
    straight, wanted = train()
    before = rows(straight)
    assert same(copied(wanted), copied(train(resume=True)[1]))
    assert rows(straight) == before


def test_the_same_seed_gives_the_same_bits_and_another_does_not(train):
    one, two, other = (train(name, replace(RECIPE, seed=seed))[1] for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert same(copied(one), copied(two))
    assert not same(copied(one), copied(other))


@pytest.mark.parametrize("train_norm", [False, True])
def test_what_is_frozen_does_not_move(train, train_norm):
    net = fresh()
    before = copied(net)
    _, after = train(recipe=replace(RECIPE, ema=0.0, freeze="layer1", train_norm=train_norm), net=net)
    moved = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before[name])}
    learnt = {name for name, _ in net.named_parameters() if name.startswith(("layer2", "fc"))}
    statistics = {name for name in before if name.startswith("layer2") and name not in learnt}
    assert moved == (learnt | statistics if train_norm else learnt)
    assert any("running_mean" in name for name in statistics)


def test_loss_goes_down_and_rates_are_logged(train):
    folder, _ = train(recipe=replace(RECIPE, ema=0.0, epochs=6, augment=Augment(crop_scale=())))
    found = rows(folder)
    assert found[-1]["loss"] < found[0]["loss"]
    rates = [row["lr"] for row in found]
    assert rates[0] == RECIPE.lr  # one epoch of warm-up
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert set(found[0]) == {"epoch", "loss", "lr", "val_accuracy", "val_balanced_accuracy", "val_loss"}


def test_warm_up_leaves_time_to_cool_down(train):
    folder, _ = train(recipe=replace(RECIPE, epochs=2, warmup_epochs=5.0))
    rates = [row["lr"] for row in rows(folder)]
    assert rates[0] == RECIPE.lr
    assert rates[1] < RECIPE.lr / 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_diverging_run_names_the_rate(train, optimizer):
    with pytest.raises(
        RunError, match=r"step [1-3] of epoch 1; .* no finite number lies in .*pictures .*lower --lr \(now 1e\+30\)"
    ):
        train(recipe=replace(RECIPE, lr=1e30, optimizer=optimizer, ema=0.0))


def test_a_diverging_epoch_leaves_the_state_before_it(train, monkeypatch):
    straight, _ = train("straight", replace(RECIPE, epochs=3))
    before = rows(straight)[:1]
    rate = isthmus.train.step.rate

    def explodes(recipe, step, steps):
        return 1e30 if step == STEPS else rate(recipe, step, steps)

    monkeypatch.setattr(isthmus.train.step, "rate", explodes)
    with pytest.raises(RunError, match=r"of epoch 2; .*the last state before it is .*step-000000003\.pt"):
        train("exploded", replace(RECIPE, epochs=3))
    folder = straight.parent / "exploded"
    assert rows(folder) == before
    state = load_state(newest(folder))
    assert (state["epoch"], state["step"]) == (0, STEPS)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["net"].values())


def test_averages_cover_parameters_and_statistics(train):
    net, states = fresh(), []

    class Watches(Reporter):
        def progress(self, task, done, total, facts=None):
            if task == "train":
                states.append(copied(net))

    _, found = train(reporter=Watches(), net=net)
    assert len(states) == 3 * STEPS
    wanted = {name: tensor.double() for name, tensor in states[0].items()}
    for state in states[1:]:
        wanted = {name: 0.7 * wanted[name] + 0.3 * tensor for name, tensor in state.items()}
    last = copied(net)
    for name, tensor in found.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6), name
            assert not torch.equal(tensor, last[name]), name
    assert (found.preprocess, found.spec) == (net.preprocess, net.spec)


@pytest.mark.parametrize("memory", ["plain", "checkpoint", "recompute"])
def test_a_run_works_in_place_and_in_its_memory_mode(train, memory):
    """While it trains; the network that it gives back is as networks are."""
    net, seen = fresh(), set()

    class Looks(Reporter):
        def progress(self, task, *_others):
            block = net.get_submodule("layer1.0")
            seen.add((block.act1.inplace, block.in_place, net.memory))

    _, found = train(recipe=replace(RECIPE, memory=memory, epochs=1), net=net, reporter=Looks())
    assert seen == {(True, True, memory)}
    for each in (net, found):
        block = each.get_submodule("layer1.0")
        assert (block.act1.inplace, block.in_place, each.memory) == (False, False, "plain")


def test_fewer_epochs_than_were_trained_are_refused(train):
    train(recipe=replace(RECIPE, epochs=3))
    with pytest.raises(RunError, match="has trained 2 epochs, and the recipe asks for 1 only"):
        train(recipe=replace(RECIPE, epochs=1), resume=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_those_of_a_plain_loop(train, data, here, optimizer):
    """Written a second time, by names and formulas: augmentation, loss, decay, rates and schedule all count."""
    recipe = replace(
        RECIPE, optimizer=optimizer, ema=0.0, epochs=2, head_lr_factor=5.0, weight_decay=0.1, warmup_epochs=0.7
    )
    _, found = train(recipe=recipe)

    net = fresh().train()
    kinds = dict.fromkeys((True, False))
    for head in kinds:
        named = [(name, each) for name, each in net.named_parameters() if name.startswith("fc.") is head]
        decaying = [each for name, each in named if name.endswith(("conv1.weight", "conv2.weight", "conv3.weight"))]
        decaying += [each for name, each in named if name.endswith(("fc.weight", "downsample.0.weight"))]
        rest = [each for _, each in named if not any(each is other for other in decaying)]
        groups = [{"params": decaying, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        kinds[head] = (
            torch.optim.AdamW(groups) if optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        )
    flower, temple = data.train.counts().values()
    weight = torch.tensor([10 / flower, 10 / temple])
    torch.manual_seed(0)
    warm, total = 2, 6  # of 2 x 3 steps, 0.7 x 3 warm up
    for step in range(total):
        rate = 0.02 * (step + 1) / warm if step < warm else 0.01 * (1 + np.cos(np.pi * (step - warm) / (total - warm)))
        order = permutation(20, 0, step // STEPS)[step % STEPS * 6 :][:6].tolist()
        images = [
            augmented(
                decode(data.train.name(index)),
                Augment(vflip=True, rotate90=True),
                net.preprocess,
                sample_generator(0, step // STEPS, index),
            )
            for index in order
        ]
        logits = net(normalise(torch.stack(images), net.preprocess).to(memory_format=torch.channels_last))
        labels = torch.tensor([data.train.labels[index] for index in order])
        target = torch.full((6, 2), 0.05)  # smoothed by 0.1
        target[torch.arange(6), labels] = 0.95
        likely = (logits.log_softmax(1) * target * weight).sum(1)
        loss = -likely.sum() / 6
        for head, each in kinds.items():
            for group in each.param_groups:
                group["lr"] = rate * (5 if head else 1)
            each.zero_grad()
        loss.backward()
        for each in kinds.values():
            each.step()
    tolerance = 1e-2 if optimizer == "adamw" else 1e-4  # a gradient near zero may have either sign, as Adam sees it
    for name, tensor in found.state_dict().items():
        if tensor.is_floating_point():
            assert relative_error(tensor, net.state_dict()[name]) < tolerance, name


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-500]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "newer": lambda path: torch.save({"schema": 99}, path),
    "a number": lambda path: torch.save(3, path),
    "of another network": lambda path: save_state(path, load_state(path) | {"net": {"weight": torch.zeros(1)}}),
    "without averages": lambda path: save_state(
        path, {key: value for key, value in load_state(path).items() if key not in ("average", "schema")}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_cannot_be_used_is_named(train, damage):
    with pytest.raises(Interrupted):
        train(reporter=Stops(2))
    folder, _ = train("other", replace(RECIPE, epochs=1))
    path = newest(folder.parent / "run")
    DAMAGE[damage](path)
    with pytest.raises(RunError, match=r"run/checkpoints/step-|another network"):
        train(resume=True)


def test_code_in_a_checkpoint_does_not_run(train, tmp_path):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder, _ = train(recipe=replace(RECIPE, epochs=1))
    torch.save({"schema": 2, "net": Runs()}, newest(folder))
    with pytest.raises(RunError, match=r"checkpoints/step-"):
        train(recipe=replace(RECIPE, epochs=1), resume=True)
    assert not (tmp_path / "ran").exists()


def test_validation_too_holds_no_more_than_a_micro_batch(data):
    loader = validation_loader(data, replace(RECIPE, batch_size=100, micro_batch=2), fresh(), World())
    assert max(len(batch.labels) for batch in loader.epoch(0)) == 2


@pytest.mark.parametrize("batch_size", [7, 100])
def test_any_batch_size(train, batch_size):
    """7 drops the last partial batch, 100 is more than there are pictures; `Stops` checks what progress says."""
    folder, _ = train(recipe=replace(RECIPE, batch_size=batch_size, epochs=1), reporter=Stops(0))
    assert len(rows(folder)) == 1


@pytest.mark.parametrize("wins", [False, True])
def test_compiling_is_tried_once_in_a_run(train, wins, monkeypatch):
    tried, compiled = [], []

    def trial(net, *_):
        tried.append(net)
        return net, Trial(gain=2.0 if wins else 0.5)

    monkeypatch.setattr("isthmus.train.loop.try_compiling", trial)
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    made = replace(RECIPE, compile=True, freeze="layer2", unfreeze_epochs=1)
    with pytest.raises(Interrupted):
        train(recipe=made, reporter=Stops(2))
    assert (len(tried), len(compiled)) == (1, 0)
    train(recipe=made, resume=True)  # which begins frozen as it was, and thaws twice
    assert (len(tried), len(compiled)) == (1, 3 * wins)


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_run_says_once_what_binds(train, micro_batch, monkeypatch):
    monkeypatch.setattr("isthmus.train.loop.LOOK", 6)
    monkeypatch.setattr("isthmus.train.loop.loader_rate", lambda _: 1e9)
    recorder = Recorder()
    train(recipe=replace(RECIPE, epochs=2, batch_size=2, micro_batch=micro_batch), reporter=recorder)
    assert [line.endswith("the network binds") for line in recorder.lines if "binds" in line] == [True]


@pytest.mark.parametrize("sizes", [{"batch_size": 1}, {"batch_size": 4, "micro_batch": 1}])
def test_a_head_that_needs_two_pictures_is_named(train, sizes):
    head = HeadSpec(taps=("layer1", "layer2"), norm=True)
    with pytest.raises(RecipeError, match=r"the head's batch norm needs two: .* take larger ones, fewer processes, or"):
        train(recipe=replace(RECIPE, **sizes), net=network(replace(SPEC, num_classes=2, head=head)))
    train(recipe=replace(RECIPE, **sizes, epochs=1))
