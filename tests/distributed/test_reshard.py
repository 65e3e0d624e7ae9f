"""A checkpoint of one layout resumes at another: same state to the bit, same losses."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from argparse import Namespace

import gloo_world
import pytest
import reshard_rank
import torch
from reshard_rank import VARIANTS
from run_files import assert_same

TAG = "step-00000002"
LAYOUTS = [
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
    (2, 2, 2),
    (1, 4, 1),
    (4, 1, 1),
]
SOURCES = A, B = [(2, 2, 1), (1, 1, 2)]
TIED, UNTIED, BF16 = VARIANTS
# Half the pairs: each target meets each source and each variant, each of a source's goes somewhere.
SAMPLE = {
    (1, 2, 2): [(A, TIED), (A, UNTIED), (B, BF16)],
    (4, 1, 1): [(B, TIED), (B, UNTIED), (A, BF16)],
    (1, 4, 1): [(B, TIED), (A, UNTIED), (A, BF16)],
}
# bf16 rounds every activation, and in other places in other layouts.
RELATIVE_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}
STATES = {"fp32", "exp_avg", "exp_avg_sq", "weight"}


def native_checkpoint(folder, sizes, variant):
    from megatron_mode.checkpoint.files import weights_only
    from megatron_mode.checkpoint.load import join_alone
    from megatron_mode.checkpoint.reshard.native import NativeCheckpoint
    from megatron_mode.cost.topology import Layout
    from megatron_mode.engine.pipeline import checkpoint_parameters

    join_alone()
    wholes = checkpoint_parameters(reshard_rank.make_config(sizes, variant).model, 1)
    with weights_only():
        return NativeCheckpoint(folder / TAG, Layout(*sizes), wholes)


def convert(folder, sizes, variant):
    """Write the universal folder, without a manifest: this is below what makes one."""
    from megatron_mode.checkpoint.files import weights_only
    from megatron_mode.checkpoint.reshard.universal import write_common, write_parameters

    native, target = native_checkpoint(folder, sizes, variant), folder / "universal"
    target.mkdir()
    with weights_only():
        write_common(native, target)
        assert len(list(write_parameters(native, target, native.names, 2))) == len(native.wholes)
    return target


class Sources:
    """Train and save a layout once, in all variants, when it is first asked for."""

    def __init__(self, folder, variants):
        self.folder, self.variants = folder, variants
        self.results, self.universal = {}, {}

    def __getitem__(self, sizes):
        if sizes not in self.results:
            folders = [self.folder / f"{sizes}-{n}" for n in range(len(self.variants))]
            cases = list(zip(self.variants, folders, strict=True))
            world_size = math.prod(sizes)
            ranks = gloo_world.run_world(world_size, reshard_rank.train_and_save, sizes, cases)
            self.results[sizes] = {
                variant: (ranks[0][n][0], whole_state([rank[n][1] for rank in ranks]))
                for n, variant in enumerate(self.variants)
            }
            for variant, folder in cases:
                self.universal[sizes, variant] = convert(folder, sizes, variant)
        return self.results[sizes]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("sources"), VARIANTS)


def whole_state(ranks):
    """Put the ranks' states together: ({global name: {state: whole tensor}}, step counts)."""
    from megatron_mode.model.sharding import join_parts

    found, cuts = {}, {}
    for states, rank_cuts, at, _ in ranks:
        cuts |= rank_cuts
        for name, tensors in states.items():
            for key, tensor in tensors.items():
                found.setdefault((name, key), {})[at] = tensor
    full = {}
    for (name, key), parts in found.items():
        assert len({at.data for at in parts}) == len({rank[2].data for rank in ranks})
        for _, group in itertools.groupby(sorted(parts.items()), key=lambda item: item[0][:2]):
            shards = [tensor for _, tensor in group]
            whole = join_parts(shards, cuts[name]) if name in cuts else shards[0]
            if name not in cuts:
                assert all(torch.equal(shard, whole) for shard in shards), name
            # Stages and data ranks that hold copies of a parameter hold the same.
            kept = full.setdefault(name, {}).setdefault(key, whole)
            assert torch.equal(kept, whole), (name, key)
    (counts,) = {(tuple(counts), steps) for _, _, _, (counts, steps) in ranks}
    return full, counts


def check_target(sources, cases, target, **changes):
    """Load each (layout, variant) at `target`: state to the bit, losses of the next steps.

    `changes` are what the target's variants have otherwise.
    """
    expected = [sources[sizes][variant] for sizes, variant in cases]
    folders = [
        (variant._replace(**changes), sources.universal[sizes, variant]) for sizes, variant in cases
    ]
    world_size = math.prod(target)
    ranks = gloo_world.run_world(world_size, reshard_rank.load_and_train, target, folders)
    for index, (case, (losses, (state, counts))) in enumerate(zip(cases, expected, strict=True)):
        loaded, loaded_counts = whole_state([rank[index][1] for rank in ranks])
        assert loaded.keys() == state.keys()
        for name, tensors in state.items():
            assert tensors.keys() == loaded[name].keys() == STATES
            for key, tensor in tensors.items():
                assert torch.equal(tensor, loaded[name][key]), (case, target, name, key)
        assert loaded_counts == counts == ((2.0,), 2)
        tolerance = RELATIVE_TOLERANCE[case[1].precision]
        for rank in ranks:
            assert rank[index][0] == pytest.approx(losses, rel=tolerance), (case, target)


@pytest.mark.distributed
@pytest.mark.parametrize("target", SAMPLE, ids=str)
def test_a_checkpoint_resumes_at_another_layout(sources, target):
    check_target(sources, SAMPLE[target], target)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("schedule", "other", "sizes", "target"),
    [
        ("dualpipev", "1f1b", (1, 2, 1), (2, 1, 1)),
        pytest.param("dualpipev", "1f1b", (1, 2, 1), (1, 2, 1), marks=pytest.mark.slow),
        pytest.param("1f1b", "dualpipev", (1, 1, 2), (1, 2, 1), marks=pytest.mark.slow),
        pytest.param("1f1b", "dualpipev", (2, 2, 1), (2, 2, 1), marks=pytest.mark.slow),
        pytest.param("dualpipev", "dualpipev", (2, 2, 1), (1, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_resumes_under_another_schedule(schedule, other, sizes, target, tmp_path):
    """DualPipeV's ranks hold a stage from each end; a rank holds a tied matrix once."""
    variants = [reshard_rank.Variant(tied, "fp32", schedule) for tied in (True, False)]
    cases = [(sizes, variant) for variant in variants]
    check_target(Sources(tmp_path, variants), cases, target, schedule=other)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", [*LAYOUTS, (1, 1, 4)], ids=str)
def test_every_layout_resumes_at_every_other(sources, target):
    check_target(sources, list(itertools.product(LAYOUTS, VARIANTS)), target)


@pytest.mark.distributed
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_folder_is_the_one_that_deepspeed_makes(sources, variant, tmp_path):
    """Compare with DeepSpeed's converter, which is told by hand-written patterns what we derive."""
    from deepspeed.checkpoint import ds_to_universal

    sizes = (2, 2, 1)
    assert sources[sizes]
    ours, theirs = sources.universal[sizes, variant], tmp_path / "theirs"
    arguments = Namespace(
        input_folder=str(ours.parent / TAG),
        output_folder=str(theirs),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    names = [p.relative_to(theirs) for p in sorted(theirs.rglob("*.pt"))]
    assert names == [p.relative_to(ours) for p in sorted(ours.rglob("*.pt"))]
    assert len(names) == 4 * (4 * 6 + (4 if variant.tied else 5)) + 1 + 4
    for name in names:
        one, other = (torch.load(root / name, weights_only=False) for root in (ours, theirs))
        assert_same(one, other, name)


@pytest.mark.distributed
@pytest.mark.parametrize("sizes", SOURCES, ids=str)
def test_a_parameter_that_the_checkpoint_lacks_is_refused(sources, sizes, monkeypatch):
    """The rules come from the model: one that gains a parameter needs no list to be changed."""
    from megatron_mode.errors import CheckpointError
    from megatron_mode.model.decoder import ModeHead

    assert sources[sizes]
    folder, build = sources.universal[sizes, VARIANTS[0]].parent, ModeHead.__init__

    def grown(self, model, config):
        build(self, model, config)
        self.gate = torch.nn.Parameter(torch.empty(model.hidden_size))

    monkeypatch.setattr(ModeHead, "__init__", grown)
    with pytest.raises(CheckpointError, match=r"holds no 5\.gate, which the model of its manifest"):
        native_checkpoint(folder, sizes, VARIANTS[0])


@pytest.mark.distributed
def test_a_parameter_that_the_rules_do_not_know_is_refused(sources, monkeypatch):
    """Nothing is joined by guess, even where shapes would let it pass."""
    from megatron_mode.checkpoint.files import weights_only
    from megatron_mode.checkpoint.reshard.native import NativeCheckpoint
    from megatron_mode.cost.topology import Layout
    from megatron_mode.errors import CheckpointError
    from megatron_mode.model import sharding

    sizes = (2, 2, 1)
    assert sources[sizes]
    folder = sources.universal[sizes, VARIANTS[0]].parent
    wholes = native_checkpoint(folder, sizes, VARIANTS[0]).wholes
    row = "2.layer.mlp.linear_fc2.weight"

    def opened(changed):
        with weights_only():
            return NativeCheckpoint(folder / TAG, Layout(*sizes), changed)

    with pytest.raises(
        CheckpointError, match=r"linear_fc2\.weight of shape \(32, 24\), which is not"
    ):
        opened({name: whole for name, whole in wholes.items() if name != row})
    # Local shapes taken for whole ones: the parts are no copies of each other.
    native = opened({**wholes, row: sharding.Whole((32, 24), None)})
    with (
        weights_only(),
        pytest.raises(CheckpointError, match=r"linear_fc2\.weight in .* differ between tensor"),
    ):
        native.read(row, "exp_avg")
    monkeypatch.setattr(sharding, "RowParallelLinear", torch.nn.Bilinear)
    with pytest.raises(
        CheckpointError, match=r"of shape \(32, 16\), which has shape \(32, 32\) in"
    ):
        native_checkpoint(folder, sizes, VARIANTS[0])
