"""Several processes against one: training, wrappers of torch.distributed around the layer, slots sharded over ranks."""

import multiprocessing
import os
import subprocess
import sys
import traceback

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mann_fast import MANN, MemoryLayer
from mann_fast.cli import main
from mann_fast.data import Dataset, generate_glyphs
from mann_fast.training import TrainConfig, load_checkpoint, resume_run, start_run, train
from mann_fast.training.files import read_json_lines

pytestmark = pytest.mark.skipif(
    os.environ.get("MANN_FAST_TEST_BACKEND", "auto") != "auto", reason="says nothing of kernels"
)


# The processes: started once, for starting them takes longer than all that they do


def work(rank, calls):
    torch.set_num_threads(1)
    while (call := calls.recv()) is not None:
        function, count, store, arguments = call
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
            assert pipe.poll(60), "a process does not answer"
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


def save_sharded(folder):
    model = fully_shard(
        MANN(5, 3, 7, num_slots=6, num_heads=2, slot_size=4), mesh=init_device_mesh("cpu", (2,))
    )
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder)
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def load_in_one_or_more(folder):
    model = MANN(5, 3, 7, num_slots=6, num_heads=2, slot_size=4)
    content = {"model": model.state_dict()}
    checkpoint.load(content, checkpoint_id=folder)
    model.load_state_dict(content["model"])
    return model.state_dict()


@pytest.mark.parametrize("count", [1, 3])
def test_a_distributed_checkpoint_loads_in_any_number_of_processes(in_processes, count, tmp_path):
    saved, _ = in_processes(2, save_sharded, str(tmp_path))
    for loaded in in_processes(count, load_in_one_or_more, str(tmp_path)):
        torch.testing.assert_close(dict(loaded), saved, rtol=0, atol=0)
