"""Approximate search in a sparse memory: what it finds, when it knows nothing any more, and how it says what it misses."""

import copy
import io
import sys

import numpy as np
import pytest
import torch
from cases import BACKEND

from mann_fast import MemoryLayer, ops
from mann_fast.layers import Sparse, sparse_index

pytestmark = pytest.mark.skipif(BACKEND != "cpp", reason="an index serves the C++ kernels")
N, D, R, K = sparse_index.LEAST_SLOTS, 5, 2, 3
EVERY_LIST = 1000  # more probes than there are lists


@pytest.fixture
def soon(monkeypatch):
    """Told of few rows, and soon."""
    monkeypatch.setattr(sparse_index, "WORTH", 4)
    monkeypatch.setattr(sparse_index, "LEAST_TOLD", 32)


def needs_faiss():
    pytest.importorskip("faiss", reason="faiss, of the extra index, is not installed")


def assert_same(actual, expected):
    """But for rounding, as an index goes step by step and the exact search in one call. Slots and times are the same."""
    for a, b in zip(actual, expected, strict=True):
        if a is None or not a.is_floating_point():
            assert b is None if a is None else torch.equal(a, b)
        else:
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def make(probes, **options):
    torch.manual_seed(0)
    sizes = {"num_slots": N, "slot_size": D, "num_heads": R, "num_reads": K}
    return MemoryLayer(4, 6, addressing="sparse", probes=probes, dtype=torch.float64, **{**sizes, **options})


def varied(layer, batch=2):
    """A state in which every row is another."""
    state = layer.initial_state(batch)
    rows = torch.randn(batch, N, D, dtype=torch.float64)
    return state._replace(memory=state.memory._replace(memory=rows))


def in_use(layer):
    """Of every sample, whether an index goes on to the next call."""
    kept = layer.memory._index._kept
    return [] if kept is None else [sample.index is not None for sample in kept.samples]


def test_the_candidates_and_what_has_changed_are_compared():
    """The raw step: the best of the candidates, the slots in the list, those it writes and the first K, each once."""
    generator = torch.Generator().manual_seed(0)
    for batch, count, candidates, reads in ((2, 0, 7, 3), (1, 5, 1, 4), (3, 60, 40, 2), (1, 0, 0, 1)):
        slots = 1500
        memory = torch.randn(batch, slots, D, generator=generator, dtype=torch.float64)
        lists = torch.ops.mann_fast.sparse_lists(memory)
        slots_before = (
            torch.randperm(slots, generator=generator)[: R * reads].view(1, R, reads).repeat(batch, 1, 1)
        )
        weights = torch.full((batch, R, reads), 1 / reads, dtype=torch.float64)
        times = torch.randint(0, 9, (batch, slots), generator=generator)
        clock = torch.full((batch,), 9)
        key, vector = (torch.randn(batch, R, D, generator=generator, dtype=torch.float64) for _ in range(2))
        gate = torch.zeros(batch, R, dtype=torch.float64)

        def step(given, memory=memory, lists=lists, slots_before=slots_before, weights=weights, times=times):  # noqa: B023
            state = (memory, slots_before, weights, times, clock)  # noqa: B023
            told = (key, vector, gate, gate + 2, gate)  # noqa: B023
            return torch.ops.mann_fast.sparse_step_(
                *state, *told, None, None, None, lists, given, 0.005, 1e-6
            )

        slots_before = step(None)[1]  # makes the lists: every row is another, and all are compared
        assert (lists[:, 0] == -1).all()
        changed = torch.stack(
            [torch.randperm(slots, generator=generator)[:count].sort()[0] for _ in range(batch)]
        )
        lists[:, 0], lists[:, 1 : 1 + count] = count, changed
        found = torch.randint(-1, slots, (batch, candidates), generator=generator)
        found[:, :1] = found[:, :1].abs()
        read, after, weights_after, _, oldest, _ = step(found, slots_before=slots_before)
        for b in range(batch):
            touched = {*slots_before[b].flatten().tolist(), *oldest[b].tolist()}
            known = {*changed[b].tolist(), *touched}
            assert {*lists[b, 1 : 1 + lists[b, 0]].tolist()} == known
            compared = {*known, *found[b].tolist(), *range(reads)} if candidates else known | {-1}
            compared = torch.tensor(sorted(compared - {-1}))
            if not candidates:  # nothing was found: those of the list, and the first K of the others
                others = [i for i in range(slots) if i not in known][:reads]
                compared = torch.tensor(sorted(known | set(others)))
            rows = memory[b, compared]
            cosine = (
                key[b]
                @ rows.T
                * torch.rsqrt(key[b].square().sum(1, keepdim=True) * rows.square().sum(1) + 1e-6)
            )
            score, best = cosine.sort(1, descending=True)
            assert torch.equal(after[b], compared[best[:, :reads]])
            expected = torch.softmax(2 * score[:, :reads], 1)
            assert (weights_after[b] - expected).abs().max() < 1e-12
            assert (read[b] - (expected.unsqueeze(2) * memory[b, after[b]]).sum(1)).abs().max() < 1e-12


@pytest.mark.parametrize("start", ["constant", "learned"])
def test_with_every_list_searched_it_is_the_exact_search(start, soon, monkeypatch):
    """Forward and backward, over calls that follow one another, with resets and lengths."""
    needs_faiss()
    # More than change here: among rows that are alike an index need not find the first.
    monkeypatch.setattr(sparse_index, "LEAST_TOLD", 1024)
    exact, layer = make(None, memory_start=start), make(EVERY_LIST, memory_start=start)
    if start == "learned":
        for x in (exact, layer):
            with torch.no_grad():
                x.start.copy_(torch.randn(N, D, generator=torch.Generator().manual_seed(1)))
    states = [varied(exact)] * 2
    used = []
    for call in range(4):
        torch.manual_seed(call)
        x = torch.randn(12, 2, 4, dtype=torch.float64)
        given = {}
        if call == 1:
            given = {"resets": torch.zeros(12, 2, dtype=torch.bool)}
            given["resets"][5, 0] = True
        if call == 2:
            given = {"lengths": torch.tensor([9, 12]), "resets": torch.zeros(12, 2, dtype=torch.bool)}
            given["resets"][10, 0] = True  # in the padding: it does not begin anew
        found = []
        for i, tested in enumerate((exact, layer)):
            output, after = tested(x, states[i], **given)
            loss = output.sin().sum() + after.memory.memory.square().sum()
            grads = torch.autograd.grad(loss, list(tested.parameters()), allow_unused=True)
            found.append([output, *after.flatten(), *grads])  # a start gets no gradient where none begins
            states[i] = after.detach()
        assert_same(*found)
        used.append(in_use(layer))
    # A new constant start has nothing that an index is worth; a learned one has.
    assert used == [[True, True]] + [[start == "learned", True]] * 3
    recall = layer.memory.recall()
    assert recall == (1, 1, 1) and exact.memory.recall() is None


def test_rows_that_change_are_found_as_they_are(soon, monkeypatch):
    """From a start of equal rows: what was written before the index was told and after, and again; the lists are made anew as
    they grow."""
    needs_faiss()
    monkeypatch.setattr(sparse_index, "AUDIT_EVERY", 1)
    monkeypatch.setattr(sparse_index, "AUDITS", 10_000)
    made = []
    tell = sparse_index._Sample.tell

    def telling(self, *arguments):
        before = self.index
        tell(self, *arguments)
        made.append((self.index is not before, self.index.ntotal, int(self.told.sum())))

    monkeypatch.setattr(sparse_index._Sample, "tell", telling)
    layer = make(EVERY_LIST)
    with torch.no_grad():
        _, state = layer(torch.randn(400, 1, 4, dtype=torch.float64))
    assert len(made) > 4 and 1 < sum(new for new, *_ in made) < len(made)
    assert all(total == told for _, total, told in made)  # each row once
    recall = layer.memory.recall()
    assert recall.audits > 100 and recall.slots == 1 and recall.mass > 1 - 1e-6
    # Rows are in the index as they are, the others in the list but for those that nobody wrote.
    (sample,), lists = layer.memory._index._kept.samples, layer.memory._index._kept.lists[0]
    told = np.flatnonzero(sample.told)
    rows = state.memory.memory[0].float()
    rows *= torch.rsqrt(rows.square().sum(1, keepdim=True) + layer.eps)
    stored = torch.from_numpy(np.stack([sample.index.reconstruct(int(slot)) for slot in told]))
    assert len(told) > 100 and (stored - rows[told]).abs().max() < 1e-6
    listed = lists[1 : 1 + lists[0]]
    assert not sample.told[listed].any()
    neither = torch.ones(N, dtype=torch.bool)
    neither[told] = neither[listed] = False
    assert (state.memory.memory[0, neither] == 1e-6).all()


def test_more_changes_than_the_lists_hold(monkeypatch):
    """With many heads: meanwhile all rows are compared, and no index is asked; then it is told of what it does not hold."""
    needs_faiss()
    monkeypatch.setattr(sparse_index, "AUDIT_EVERY", 1)
    monkeypatch.setattr(sparse_index, "AUDITS", 10_000)
    monkeypatch.setattr(sparse_index, "WORTH", 1024)
    full, asked = [], []
    candidates = sparse_index.IndexedCall.candidates

    def asking(self, key):
        found = candidates(self, key)
        full.append(self.samples[0].index is not None and self._lists[0, 0] < 0)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(sparse_index.IndexedCall, "candidates", asking)
    layer = make(4, num_heads=8, num_reads=8)
    state = layer.initial_state(1)
    state = state._replace(memory=state.memory._replace(memory=torch.randn(1, N, D, dtype=torch.float64)))
    totals = []
    with torch.no_grad():
        for _ in range(16):
            _, state = layer(3 * torch.randn(100, 1, 4, dtype=torch.float64), state)
            (sample,) = layer.memory._index._kept.samples
            totals.append((0 if sample.index is None else sample.index.ntotal, int(sample.told.sum())))
    assert any(full) and any(asked) and not any(a and f for a, f in zip(asked, full, strict=True))
    assert all(total == told for total, told in totals) and totals[-1][0] > 0  # each row once
    assert layer.memory._index.steps == layer.memory.recall().audits == sum(asked)
    assert layer.memory.recall().slots < 1


def test_nan_does_not_stay_in_the_recall(soon, monkeypatch):
    needs_faiss()
    monkeypatch.setattr(sparse_index, "AUDIT_EVERY", 1)
    layer = make(EVERY_LIST)
    with torch.no_grad():
        _, state = layer(torch.randn(200, 1, 4, dtype=torch.float64))
        before = layer.memory.recall()
        state.memory.memory[0, 7] = (
            torch.nan
        )  # also in the index of the state, which goes on with a state of its own
        layer(torch.randn(50, 1, 4, dtype=torch.float64), state)
    assert before is not None and np.isfinite(layer.memory.recall().mass)


def test_it_says_what_it_misses(soon, monkeypatch):
    """With one list of many searched: the shares by hand, over the same steps."""
    needs_faiss()
    monkeypatch.setattr(sparse_index, "AUDIT_EVERY", 1)
    layer = make(1)
    slots, masses = [], []
    with torch.no_grad():
        _, state = layer(torch.randn(10, 1, 4, dtype=torch.float64), varied(layer, 1))
        assert in_use(layer) == [True]
        layer.memory._index.audits.clear()
        for _ in range(20):
            _, state = layer(torch.randn(1, 1, 4, dtype=torch.float64), state)
            key, _, _, sharpness, _ = layer.memory.split(layer.heads(state.controller[0]))
            memory, found = state.memory.memory[0], state.memory.read_slots[0]
            squares = key[0].square().sum(1, keepdim=True) * memory.square().sum(1)
            cosine = key[0] @ memory.T * torch.rsqrt(squares + layer.eps)
            best, exact = cosine.topk(K)
            slots += [len({*a.tolist()} & {*b.tolist()}) / K for a, b in zip(found, exact, strict=True)]
            scale = sharpness[0].unsqueeze(1)
            sums = [torch.logsumexp(scale * x, 1) for x in (cosine.gather(1, found), best)]
            masses += (sums[0] - sums[1]).exp().tolist()
    recall = layer.memory.recall()
    assert recall.audits == 20 and recall.slots < 1  # random rows, and one list of a hundred
    assert abs(recall.slots - np.mean(slots)) < 1e-12 and abs(recall.mass - np.mean(masses)) < 1e-9


@pytest.mark.parametrize("change", ["memory", "last_access", "another", "steps"])
def test_a_state_that_is_another_has_no_index(change, soon, monkeypatch):
    """With one probe, so that to go on with the index would be seen."""
    needs_faiss()
    layer, exact = make(1), make(None)
    with torch.no_grad():
        _, state = layer(torch.randn(10, 2, 4, dtype=torch.float64), varied(layer))
        assert in_use(layer) == [True, True]
        memory = state.memory
        if change == "memory":
            memory.memory[0, 7] += 1
        elif change == "last_access":
            memory.last_access[0, 7] = 3
        elif change == "another":
            state = state._replace(memory=memory._replace(memory=memory.memory.clone()))
        monkeypatch.setattr(sparse_index, "WORTH", 1e9)
        x = torch.randn(6, 2, 4, dtype=torch.float64)
        a, after = layer(x, state)
        b, expected = exact(x, state)
    if change == "steps":  # nothing was changed: the control of this test
        assert not torch.allclose(a, b) and in_use(layer) == [True, True]
        return
    assert in_use(layer) == [False, False]
    assert_same([a, *after.flatten()], [b, *expected.flatten()])


def test_a_batch_of_gradients_is_refused(soon):
    """A loop of steps changes one gradient in place."""
    needs_faiss()
    layer = make(EVERY_LIST)
    loss = layer(torch.randn(4, 2, 4, dtype=torch.float64))[0].square().sum()
    with pytest.raises(NotImplementedError, match="takes no batch of them .* differentiate one at a time"):
        torch.autograd.grad(loss, list(layer.parameters()), torch.ones(2).double(), is_grads_batched=True)


def test_a_stream_step_by_step_keeps_it(soon):
    """Also in inference mode, whose tensors count no changes, and between calls that took a gradient."""
    needs_faiss()
    layer, exact = make(EVERY_LIST), make(None)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        torch.manual_seed(0)
        states = [varied(layer)] * 2
        for _ in range(9):
            x = torch.randn(1, 2, 4, dtype=torch.float64)
            with mode():
                found = [tested(x, state) for tested, state in zip((layer, exact), states, strict=True)]
            assert_same(*([output, *state.flatten()] for output, state in found))
            states = [state.detach() for _, state in found]
        assert in_use(layer) == [True, True]


def test_copies_and_files_have_no_index(soon):
    needs_faiss()
    layer = make(EVERY_LIST)
    with torch.no_grad():
        layer(torch.randn(8, 2, 4, dtype=torch.float64), varied(layer))
    assert in_use(layer) == [True, True]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.memory == layer.memory and other.probes == EVERY_LIST
        assert other.memory._index is not layer.memory._index and in_use(other) == []
    assert len(file.getvalue()) < 100_000


def test_few_slots_and_other_backends_are_searched_exactly(soon):
    needs_faiss()
    torch.manual_seed(0)
    x = torch.randn(20, 2, 4, dtype=torch.float64)
    for slots, backend in ((N - 1, "auto"), (N, "reference")):
        layer, exact = (make(probes, num_slots=slots) for probes in (1, None))
        with torch.no_grad(), ops.backend(backend):
            assert torch.equal(layer(x)[0], exact(x)[0])
        assert in_use(layer) == [] and layer.memory.recall() is None


def test_a_repeated_call_in_backward_raises(soon):
    needs_faiss()
    layer = make(4)
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    output, _ = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="finds other slots when a call is repeated .* use probes=None"):
        output.sum().backward()


def test_options_are_checked(monkeypatch):
    for value, kind in ((0, ValueError), (1.5, TypeError), (True, TypeError), ("64", TypeError)):
        with pytest.raises(kind, match="probes must be"):
            Sparse(probes=value)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"probes.* needs faiss \(pip install 'mann_fast\[index\]'\)"
    ):
        Sparse(probes=4)
    assert Sparse().recall() is None


def test_faiss_may_be_gone_where_a_layer_is_loaded(monkeypatch):
    needs_faiss()
    layer = make(4)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs faiss \(pip install 'mann_fast\[index\]'\)"):
        layer(torch.randn(2, 1, 4, dtype=torch.float64))
