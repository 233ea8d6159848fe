"""Training of a network: blocks are cut, altered and learned from on the device.

::

    key, step --(drawn)--> n positions --(blocks_at)--> n blocks, int16 --(altered)--(scaled)-->
         --(logits, loss, gradient, clipped)--> weights        one jitted step, its state donated
    every so many steps: balanced accuracy on patients that are held out; the best weights are kept

Everything random follows from the seed and the number of the step, so that a run that was killed
goes on from its checkpoint as if nothing had happened. Same seed, machine and devices: same
weights.

Several devices share each batch; weights and scans are on all of them. Several machines do, too:
start the same script, reading the same data, on each of them, ::

    python train.py host0:9876 2 0                       # on host0: address, processes, which
    python train.py host0:9876 2 1                       # on the other

and let it begin with ::

    address, n, own = sys.argv[1:]
    jax.distributed.initialize(address, int(n), int(own))

before anything else of JAX is used. Checkpoints then need a folder that all of them see; the log is
written by the first. On a CPU a Python loop runs the steps: XLA differentiates convolutions within
``scan`` about 39 times slower there (jax issue 12868).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from organfast.blocks import Block
from organfast.errors import is_whole
from organfast.models.architecture import Architecture, Dropout, architecture
from organfast.models.block_augmentation import (
    BlockAugmentation,
    altered,
    draw,
    mirrored_labels,
    turns,
)
from organfast.models.checkpoints import Checkpoints
from organfast.models.cnn import PRECISIONS, Cnn
from organfast.models.device_volumes import DeviceVolumes, Room, blocks_at, put
from organfast.models.devices import DEVICES, check_not_forked, compilation_cache
from organfast.models.examples import Examples, TrainingCase, TrainingData, drawn
from organfast.models.network import (
    Params,
    initial_params,
    kernel_penalty,
    logits,
    scaled,
)
from organfast.progress import Progress, silent

__all__ = [
    "NetworkPlan",
    "Trained",
    "TrainingOutputs",
    "TrainingSettings",
    "train_network",
]

_REPORT_EVERY = 10
_JUDGED_AT_A_TIME = 512
_END_OF_RATE = 0.01
"""Where the cosine ends, as a share of the highest learning rate."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained.

    Parameters
    ----------
    steps : int
        Batches learned from, at most.
    batch : int
        Blocks in a batch, shared by all devices.
    learning_rate : float
        The highest; it rises to it and falls along a cosine to a hundredth of it. The default is
        for towers; the seed used Adam's own 1e-3.
    warmup : float
        Share of the steps in which it rises.
    weight_decay : float
        Of the kernels, as in AdamW. An architecture with a penalty of its own, the seed's, is
        trained with that instead, and by Adam.
    clip : float or None
        Longest gradient; a longer one is shortened to it. None leaves them as they are.
    label_smoothing : float
        Share of each label's certainty that is spread over all labels.
    dropout : float or None
        Rate of every dropout layer; None is the architecture's own.
    evaluate_every : int
        Steps between evaluations on the validation cases.
    patience : int
        Evaluations in a row without a better one before training stops.
    seed : int
        Of the first weights, the batches, their alterations and dropout.
    augmentation : BlockAugmentation or None
        How blocks are altered.
    precision : {"float32", "bfloat16"}
        Of the factors of products.
    device : {"auto", "cpu", "gpu"}
        Where to train: all devices of the kind; "auto" is what JAX prefers.
    max_memory_gb : float or None
        Most memory of a device that the scans may take, see ``Room``.

    Raises
    ------
    ValueError
        A setting is out of range.
    """

    steps: int = 600
    batch: int = 128
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float | None = 1.0
    label_smoothing: float = 0.05
    dropout: float | None = None
    evaluate_every: int = 100
    patience: int = 5
    seed: int = 0
    augmentation: BlockAugmentation | None = field(default_factory=BlockAugmentation)
    precision: str = "float32"
    device: str = "auto"
    max_memory_gb: float | None = None

    def __post_init__(self) -> None:
        leasts = {"steps": 1, "batch": 1, "evaluate_every": 1, "patience": 1, "seed": 0}
        for name, least in leasts.items():
            value = getattr(self, name)
            if not is_whole(value, least) or value >= 2**31:
                raise ValueError(f"{name} is {value!r}; give a whole number from {least}")
        for name, low, high in (
            ("learning_rate", 1e-8, 10.0),
            ("warmup", 0.0, 0.9),
            ("weight_decay", 0.0, 1.0),
            ("label_smoothing", 0.0, 0.5),
            ("dropout", 0.0, 0.9),
            ("clip", 1e-6, 1e6),
        ):
            value = getattr(self, name)
            if value is None and name in ("dropout", "clip"):
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; give a number from {low:g} to {high:g}")
        for name, known in (("precision", PRECISIONS), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {', '.join(known)}")
        Room(self.max_memory_gb)

    def rates(self) -> NDArray[np.float32]:
        """Learning rate of each step, (steps,)."""
        steps = jnp.arange(self.steps)
        n_rising = round(self.warmup * self.steps)
        falling = optax.cosine_decay_schedule(
            self.learning_rate, max(1, self.steps - n_rising), _END_OF_RATE
        )
        if not n_rising:
            return np.asarray(falling(steps), np.float32)
        # The first step learns, too: it is one of those in which the rate rises.
        rising = optax.linear_schedule(self.learning_rate / n_rising, self.learning_rate, n_rising)
        joined = optax.join_schedules([rising, falling], [n_rising])
        return np.asarray(joined(steps), np.float32)

    def to_dict(self) -> dict[str, Any]:
        """What shapes the weights, as JSON would hold it: not the device and its memory."""
        content = asdict(self)
        del content["device"], content["max_memory_gb"]
        return content


@dataclass(frozen=True)
class NetworkPlan:
    """What network is trained, and what it is given.

    Parameters
    ----------
    architecture : str
        Its name, see ``architecture``.
    pattern : Block
        The block that it sees.
    window : (low, high) float
        In units of the HU table: what becomes 0 and 1.
    standardise : bool
        Whether each block is brought to mean 0 and standard deviation 1, the seed's way.

    Raises
    ------
    ValueError
        There is no such architecture for such a block, or the window is empty.
    """

    architecture: str
    pattern: Block
    window: tuple[float, float]
    standardise: bool = False

    def __post_init__(self) -> None:
        architecture(self.architecture, self.pattern)
        if not self.window[0] < self.window[1]:
            raise ValueError(f"window is {self.window}; give (low, high), low below high")

    @property
    def layers(self) -> Architecture:
        """The layers of that name."""
        return architecture(self.architecture, self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {
            "architecture": asdict(self.layers),
            "pattern": self.pattern.to_dict(),
            "window": [float(edge) for edge in self.window],
            "standardise": self.standardise,
        }


@dataclass(frozen=True)
class TrainingOutputs:
    """Where a training tells what it does.

    Parameters
    ----------
    checkpoints : path, optional
        Folder of checkpoints. Where the same training has left some, it goes on from the latest.
    checkpoint_every : int
        Steps between checkpoints.
    log : path, optional
        File that gets one line of JSON every ten steps and at every evaluation: step, loss,
        learning rate, blocks per second, and accuracy and loss on the validation cases.
    tensorboard : path, optional
        Folder that gets the same for TensorBoard; needs tensorboardX.
    report : callable, optional
        Called with the same, as a mapping.

    Raises
    ------
    ValueError
        ``checkpoint_every`` is below 1.
    """

    checkpoints: str | PathLike[str] | None = None
    checkpoint_every: int = 200
    log: str | PathLike[str] | None = None
    tensorboard: str | PathLike[str] | None = None
    report: Callable[[Mapping[str, float]], None] | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.checkpoint_every, 1):
            raise ValueError(
                f"checkpoint_every is {self.checkpoint_every!r}; give a whole number from 1"
            )


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network.

    Parameters
    ----------
    classifier : Cnn
        The network with its best weights on the validation cases, or without such cases its last.
    record : mapping
        For JSON: ``settings``, ``n_steps`` done, ``best_step`` that the weights are from,
        ``stopped`` ("early: ..." or "after all steps: ..."), ``validation_accuracy`` (balanced over
        the classes) and ``validation_loss``, None without validation cases.
    """

    classifier: Cnn
    record: Mapping[str, Any]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "moments"],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class _State:
    """What a step changes; a pytree."""

    step: jax.Array
    params: Params
    moments: Any


@dataclass(frozen=True)
class _Best:
    """The best evaluation so far, and how many have passed since."""

    step: int = 0
    accuracy: float = -1.0
    loss: float = float("inf")
    n_since: int = 0

    def after(self, step: int, accuracy: float, loss: float) -> _Best:
        """With another evaluation; of equal accuracies the lower loss is better."""
        if (accuracy, -loss) > (self.accuracy, -self.loss):
            return _Best(step, accuracy, loss)
        return replace(self, n_since=self.n_since + 1)


def train_network(
    data: TrainingData,
    plan: NetworkPlan,
    settings: TrainingSettings | None = None,
    *,
    outputs: TrainingOutputs | None = None,
    progress: Progress = silent,
) -> Trained:
    """Train a network on labelled positions.

    Parameters
    ----------
    data : TrainingData
        What is learned from and tested on.
    plan : NetworkPlan
        What is trained.
    settings : TrainingSettings, optional
        How.
    outputs : TrainingOutputs, optional
        Where checkpoints and the log go.
    progress : callable, optional
        Called with ("training the network", steps done, steps in all).

    Returns
    -------
    Trained

    Raises
    ------
    InputError
        The checkpoints belong to another training.
    ValueError
        The scans do not fit on the device, there is no such device, a batch cannot be shared by
        the devices, or an option needs what is not there.
    FloatingPointError
        The loss is no number any more.
    RuntimeError
        This process was forked after JAX had started.
    """
    check_not_forked()
    settings, outputs = settings or TrainingSettings(), outputs or TrainingOutputs()
    compilation_cache()
    mesh = _mesh(settings)
    with ExitStack() as stack:
        checkpoints = None
        if outputs.checkpoints is not None:
            checkpoints = Checkpoints(outputs.checkpoints, _identity(data, plan, settings))
            stack.callback(checkpoints.close)
        run = _Run(data, plan, settings, mesh)
        run.go_on_from(checkpoints)
        log = stack.enter_context(_Log(outputs, run.n_done))
        return run.to_the_end(checkpoints, outputs.checkpoint_every, log, progress)


def _identity(data: TrainingData, plan: NetworkPlan, settings: TrainingSettings) -> dict[str, Any]:
    return {"settings": settings.to_dict(), "network": plan.to_dict(), "data": data.digest()}


def _mesh(settings: TrainingSettings) -> Mesh:
    """All devices of the kind, in a row."""
    try:
        devices = jax.devices(None if settings.device == "auto" else settings.device)
    except RuntimeError as error:
        raise ValueError(
            f"device is {settings.device!r}, and JAX finds none ({error}); use auto"
        ) from None
    if settings.batch % len(devices):
        raise ValueError(
            f"a batch of {settings.batch} cannot be shared by {len(devices)} devices; give a "
            f"multiple, such as {-(-settings.batch // len(devices)) * len(devices)}"
        )
    return Mesh(np.array(devices), ("batch",))


class _Run:
    """One training: its data on the devices, its jitted functions and where it stands."""

    def __init__(
        self, data: TrainingData, plan: NetworkPlan, settings: TrainingSettings, mesh: Mesh
    ) -> None:
        _check_mirror(data, settings)
        self.data, self.plan, self.settings = data, plan, settings
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.shared = NamedSharding(mesh, PartitionSpec("batch"))
        self.n_devices = mesh.size
        examples = Examples.of(data)
        cases = (*data.train, *data.validation)
        self.volumes = DeviceVolumes.of(
            [case.grid_volume for case in cases],
            plan.pattern,
            self.everywhere,
            Room(settings.max_memory_gb),
        )
        self.examples = put(examples, self.everywhere)
        self.judged = [
            put(part, self.shared) for part in _parts(data, _JUDGED_AT_A_TIME, mesh.size)
        ]
        self.optimiser, self.rates = _optimiser(plan.layers, settings), settings.rates()
        key = jax.random.fold_in(jax.random.key(settings.seed), 2**31)
        params = initial_params(plan.layers, data.n_labels, key)
        state = _State(jnp.int32(0), params, self.optimiser.init(params))
        self.state: _State = put(jax.tree.map(np.asarray, state), self.everywhere)
        self.best, self.best_params = _Best(), self._copy(self.state.params)
        self.n_done = 0
        self._step_program = jax.jit(self._step, donate_argnums=0)
        self.judge = jax.jit(self._judge, out_shardings=self.everywhere)

    # --- what is jitted ---------------------------------------------------------------------------

    # What changes from run to run comes as an argument: a program that is kept on disk then serves
    # runs of any length, rate and seed.

    def _step(
        self,
        state: _State,
        volumes: DeviceVolumes,
        examples: Examples,
        seed: NDArray[np.uint32],
        rate: NDArray[np.float32],
    ) -> tuple[_State, jax.Array]:
        """The state after one more batch, and the loss of that batch."""
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        for_batch, for_blocks, for_dropout = jax.random.split(key, 3)
        blocks, labels = self._batch(for_batch, for_blocks, volumes, examples)
        wanted = optax.smooth_labels(
            jax.nn.one_hot(labels, self.data.n_labels), self.settings.label_smoothing
        )
        layers = _with_dropout(self.plan.layers, self.settings.dropout)

        def loss_of(params: Params) -> jax.Array:
            found = logits(
                layers,
                params,
                blocks,
                dropout_key=for_dropout,
                precision=self.settings.precision,
            )
            loss = optax.softmax_cross_entropy(found, wanted).mean()
            return loss + kernel_penalty(layers, params) if layers.l2 else loss

        loss, gradient = jax.value_and_grad(loss_of)(state.params)
        updates, moments = self.optimiser.update(gradient, state.moments, state.params)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        params = optax.apply_updates(state.params, updates)
        return _State(state.step + 1, params, moments), loss

    def _batch(
        self, key: jax.Array, for_blocks: jax.Array, volumes: DeviceVolumes, examples: Examples
    ) -> tuple[jax.Array, jax.Array]:
        """Scaled blocks (n, L, slices, size, size) float32, and their labels (n,)."""
        chosen = drawn(key, self.settings.batch, examples)
        chosen = jax.lax.with_sharding_constraint(chosen, self.shared)
        cases, positions, labels = (
            jnp.asarray(of_all)[chosen]
            for of_all in (examples.cases, examples.positions, examples.labels)
        )
        how = self.settings.augmentation
        if how is None:
            return self._scaled(blocks_at(volumes, cases, positions)), labels
        partners = jnp.full_like(labels, -1)
        if self.data.partners is not None:
            partners = jnp.asarray(self.data.partners, jnp.int32)[labels]
        draws = draw(for_blocks, how, partners)
        cut = blocks_at(volumes, cases, positions, turns(draws, how)).astype(jnp.float32)
        blocks = altered(cut, draws, how, self.plan.pattern.levels, self.data.hu_table)
        return self._scaled(blocks), mirrored_labels(draws, labels, partners)

    def _scaled(self, blocks: jax.Array) -> jax.Array:
        return scaled(blocks, self.plan.window, standardise=self.plan.standardise)

    def _judge(
        self, params: Params, volumes: DeviceVolumes, cases: jax.Array, positions: jax.Array
    ) -> jax.Array:
        """(n, n_classes) probabilities."""
        found = logits(
            self.plan.layers,
            params,
            self._scaled(blocks_at(volumes, cases, positions)),
            precision=self.settings.precision,
        )
        of_label = jax.nn.softmax(found)
        merge = jax.nn.one_hot(jnp.asarray(self.data.class_of), self.data.n_classes)
        return jnp.matmul(of_label, merge, precision=jax.lax.Precision.HIGHEST)

    def step(self) -> jax.Array:
        """Learn from the next batch; its loss, which may not be computed yet."""
        seed, rate = np.uint32(self.settings.seed), self.rates[self.n_done]
        self.state, loss = self._step_program(
            self.state, self.volumes, self.examples, np.asarray(seed), np.asarray(rate)
        )
        self.n_done += 1
        return loss

    def _copy(self, params: Params) -> Params:
        """A copy, for the step takes the memory of what it is given."""
        return {name: jnp.copy(array) for name, array in params.items()}

    # --- the loop ---------------------------------------------------------------------------------

    def go_on_from(self, checkpoints: Checkpoints | None) -> None:
        """Where these were left, if they were."""
        found = None if checkpoints is None else checkpoints.latest(self._kept())
        if found is None:
            return
        self.state, self.best_params = found["state"], found["best_params"]
        step, accuracy, loss, n_since = np.asarray(found["best"], np.float64).tolist()
        self.best = _Best(int(step), accuracy, loss, int(n_since))
        self.n_done = int(self.state.step)

    def _kept(self) -> dict[str, Any]:
        """Everything that the training goes on from."""
        best = np.array(
            [self.best.step, self.best.accuracy, self.best.loss, self.best.n_since], np.float32
        )
        return {
            "state": self.state,
            "best_params": self.best_params,
            "best": put(best, self.everywhere),
        }

    def to_the_end(
        self, checkpoints: Checkpoints | None, every: int, log: _Log, progress: Progress
    ) -> Trained:
        """Step after step until the last one, or until nothing gets better."""
        settings = self.settings
        total, losses, begin = settings.steps, [], time.perf_counter()
        progress("training the network", self.n_done, total)
        while self.n_done < total and not self._is_over:
            losses.append(self.step())
            is_judged = bool(self.judged) and (
                self.n_done % settings.evaluate_every == 0 or self.n_done == total
            )
            if is_judged or self.n_done % _REPORT_EVERY == 0 or self.n_done == total:
                mean = float(np.mean(jax.device_get(losses)))
                seconds = time.perf_counter() - begin
                _check_finite(mean, self.n_done)
                entry = {
                    "step": self.n_done,
                    "loss": mean,
                    "learning_rate": float(self.rates[self.n_done - 1]),
                    "blocks_per_second": len(losses) * settings.batch / seconds,
                }
                if is_judged:
                    entry |= self._judged_now()
                log.write(entry)
                progress("training the network", self.n_done, total)
                losses, begin = [], time.perf_counter()
            if checkpoints and (self.n_done % every == 0 or self.n_done == total or self._is_over):
                checkpoints.save(self.n_done, self._kept())
        progress("training the network", total, total)
        return self._trained()

    @property
    def _is_over(self) -> bool:
        return bool(self.judged) and self.best.n_since >= self.settings.patience

    def _judged_now(self) -> dict[str, float]:
        """Balanced accuracy and loss on the validation cases; the best weights are kept."""
        accuracy, loss = self.balanced_scores(self.state.params)
        # As a checkpoint holds them, so that a run that goes on compares the same numbers.
        accuracy, loss = float(np.float32(accuracy)), float(np.float32(loss))
        self.best = self.best.after(self.n_done, accuracy, loss)
        if self.best.n_since == 0:
            self.best_params = self._copy(self.state.params)
        return {"validation_accuracy": accuracy, "validation_loss": loss}

    def balanced_scores(self, params: Params) -> tuple[float, float]:
        """Share of right classes, and mean -log p, each averaged over the classes that occur."""
        truth = self.data.class_of[np.concatenate([c.labels for c in self.data.validation])]
        found = [np.asarray(self.judge(params, self.volumes, *where)) for where in self.judged]
        p = np.concatenate(found)[: len(truth)]
        n_of = np.bincount(truth, minlength=self.data.n_classes)
        right = np.bincount(truth, p.argmax(axis=1) == truth, self.data.n_classes)
        surprise = -np.log(np.maximum(p[np.arange(len(truth)), truth], 1e-12))
        losses = np.bincount(truth, surprise, self.data.n_classes)
        occurs = n_of > 0
        return (
            float((right[occurs] / n_of[occurs]).mean()),
            float((losses[occurs] / n_of[occurs]).mean()),
        )

    def _trained(self) -> Trained:
        is_judged = bool(self.judged)
        params = self.best_params if is_judged else self.state.params
        if self._is_over:
            stopped = f"early: {self.settings.patience} evaluations without a better one"
        elif is_judged:
            stopped = "after all steps: still within patience"
        else:
            stopped = "after all steps: no validation patients, so the last weights were kept"
        record = {
            "settings": self.settings.to_dict(),
            "n_steps": self.n_done,
            "best_step": self.best.step if is_judged else self.n_done,
            "stopped": stopped,
            "validation_accuracy": self.best.accuracy if is_judged else None,
            "validation_loss": self.best.loss if is_judged else None,
        }
        classifier = Cnn(
            architecture=self.plan.layers,
            pattern=self.plan.pattern,
            window=self.plan.window,
            params={name: np.array(array) for name, array in params.items()},
            merge=self.data.class_of,
            n_classes=self.data.n_classes,
            standardise=self.plan.standardise,
            precision=self.settings.precision,
            device=self.settings.device,
        )
        return Trained(classifier, record)


# --- parts of a run -------------------------------------------------------------------------------


def _optimiser(layers: Architecture, settings: TrainingSettings) -> Any:
    """The seed's Adam where the architecture has its penalty, else AdamW with decayed kernels.

    Its updates are still to be multiplied by minus the learning rate.
    """
    parts = [] if settings.clip is None else [optax.clip_by_global_norm(settings.clip)]
    parts.append(optax.scale_by_adam())
    if not layers.l2:
        parts.append(optax.add_decayed_weights(settings.weight_decay, _kernels))
    return optax.chain(*parts)


def _kernels(params: Params) -> dict[str, bool]:
    return {name: name.endswith(".kernel") for name in params}


def _with_dropout(layers: Architecture, rate: float | None) -> Architecture:
    if rate is None:
        return layers
    head = tuple(
        replace(layer, rate=rate) if isinstance(layer, Dropout) else layer for layer in layers.head
    )
    return replace(layers, head=head)


def _check_mirror(data: TrainingData, settings: TrainingSettings) -> None:
    how = settings.augmentation
    if how is not None and how.mirror and data.partners is None:
        raise ValueError(
            "blocks are to be mirrored, and it is not said which labels are partners; give "
            "partners, see mirror_partners, or mirror=0"
        )


def _parts(
    data: TrainingData, n: int, n_devices: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Validation positions with the number of their case, ``n`` at a time, the last one filled."""
    cases: Sequence[TrainingCase] = [case for case in data.validation if len(case.labels)]
    if not cases:
        return
    number = {id(case): len(data.train) + n for n, case in enumerate(data.validation)}
    of_case = np.concatenate([np.full(len(c.labels), number[id(c)], np.int32) for c in cases])
    positions = np.concatenate([case.positions for case in cases]).astype(np.int32)
    n = -(-min(n, len(of_case)) // n_devices) * n_devices
    for start in range(0, len(of_case), n):
        rows = np.minimum(np.arange(start, start + n), len(of_case) - 1)
        yield of_case[rows], positions[rows]


def _check_finite(loss: float, step: int) -> None:
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {step}; use a lower learning rate or clip the gradient"
        )


class _Log:
    """Lines of JSON, TensorBoard and the caller's report; the first process's alone."""

    def __init__(self, outputs: TrainingOutputs, n_done: int) -> None:
        self.outputs, self.n_done = outputs, n_done
        self._file: IO[str] | None = None
        self._board: Any = None
        self._is_first = jax.process_index() == 0

    def __enter__(self) -> _Log:
        if self._is_first and self.outputs.tensorboard is not None:
            self._board = _board(self.outputs.tensorboard)
        if self._is_first and self.outputs.log is not None:
            path = Path(self.outputs.log)
            kept = _lines_until(path, self.n_done) if self.n_done and path.exists() else []
            self._file = path.open("w", encoding="utf-8")
            self._file.writelines(kept)
        return self

    def write(self, entry: Mapping[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in entry.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(entry["step"]))
        if self._is_first and self.outputs.report is not None:
            self.outputs.report(entry)

    def __exit__(self, *failure: object) -> None:
        for open_one in (self._file, self._board):
            if open_one is not None:
                open_one.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of the steps that are not done again; a line that was cut off is left out."""
    kept = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue
        if is_kept:
            kept.append(line)
    return kept


def _board(folder: str | PathLike[str]) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "a TensorBoard folder was given, and tensorboardX is not installed; pip install "
            "tensorboardX, or leave the folder out"
        ) from None
    return SummaryWriter(str(folder))
