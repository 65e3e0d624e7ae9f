"""What the kernels compile to without a GPU, and the arithmetic on it.

Kernels are compiled in processes of their own: this one may run Triton's interpreter.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from megatron_mode.command_line import aligned
from megatron_mode.kernels.aot.resources import HEADINGS, Job, cells, count, occupancy, offences

MATMULS = {"lse_forward", "lse_forward keep", "dlogits"}
KERNELS = MATMULS | {
    "mode_prologue",
    "merge_tiles",
    "dlogits kept",
    "hidden_gradient",
    "mode_weight_gradient",
}

# Compiles with the 64-bit tile starts, then with 32-bit ones in their place.
NARROW_STARTS = """
import json
import triton
import triton.language as tl
from megatron_mode.kernels.aot.launches import measure
from megatron_mode.kernels.aot.resources import Job
from megatron_mode.kernels.mode_loss import lm_kernels

@triton.jit
def row_start(tile, TILE_ROWS: tl.constexpr, stride):
    return tile * TILE_ROWS * stride

lm_kernels.row_start = row_start
counts = {}
for name in ("lse_forward", "dlogits"):
    counts[name] = measure(Job(name, 80, True, "bf16")).wide_products
print(json.dumps(counts))
"""

# Triton turns an integer argument of value 1 into a constant, which has no `.to`.
ARGUMENTS_OF_ONE = """
import dataclasses
from megatron_mode.kernels.aot.launches import compile_launch, launches
from megatron_mode.kernels.aot.resources import Job

for name, launch in launches("bf16", 80, divisible=False).items():
    kinds = launch.signature("bf16")
    ones = {argument: 1 for argument, kind in kinds.items() if kind == "i32"}
    launch = dataclasses.replace(launch, arguments=launch.arguments | ones)
    compile_launch(launch, Job(name, 80, False, "bf16"))
"""


def run(folder, *arguments, **variables):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=clean | {"TRITON_CACHE_DIR": str(folder / "cache")} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def run_script(folder, text):
    """Run from a file: Triton reads the source of its functions."""
    script = folder / "script.py"
    script.write_text(text)
    return run(folder, str(script))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    done = run(folder, "-m", "megatron_mode.kernels.aot", "--json", "--arch", "80", "90")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_every_kernel_is_there_once_in_every_variant(rows):
    keys = [(row["kernel"], row["arch"], row["divisible"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert set(keys) == {
        (kernel, arch, divisible)
        for kernel in KERNELS
        for arch in ("sm_80", "sm_90")
        for divisible in (True, False)
    }


def test_training_shapes_spill_nothing_and_no_kernel_has_atomics(rows):
    assert [row for row in rows if row["divisible"] and row["spill_bytes"]] == []
    assert [row for row in rows if row["atomics"]] == []


def test_matrix_products_meet_tensor_cores(rows):
    expected = {"sm_80": "mma.sync", "sm_90": "wgmma"}
    for row in rows:
        multiplies = row["kernel"] in MATMULS
        assert row["tensor_core"] == (expected[row["arch"]] if multiplies else None), row
        assert row["cp_async"] == (multiplies and row["divisible"]), row


def test_every_block_fits_a_multiprocessor(rows):
    assert [row for row in rows if not 0 < row["occupancy"] <= 1] == []


def test_tile_starts_are_64_bit(rows, tmp_path):
    """Hidden states and LM weight, and what is written, start at a 64-bit product each."""
    done = run_script(tmp_path, NARROW_STARTS)
    assert done.returncode == 0, done.stderr
    narrow = json.loads(done.stdout)
    for row in rows:
        if row["divisible"] and row["arch"] == "sm_80" and row["kernel"] in narrow:
            assert row["wide_products"] >= 3, row
            assert narrow[row["kernel"]] == 0, narrow


def test_kernels_compile_for_arguments_of_one(tmp_path):
    done = run_script(tmp_path, ARGUMENTS_OF_ONE)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_is_refused_in_one_sentence(tmp_path):
    done = run(tmp_path, "-m", "megatron_mode.kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_help_imports_no_torch(tmp_path):
    script = (
        "import sys\n"
        "from megatron_mode.kernels.aot.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'triton'} & set(sys.modules)))\n"
    )
    done = run(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m megatron_mode.kernels.aot" in done.stdout


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "num_warps", "expected"),
    [
        # 168 registers x 32 lanes = 5376; 16384 // 5376 = 3 a partition, 12 in all: one block of 8.
        (80, 168, 49152, 8, 8 / 64),
        # 161 are handed out as 168, 128 as they are: 4 a partition, two blocks of 8.
        (80, 161, 0, 4, 12 / 64),
        (80, 128, 49152, 8, 16 / 64),
        # 2 (98304 + 1024) = 198656 bytes are more than 167936 (sm_80), less than 233472 (sm_90).
        (80, 128, 98304, 8, 8 / 64),
        (90, 128, 98304, 8, 16 / 64),
        # 16 warps a partition: the multiprocessor is full.
        (90, 32, 0, 4, 64 / 64),
        # 32 blocks of one warp are as many as it takes.
        (90, 16, 0, 1, 32 / 64),
        # 100 bytes take 128 and 1024: 167936 // 1152 = 145 blocks, so registers decide.
        (80, 64, 100, 4, 32 / 64),
        # 163 KiB and the reserved one fill sm_80; one byte more does not start.
        (80, 32, 163 * 1024, 4, 4 / 64),
        (80, 32, 163 * 1024 + 1, 4, 0),
        # 255 registers: 2 warps a partition, fewer than a block of 16.
        (100, 255, 0, 16, 0),
    ],
)
def test_occupancy(arch, registers, shared_bytes, num_warps, expected):
    assert expected == occupancy(arch, registers, shared_bytes, num_warps)


PTX = """
 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;
 wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd2, %rd3, 1, 1, 1;
 mul.lo.s64 %rd1, %rd2, %rd3;
 mul.wide.s32 %rd1, %r2, 2;
 redux.sync.max.s32 %r1, %r2, 0xffffffff;
 atom.shared.add.u32 %r1, [%r2], 1;
 atom.global.add.f32 %f1, [%rd1], %f2;
 @%p1 red.global.add.f32 [%rd1], %f2;
 atom.add.f32 %f1, [%rd1], %f2;
"""
LOG = """
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 432 bytes cmem[0]
"""


def counted(ptx=PTX, log=LOG):
    job = Job("lse_forward", 90, True, "bf16")
    return count(job, multiplies=True, num_warps=8, shared_bytes=98304, ptx=ptx, log=log)


def test_counts_come_from_ptx_and_log():
    row = counted()
    assert (row.registers, row.spill_bytes, row.atomics, row.wide_products) == (168, 32, 3, 1)
    assert (row.tensor_core, row.cp_async, row.occupancy) == ("wgmma", True, 8 / 64)
    assert counted("mma.sync.aligned.m16n8k16.row.col").tensor_core == "mma.sync"
    assert counted("tcgen05.mma.cta_group::1.kind::f16").tensor_core == "tcgen05"
    assert counted("").tensor_core is None


@pytest.mark.parametrize(
    ("change", "offence"),
    [
        ({}, None),
        ({"spill_bytes": 4}, "lse_forward on sm_90 spills 4 bytes"),
        ({"atomics": 1}, "lse_forward on sm_90 has 1 atomic instructions"),
        ({"tensor_core": None}, "lse_forward on sm_90 uses no tensor core"),
        ({"tensor_core": None, "dtype": "fp32"}, None),
        ({"tensor_core": None, "multiplies": False}, None),
        ({"occupancy": 0.0}, "lse_forward on sm_90 fits no multiprocessor (98304 bytes shared)"),
        ({"spill_bytes": 4, "divisible": False}, None),
        ({"spill_bytes": 4, "arch": "sm_100"}, None),
    ],
)
def test_offences_are_those_of_the_training_shapes(change, offence):
    clean = dataclasses.replace(counted(), spill_bytes=0, atomics=0)
    assert offences([dataclasses.replace(clean, **change)]) == ([offence] if offence else [])


def test_table_is_aligned():
    other = dataclasses.replace(counted(), kernel="x", registers=9)
    lines = aligned([HEADINGS, *map(cells, [counted(), other])]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("lse_forward")
    assert lines[2].startswith("x  ")
