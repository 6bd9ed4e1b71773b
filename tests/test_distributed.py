"""Several processes against one: training, wrappers of torch.distributed around the layer, slots sharded over ranks."""

import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mann_fast import MANN, MemoryLayer, ops, sharded
from mann_fast.cli import main
from mann_fast.data import Dataset, generate_glyphs
from mann_fast.training import TrainConfig, load_checkpoint, processes, resume_run, start_run, train
from mann_fast.training.files import read_json_lines

pytestmark = pytest.mark.skipif(
    os.environ.get("MANN_FAST_TEST_BACKEND", "auto") != "auto", reason="says nothing of kernels"
)


# The processes: started once, for starting them takes longer than all that they do


def work(rank, calls):
    torch.set_num_threads(1)
    while (call := calls.recv()) is not None:
        function, count, store, arguments = call
        torch.manual_seed(0)
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        try:
            calls.send((function(*arguments), None))
        except Exception:
            calls.send((None, traceback.format_exc()))
        finally:
            distributed.destroy_process_group()


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory):
    """in_processes(count, function, *arguments): what the function returns in each of up to three processes of one group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mann_fast"])
    pipes, workers = [], []
    for rank in range(3):
        ours, theirs = context.Pipe()
        workers.append(context.Process(target=work, args=(rank, theirs), daemon=True))
        workers[-1].start()
        theirs.close()  # so that reading ends where the process does
        pipes.append(ours)

    def run(count, function, *arguments):
        store = tmp_path_factory.mktemp("store") / "store"
        for pipe in pipes[:count]:
            pipe.send((function, count, str(store), arguments))
        answers = []
        for pipe in pipes[:count]:
            assert pipe.poll(120), "a process does not answer"
            answers.append(pipe.recv())
        assert not any(error for _, error in answers), "\n".join(filter(None, (x for _, x in answers)))
        return [result for result, _ in answers]

    yield run
    for pipe in pipes:
        pipe.send(None)
    for worker in workers:
        worker.join(10)


# Training

SETTINGS = {
    "image_size": 7,
    "ways": 3,
    "shots": 2,
    "hidden_size": 9,
    "slots": 6,
    "slot_size": 5,
    "heads": 2,
    "steps": 6,
    "batch": 6,
    "warmup": 2,
    "log_every": 2,
    "checkpoint_every": 4,
}


def glyphs():
    drawn = generate_glyphs(12, 4, image_size=7)
    return Dataset(drawn.select(range(8)), drawn.select(range(8, 12)), "glyphs")


def train_glyphs(out, steps, resume=False, stop_in=None):
    """Whether it finished, its last step and its episodes' state; of one process or of one of several."""
    config = TrainConfig(**{**SETTINGS, "steps": steps, "decay": 0.0})
    trainer = (resume_run if resume else start_run)(config, glyphs(), out)
    finished = train(trainer, out, stop=lambda: distributed.get_rank() == stop_in and trainer.step == 3)
    return finished, trainer.step, trainer.episodes.state_dict()["generator"]


def assert_close_checkpoints(a, b):
    a, b = load_checkpoint(a), load_checkpoint(b)
    assert a["step"] == b["step"] and torch.equal(a["rng"], b["rng"]) and a["config"] == b["config"]
    for name, value in a["model"]["state"].items():
        torch.testing.assert_close(b["model"]["state"][name], value, rtol=1e-3, atol=1e-5)


def test_training_shares_every_batch(in_processes, tmp_path):
    """Like one process with the whole batch; and a checkpoint goes on in any number of processes."""
    (alone,) = in_processes(1, train_glyphs, tmp_path / "alone", 6)
    together = in_processes(2, train_glyphs, tmp_path / "together", 6)
    for finished, step, episodes in (alone, *together):
        assert finished and step == 6 and torch.equal(episodes, alone[2])
    assert_close_checkpoints(tmp_path / "alone", tmp_path / "together")
    records = [read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("alone", "together")]
    for one, other in zip(*records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["train_accuracy"] == pytest.approx(other["train_accuracy"], abs=1e-6)

    in_processes(3, train_glyphs, tmp_path / "in_parts", 2)
    in_processes(1, train_glyphs, tmp_path / "in_parts", 4, True)
    in_processes(2, train_glyphs, tmp_path / "in_parts", 6, True)
    a, b = (load_checkpoint(tmp_path / name) for name in ("alone", "in_parts"))
    for name, value in a["model"]["state"].items():
        torch.testing.assert_close(b["model"]["state"][name], value, rtol=1e-3, atol=1e-5)
    kept = read_json_lines(tmp_path / "in_parts" / "metrics.jsonl")
    assert [record["step"] for record in kept] == [2, 4, 6]


def train_encoder(out):
    drawn = generate_glyphs(12, 4, image_size=16)
    config = TrainConfig(**{**SETTINGS, "image_size": 16, "encoder": "conv4", "encoder_steps": 3})
    trainer = start_run(config, Dataset(drawn.select(range(8)), drawn.select(range(8, 12)), "glyphs"), out)
    assert train(trainer, out)
    return trainer.model.state_dict()


def test_all_processes_have_one_encoder_and_its_features(in_processes, tmp_path):
    """Though the batch norms of each have seen other images."""
    one, other = in_processes(2, train_encoder, tmp_path)
    for name, value in one.items():
        assert torch.equal(other[name], value), name


def test_a_signal_to_one_process_stops_all(in_processes, tmp_path):
    found = in_processes(2, train_glyphs, tmp_path, 6, False, 1)
    assert [(finished, step) for finished, step, _ in found] == [(False, 3)] * 2
    assert load_checkpoint(tmp_path)["step"] == 3


def refused_batch():
    with pytest.raises(
        ValueError, match="batch must be a multiple of the number of processes, 2, got 5"
    ) as error:
        start_run(TrainConfig(**{**SETTINGS, "batch": 5}), glyphs(), "nowhere")
    return str(error.value)


def test_a_batch_that_cannot_be_shared_out_is_refused(in_processes):
    in_processes(2, refused_batch)


def test_train_under_torchrun(tmp_path):
    """One process prints and writes; the result is that of one process to rounding."""
    options = ["--task", "copy", "--length", "2", "--steps", "3", "--batch", "4", "--eval-episodes", "2"]
    options += ["--hidden-size", "6", "--slots", "5", "--slot-size", "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "mann_fast", "train", "--out", str(tmp_path / "together"), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 steps in") == done.stderr.count("step 3/3") == 1
    assert done.stderr.count("parameters") == 1
    assert main(["train", "--out", str(tmp_path / "alone"), *options]) == 0
    assert_close_checkpoints(tmp_path / "alone", tmp_path / "together")


def in_turn(file):
    with processes.one_ahead():
        found = file.exists()
        time.sleep(0.1)
        file.touch()
    return found


def test_the_first_process_of_a_machine_fetches_what_the_others_find(in_processes, tmp_path):
    assert in_processes(3, in_turn, tmp_path / "fetched") == [False, True, True]


# Wrappers


def new_layer(**options):
    torch.manual_seed(0)
    sizes = {"num_slots": 6, "slot_size": 4, "num_heads": 2, "output_size": 3}
    return MemoryLayer(5, 7, **sizes, memory_start="learned", dtype=torch.float64, **options)


def trained(layer, x):
    """Outputs and parameters over three calls that carry the state, with a step of SGD after each."""
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    state, outputs = None, []
    for part in x.chunk(3):
        output, state = layer(part, state)
        state = state.detach()
        optimizer.zero_grad()
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    whole = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in layer.parameters()]
    return torch.cat(outputs), whole


def data_parallel(layer):
    return DistributedDataParallel(layer, find_unused_parameters=True)


def sharded_whole(layer):
    return fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))


def sharded_by_module(layer):
    mesh = init_device_mesh("cpu", (2,))
    for module in (layer.heads, layer.controller, layer.projection):
        fully_shard(module, mesh=mesh)
    return fully_shard(layer, mesh=mesh)


def train_wrapped(wrap, x):
    """With this process's half of the samples."""
    return trained(wrap(new_layer()), x.chunk(2, dim=1)[distributed.get_rank()])


@pytest.mark.parametrize("wrap", [data_parallel, sharded_whole, sharded_by_module])
def test_wrapped_layer_trains_as_one_process_does(in_processes, wrap):
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    outputs, parameters = trained(new_layer(), x)
    first, second = in_processes(2, train_wrapped, wrap, x)
    torch.testing.assert_close(torch.cat([first[0], second[0]], dim=1), outputs)
    for found in (first[1], second[1]):
        torch.testing.assert_close(found, parameters)


def train_tensor_parallel(x):
    mesh = init_device_mesh("cpu", (2,))
    whole = ColwiseParallel(output_layouts=Replicate())
    return trained(parallelize_module(new_layer(), mesh, {"heads": whole, "projection": whole}), x)


def test_tensor_parallel_linears(in_processes):
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    expected = trained(new_layer(), x)
    for found in in_processes(2, train_tensor_parallel, x):
        torch.testing.assert_close(found, expected)


def shard_without_hooks():
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(2, 1, 5, dtype=torch.float64)
    for of, name in (("heads", "weight"), ("controller", "bias_hh"), ("", "start")):
        layer = new_layer()
        module = layer.get_submodule(of)
        shard = distribute_tensor(getattr(module, name).detach(), mesh, [Shard(0)])
        setattr(module, name, nn.Parameter(shard))
        with pytest.raises(TypeError, match=rf"^{of}\.?{name} must be a whole tensor .* got a DTensor"):
            layer(x)


def test_a_shard_that_nothing_makes_whole_is_named(in_processes):
    in_processes(2, shard_without_hooks)


def new_model():
    model = MANN(5, 3, 7, num_slots=6, num_heads=2, slot_size=4)
    return model, torch.optim.AdamW(model.parameters())


def save_sharded(folder):
    """After a step: parameters, and AdamW's averages of their gradients."""
    model = fully_shard(new_model()[0], mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 2, 5))[0].square().sum().backward()
    optimizer.step()
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(parts, checkpoint_id=folder)
    averages = [optimizer.state[x]["exp_avg"] for x in model.parameters()]
    return [[x.detach().full_tensor() for x in found] for found in (model.parameters(), averages)]


def load_whole(folder):
    model, optimizer = new_model()
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    return [x.detach() for x in model.parameters()], [
        optimizer.state[x]["exp_avg"] for x in model.parameters()
    ]


@pytest.mark.parametrize("count", [1, 3])
def test_a_distributed_checkpoint_loads_in_any_number_of_processes(in_processes, count, tmp_path):
    saved, _ = in_processes(2, save_sharded, str(tmp_path))
    for loaded in in_processes(count, load_whole, str(tmp_path)):
        for found, expected in zip(loaded, saved, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Slots sharded over ranks

B, D, R, T = 2, 5, 2, 6


def own(x, dim=1):
    """This rank's slots; the first ranks have one more where they cannot be shared out evenly."""
    return x.tensor_split(distributed.get_world_size(), dim)[distributed.get_rank()]


def by_sizes(sizes, x, dim=1):
    return x.split(sizes, dim)[distributed.get_rank()]


@contextmanager
def collectives(sent):
    """What this rank sends while this lasts: which collective, and how many numbers."""
    gather, reduce = distributed.all_gather, distributed.all_reduce
    distributed.all_gather = lambda found, x, group: (
        sent.append(("all_gather", x.numel())),
        gather(found, x, group),
    )
    distributed.all_reduce = lambda x, group: (
        sent.append(("all_reduce", x.numel())),
        reduce(x, group=group),
    )
    try:
        yield
    finally:
        distributed.all_gather, distributed.all_reduce = gather, reduce


def whole(x, dim=1):
    return x


def leaf(x):
    return x.detach().clone().requires_grad_()


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def content_results(read, part, memory, inputs, grads):
    """Read, and by slots: weights and the memory's gradient; then the other gradients."""
    memory, inputs = leaf(part(memory)), [x if x is None else leaf(x) for x in inputs]
    found, weights = read(memory, *inputs)
    torch.autograd.backward([found, weights], [grads[0], part(grads[1], 2)])
    return found, [x.grad for x in inputs if x is not None], weights, memory.grad


def check_content(num_slots, sharpened):
    torch.manual_seed(0)
    inputs = [double(B, R, D), 5 * double(B, R) if sharpened else None]
    arguments = 10 * double(B, num_slots, D), inputs, (double(B, R, D), double(B, R, num_slots))
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    *same, weights, grad = content_results(ops.content_read, whole, *arguments)
    found = content_results(lambda *x: sharded.content_read(*x, mesh=mesh), own, *arguments)
    torch.testing.assert_close(found, (*same, own(weights, 2), own(grad)))


@pytest.mark.parametrize("sharpened", [False, True])
@pytest.mark.parametrize(("count", "num_slots"), [(2, 7), (3, 7), (3, 3)])
def test_sharded_content_read(in_processes, count, num_slots, sharpened):
    in_processes(count, check_content, num_slots, sharpened)


def check_least_used():
    group = distributed.group.WORLD
    usage = torch.tensor([[1.0, 0, -0.0, 0, 2, 0, 0], [3, 2, 1, 1, 1, 2, 3]])
    usage = torch.cat([usage, torch.rand(1, 7), torch.full((1, 7), torch.nan)])
    usage[1, 0] = torch.nan
    usage[3, 5] = torch.inf
    for dtype in (torch.float32, torch.float64):
        for n in (0, 1, 2):
            expected = ops.least_used(usage.to(dtype), n)
            assert torch.equal(sharded.least_used(own(usage.to(dtype)), n, mesh=group), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_sharded_least_used(in_processes, count):
    in_processes(count, check_least_used)


def lrua_results(step, part, state, inputs, grads, options):
    """Reads and the gradients of what all ranks have; then, by slots, the state and its gradients."""
    leaves = leaf(part(state.memory)), leaf(part(state.read_weights, 2))
    inputs = [x if x is None else leaf(x) for x in inputs]
    state, reads = ops.LRUAState(*leaves, part(state.usage)), []
    for t in range(T):
        read, state = step(state, *(x if x is None else x[t] for x in inputs), **options)
        reads.append(read)
    reads, (of_reads, of_memory, of_weights) = torch.stack(reads), grads
    torch.autograd.backward(
        [reads, state.memory, state.read_weights], [of_reads, part(of_memory), part(of_weights, 2)]
    )
    assert not state.usage.requires_grad
    given = [x.grad for x in inputs if x is not None]
    return reads, given, state.memory, state.usage, leaves[0].grad, state.read_weights, leaves[1].grad


def check_lrua(num_slots, start, sharpened, options):
    torch.manual_seed(0)
    state = ops.LRUAState.initial(B, num_slots, D, R, dtype=torch.float64)
    if not start:
        state = ops.LRUAState(
            double(B, num_slots, D), double(B, R, num_slots).softmax(2), double(B, num_slots).exp()
        )
    inputs = [double(T, B, R, D), double(T, B, R, D), double(T, B, R)]
    inputs.append(5 * double(T, B, R).abs() if sharpened else None)
    grads = double(T, B, R, D), double(B, num_slots, D), double(B, R, num_slots)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    expected = lrua_results(ops.lrua_step, whole, state, inputs, grads, options)
    found = lrua_results(sharded.lrua_step, own, state, inputs, grads, {**options, "mesh": mesh})
    expected = (*expected[:2], *map(own, expected[2:5]), *(own(x, 2) for x in expected[5:]))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("write_target", ["per_head", "shared"])
@pytest.mark.parametrize("order", ["write_first", "read_first"])
@pytest.mark.parametrize(("count", "num_slots"), [(2, 7), (3, 7), (2, 4)])
def test_sharded_lrua_step(in_processes, count, num_slots, order, write_target):
    """From the start, where usages tie, and from a state in use; also where all slots are among the least used."""
    options = {"order": order, "write_target": write_target, "usage_decay": 0.9, "eps": 1e-3}
    for start in (True, False):
        in_processes(count, check_lrua, num_slots, start, start, options)


def check_bits(num_slots):
    """Equal slots keep equal bits, in float32 and beside half-precision keys; and what is sent."""
    torch.manual_seed(0)
    one = state = ops.LRUAState.initial(B, num_slots, D, R, dtype=torch.float32)
    state = ops.LRUAState(own(state.memory), own(state.read_weights, 2), own(state.usage))
    sent = []
    with collectives(sent):
        for t in range(4):
            inputs = [torch.randn(B, R, D), torch.randn(B, R, D), torch.randn(B, R)]
            inputs = [x.bfloat16() if t % 2 else x for x in inputs]
            expected, one = ops.lrua_step(one, *inputs)
            with torch.autocast("cpu", torch.bfloat16):  # changes nothing
                read, state = sharded.lrua_step(state, *inputs, mesh=distributed.group.WORLD)
            torch.testing.assert_close(read, expected)
            torch.testing.assert_close(state.memory, own(one.memory))
    assert sent == [("all_gather", B * R * (2 * D + R + 3))] * 4
    return read, state


def test_equal_slots_of_all_ranks_have_equal_bits(in_processes):
    answers = in_processes(3, check_bits, 31)
    assert all(torch.equal(read, answers[0][0]) for read, _ in answers)
    usage = torch.cat([state.usage for _, state in answers], 1)
    weights = torch.cat([state.read_weights for _, state in answers], 2)
    # Four steps with two heads from a start at slot 0: slots 9 on have been written to by nobody.
    assert (usage[:, 9:] == usage[:, 9:10]).all() and (weights[:, :, 9:] == weights[:, :, 9:10]).all()


def check_a_step_with_what_is_not_finite():
    state = ops.LRUAState(double(3, 6, D), double(3, R, 6).softmax(2), double(3, 6).exp())
    state.memory[0, state.usage[0].argmin()] = torch.nan  # erased: cleared
    state.memory[1, state.usage[1].argmax()] = torch.nan  # stays, in its sample
    inputs = double(3, R, D), double(3, R, D), double(3, R)
    for order in ("write_first", "read_first"):
        read, expected = ops.lrua_step(state, *inputs, order=order)
        mine = ops.LRUAState(own(state.memory), own(state.read_weights, 2), own(state.usage))
        found, new = sharded.lrua_step(mine, *inputs, order=order, mesh=distributed.group.WORLD)
        expected = own(expected.memory), own(expected.read_weights, 2), own(expected.usage)
        torch.testing.assert_close((found, *new), (read, *expected), equal_nan=True)


def test_sharded_step_with_what_is_not_finite(in_processes):
    in_processes(2, check_a_step_with_what_is_not_finite)


def check_errors():
    memory, key = leaf(double(1, 3, D)), double(1, R, D)
    group = distributed.group.WORLD
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh or a process group, got int"):
        sharded.content_read(memory, key, mesh=2)
    with pytest.raises(ValueError, match="mesh must have one dimension"):
        sharded.content_read(memory, key, mesh=init_device_mesh("cpu", (2, 1)))
    with pytest.raises(TypeError, match="key must .*float64"):
        sharded.content_read(memory, key.float(), mesh=group)
    with pytest.raises(ValueError, match="n must be within"):
        sharded.least_used(double(1, 3), 4, mesh=group)
    state = ops.LRUAState.initial(1, 3, D, 4 - 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="usage_decay must be within"):
        sharded.lrua_step(state, double(1, 3, D), double(1, 3, D), double(1, 3), usage_decay=2, mesh=group)
    read, _ = sharded.content_read(memory, key, mesh=group)
    (grad,) = torch.autograd.grad(read.square().sum(), memory, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="twice|no second derivative"):
        grad.sum().backward()


def test_sharded_ops_refuse_what_they_cannot_do(in_processes):
    in_processes(2, check_errors)


def sparse_read_results(read, part, memory, inputs, grads, **options):
    memory, inputs = leaf(part(memory)), [x if x is None else leaf(x) for x in inputs]
    found, slots, weights = read(memory, *inputs, **options)
    torch.autograd.backward([found, weights], grads)
    return found, slots, weights, [x.grad for x in inputs if x is not None], memory.grad


def check_sparse_read(sizes, num_reads, sharpened):
    """Also with equal slots on several ranks, and with NaN, which is read first."""
    torch.manual_seed(0)
    memory = double(3, sum(sizes), D)
    memory[0] = memory[0, :1]
    memory[1, 1::3] = memory[1, 1]
    memory[2, -1] = torch.nan
    grads = double(3, R, D), double(3, R, num_reads)
    inputs = [double(3, R, D), 5 * double(3, R) if sharpened else None]
    mine, options = partial(by_sizes, sizes), {"num_reads": num_reads}
    *same, grad = sparse_read_results(ops.sparse_read, whole, memory, inputs, grads, **options)
    sent, group = [], distributed.group.WORLD
    with collectives(sent):
        found = sparse_read_results(sharded.sparse_read, mine, memory, inputs, grads, **options, mesh=group)
    torch.testing.assert_close(found, (*same, mine(grad)), equal_nan=True)
    # In float64 an integer is as long as a number. One more says how many slots there are.
    assert sent == [("all_gather", 3 * R * num_reads * (D + 1) + 1)]


@pytest.mark.parametrize("sharpened", [False, True])
@pytest.mark.parametrize(("sizes", "num_reads"), [((4, 3), 3), ((3, 3, 1), 2), ((1, 1, 5), 7), ((30, 1), 4)])
def test_sharded_sparse_read(in_processes, sizes, num_reads, sharpened):
    in_processes(len(sizes), check_sparse_read, sizes, num_reads, sharpened)


def sparse_results(step, part, state, inputs, grads, options):
    """What all ranks have, and what is this rank's: reads, state, gradients."""
    memory, weights = leaf(part(state.memory)), leaf(state.read_weights)
    inputs = [x if x is None else leaf(x) for x in inputs]
    state = state._replace(memory=memory, read_weights=weights, last_access=part(state.last_access))
    reads = []
    for t in range(T):
        read, state = step(state, *(x if x is None else x[t] for x in inputs), **options)
        reads.append(read)
    reads, (of_reads, of_memory, of_weights) = torch.stack(reads), grads
    torch.autograd.backward(
        [reads, state.memory, state.read_weights], [of_reads, part(of_memory), of_weights]
    )
    given = [x.grad for x in (weights, *inputs) if x is not None]
    shared = reads, state.read_slots, state.read_weights, state.clock, given
    return shared, (state.memory, state.last_access, memory.grad)


def check_sparse_step(sizes, num_reads, start, optional, options):
    torch.manual_seed(0)
    num_slots = sum(sizes)
    state = ops.SparseState.initial(B, num_slots, D, R, num_reads, dtype=torch.float64)
    if not start:
        state = ops.SparseState(
            double(B, num_slots, D),
            torch.rand(B, R, num_slots).argsort(2)[:, :, :num_reads],
            double(B, R, num_reads).softmax(2),
            torch.randint(-1, 4, (B, num_slots)),
            torch.full((B,), 4),
        )
    inputs = [double(T, B, R, D), double(T, B, R, D), double(T, B, R)]
    inputs += [5 * double(T, B, R).abs(), double(T, B, R)] if optional else [None, None]
    grads = double(T, B, R, D), double(B, num_slots, D), double(B, R, num_reads)
    shared, own = sparse_results(ops.sparse_step, whole, state, inputs, grads, options)
    rank, mine = distributed.get_rank(), partial(by_sizes, sizes)
    options = {**options, "mesh": distributed.group.WORLD, "first_slot": sum(sizes[:rank])}
    sent = []
    with collectives(sent):
        found = sparse_results(sharded.sparse_step, mine, state, inputs, grads, options)
    torch.testing.assert_close(found, (shared, tuple(map(mine, own))), rtol=1e-9, atol=1e-11)
    once, back = B * R * ((num_reads + 1) * (D + 1) + 1) + 2, B * R * (D + num_reads + 1 + optional)
    assert sent == [("all_gather", once)] * T + [("all_reduce", back)] * T


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    ("sizes", "num_reads"), [((4, 3), 3), ((3, 3, 1), 2), ((1, 1, 5), 7), ((30, 1), 4), ((1, 1), 1)]
)
def test_sharded_sparse_step(in_processes, sizes, num_reads, start, optional):
    """From the start, where slots and times are equal, and from a state in use; ranks of fewer slots than heads or reads; and
    in how many collectives, of how many numbers."""
    options = {"threshold": 0.1, "eps": 1e-3} if optional else {}
    in_processes(len(sizes), check_sparse_step, sizes, num_reads, start, optional, options)


def check_sparse_step_in_half_precision(sizes):
    """Beside half-precision keys, where integers are two numbers long; autocast changes nothing."""
    torch.manual_seed(0)
    one = ops.SparseState.initial(B, sum(sizes), D, R, 3, dtype=torch.float32)
    mine = partial(by_sizes, sizes)
    state = one._replace(memory=mine(one.memory), last_access=mine(one.last_access))
    options = {"mesh": distributed.group.WORLD, "first_slot": sum(sizes[: distributed.get_rank()])}
    for t in range(5):
        inputs = [torch.randn(B, R, D), torch.randn(B, R, D), torch.randn(B, R)]
        inputs = [x.bfloat16() if t % 2 else x for x in inputs]
        expected, one = ops.sparse_step(one, *inputs)
        sent = []
        with torch.autocast("cpu", torch.bfloat16), collectives(sent):
            read, state = sharded.sparse_step(state, *inputs, **options)
        assert sent == [("all_gather", B * R * (4 * (D + 2) + 2) + 4)]
        torch.testing.assert_close(read, expected)
        whole_state = mine(one.memory), one.read_slots, one.read_weights, mine(one.last_access), one.clock
        torch.testing.assert_close(tuple(state), whole_state)
    return read, state.read_slots


def test_sharded_sparse_step_in_half_precision(in_processes):
    answers = in_processes(3, check_sparse_step_in_half_precision, (9, 2, 20))
    for read, slots in answers[1:]:
        assert torch.equal(read, answers[0][0]) and torch.equal(slots, answers[0][1])


def check_a_sparse_step_with_what_is_not_finite():
    sizes = (3, 4)
    mine, state = partial(by_sizes, sizes), ops.SparseState.initial(3, 7, D, R, 2, dtype=torch.float64)
    memory = double(3, 7, D)
    memory[0, 1] = torch.nan  # erased, the oldest: cleared
    memory[1, 6] = memory[1, 0] = torch.nan  # stay, and are read first
    vector = double(3, R, D)
    vector[2, 1] = torch.inf  # reaches the slots of its head alone
    inputs = double(3, R, D), vector, double(3, R)
    state = state._replace(memory=memory)
    read, expected = ops.sparse_step(state, *inputs)
    assert expected.read_slots[1].tolist() == [[0, 6]] * R
    options = {"mesh": distributed.group.WORLD, "first_slot": (0, 3)[distributed.get_rank()]}
    own_state = state._replace(memory=mine(memory), last_access=mine(state.last_access))
    found, new = sharded.sparse_step(own_state, *inputs, **options)
    torch.testing.assert_close(
        (found, new.memory, new.read_slots, new.last_access),
        (read, mine(expected.memory), expected.read_slots, mine(expected.last_access)),
        equal_nan=True,
    )


def test_sharded_sparse_step_with_what_is_not_finite(in_processes):
    in_processes(2, check_a_sparse_step_with_what_is_not_finite)


def check_sparse_errors():
    group, rank = distributed.group.WORLD, distributed.get_rank()
    memory, key = leaf(double(1, 3, D)), double(1, R, D)
    for num_reads, error, text in (
        (7, ValueError, r"num_reads must be within \[1, N = 6\], got 7"),
        (0, ValueError, "num_reads must be within .* got 0"),
        (2.0, TypeError, "num_reads must be an int, got float"),
    ):
        with pytest.raises(error, match=text):
            sharded.sparse_read(memory, key, num_reads=num_reads, mesh=group)
    state = ops.SparseState.initial(1, 3, D, R, 2, dtype=torch.float64)

    def step(state=state, first_slot=3 * rank, **options):
        return sharded.sparse_step(
            state, key, key, double(1, R), first_slot=first_slot, mesh=group, **options
        )

    step()
    with pytest.raises(
        ValueError, match=r"first_slot must be \[0, 3\] by rank, for \[3, 3\] slots, got \[0, 0\]"
    ):
        step(first_slot=0)
    with pytest.raises(TypeError, match="first_slot must be an int, got float"):
        step(first_slot=0.0)
    with pytest.raises(ValueError, match="threshold must be within"):
        step(threshold=1)
    with pytest.raises(ValueError, match=r"state.read_slots must be within \[0, N = 6\), got 6"):
        step(state._replace(read_slots=state.read_slots + 5))
    many = ops.SparseState.initial(1, 7, D, R, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="must have 1 <= K <= 6, the slots of all ranks, got 7"):
        step(many._replace(memory=many.memory[:, :3], last_access=many.last_access[:, :3]))
    read, _ = step()
    (grad,) = torch.autograd.grad(
        sharded.sparse_read(memory, key, num_reads=2, mesh=group)[0].square().sum(), memory, create_graph=True
    )
    with pytest.raises((RuntimeError, NotImplementedError), match="twice|no second derivative"):
        grad.sum().backward()


def test_sharded_sparse_ops_refuse_what_they_cannot_do(in_processes):
    in_processes(2, check_sparse_errors)


# The page about all this


def run_examples(page):
    """Each alone, but for the module that the first is saved as."""
    first, *examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ranks = sys.modules["ranks"] = types.ModuleType("ranks")
    exec(compile(first, str(page), "exec"), ranks.__dict__)
    for example in examples:
        namespace = {}
        exec(compile(example, str(page), "exec"), namespace)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = MemoryLayer(64, 200, num_slots=namespace["N"])
        one(torch.randn(10, 4, 64))[0].square().mean().backward()
    for found, expected in zip(namespace["layer"].parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-6)
    return len(examples)


def test_examples_of_the_page_run(in_processes):
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    if not page.exists():
        pytest.skip("the tests run without the source tree's docs")
    assert in_processes(2, run_examples, page) == [7, 7]
