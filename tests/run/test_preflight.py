"""What cannot work is refused before a byte is written, by ``--dry-run`` as by the run itself."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import make_model, weights, write_recipe

from deus_merge import api
from deus_merge.core.errors import CheckpointError
from deus_merge.run.limits import memory


def census(*folders: Path) -> dict:
    return {p: (p.lstat().st_mtime_ns, p.lstat().st_ino) for folder in folders for p in (folder, *folder.rglob("*"))}


@pytest.fixture
def refused(run, tmp_path):
    """A run that must be refused, with ``--dry-run`` and without: a message with the fragments, and nothing touched."""

    def call(arguments, *fragments, within=()):
        for dry in ((), ("--dry-run",)):
            before = census(tmp_path, *within)
            done = run(*arguments, *dry, expect=2)
            for fragment in fragments:
                assert fragment in done.err, done.err
            assert done.out == "" and "Traceback" not in done.err
            assert census(tmp_path, *within) == before

    return call


@pytest.fixture
def mount(tmp_path):
    """Mounts: ``mount(type, options)`` gives a new file system, ``mount("bind", source)`` a second name of a folder."""
    mounted = []

    def call(kind: str, what) -> Path:
        point = tmp_path / f"mount{len(mounted)}"
        point.mkdir()
        options = ["--bind", str(what)] if kind == "bind" else ["-t", kind, "-o", what, kind]
        done = subprocess.run(["mount", *options, str(point)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no right to mount: {done.stderr.strip()}")
        mounted.append(point)
        return point

    yield call
    for point in reversed(mounted):
        subprocess.run(["umount", str(point)], check=True)


# the disk -------------------------------------------------------------------------------------------------------------


def test_too_small_a_disk(refused, run, mount, tiny):
    disk = mount("tmpfs", "size=600k")
    refused(("upscale", tiny, disk / "out"), f"{disk}/out: too little space on the disk", "kB free", within=[disk])


def test_what_is_asked_for_is_enough_and_not_much_more(run, mount, tmp_path):
    """Many small files on a file system whose blocks are larger than they."""
    base = make_model(tmp_path / "base", layers=6)
    command = ("upscale", base, tmp_path / "out", "--preset", "stack", "--max-shard-size", "1kB")
    said = run("upscale", base, mount("tmpfs", "size=100k") / "out", *command[3:], expect=2).err
    needed = float(said.split("expected: ")[1].split(" MB")[0]) * 1e6
    files = json.loads(run(*command, "--dry-run", "--json").out)["shards"]
    assert sum(-(-f["bytes"] // 4096) * 4096 for f in files) < needed  # not only the bytes that are in them
    disk = mount("tmpfs", f"size={int(needed * 1.005) >> 12 << 2}k")
    run("upscale", base, disk / "out", *command[3:])
    used = sum(p.stat().st_blocks * 512 for p in (disk / "out").rglob("*"))
    assert 0.3 < used / needed < 1


def test_the_old_folder_takes_room_beside_the_new_one(refused, run, mount, tiny):
    disk = mount("tmpfs", "size=8m")
    run("upscale", tiny, disk / "out")
    (disk / "ballast").write_bytes(bytes(4 << 20))
    command = ("upscale", tiny, disk / "out", "--overwrite")
    refused(command, "too little space", "the folder that will be replaced stays until the new one is whole")
    (disk / "ballast").unlink()
    run(*command)


def test_what_an_interrupted_run_has_left_counts_as_room(run, mount, tiny):
    disk = mount("tmpfs", "size=4m")
    command = ("upscale", tiny, disk / "out", "--quiet", "--preset", "copy_next")
    program = (
        "import os, signal, sys\nfrom deus_merge.checkpoint import staging\n"
        "from deus_merge.cli.main import run_command\n"
        "staging.StagingArea.commit = lambda self: os.kill(os.getpid(), signal.SIGKILL); run_command(sys.argv[1:])"
    )
    subprocess.run([sys.executable, "-c", program, *map(str, command)])
    free = psutil.disk_usage(str(disk)).free
    (disk / "ballast").write_bytes(bytes(free - (1 << 19)))
    assert run("upscale", tiny, disk / "another", expect=2)
    run(*command, "--resume")
    assert (disk / "out/deus_merge.json").is_file()


def test_too_few_inodes(refused, run, mount, tmp_path):
    base = make_model(tmp_path / "base", layers=2)
    disk = mount("tmpfs", "size=8m,nr_inodes=40")
    command = ("upscale", base, disk / "out", "--preset", "stack", "--max-shard-size")
    refused((*command, "1kB"), "too few inodes", "files", "a larger --max-shard-size makes fewer files", within=[disk])
    run(*command, "1MB")


# rights ---------------------------------------------------------------------------------------------------------------


def test_no_right_to_write(refused, tiny, tmp_path, mount):
    if os.geteuid() == 0:  # who may write everywhere, but not on this
        parent = mount("tmpfs", "size=1m")
        subprocess.run(["mount", "-o", "remount,ro", str(parent)], check=True)
    else:
        (parent := tmp_path / "parent").mkdir()
        parent.chmod(0o555)
    refused(
        ("upscale", tiny, parent / "out"),
        "out: the output folder cannot be created",
        f"no permission to write in {parent}",
    )
    refused(
        ("upscale", tiny, parent / "deep/out"),
        "the output folder cannot be created",
        f"no permission to write in {parent}",
    )


@pytest.mark.parametrize("out", ["x" * 250, "x" * 300, "recipe.yml/out", "recipe.yml/deep/out", "loop", "loop/out"])
def test_where_no_folder_can_be(refused, tiny, tmp_path, out):
    (tmp_path / "recipe.yml").touch()
    (tmp_path / "loop").symlink_to("loop")
    for more in ((), ("--resume",), ("--overwrite",)):
        refused(("upscale", tiny, tmp_path / out, *more), "cannot be")


# sources --------------------------------------------------------------------------------------------------------------


def test_every_header_is_read(refused, tmp_path):
    base = make_model(tmp_path / "base", layers=4, max_shard_size="40KB")
    *_, last = sorted(base.glob("*.safetensors"))
    os.truncate(last, last.stat().st_size - 1)
    refused(("upscale", base, tmp_path / "out"), last.name, "ends after the end of the file")


ONE = "the output and a source must not contain each other"


def test_a_source_under_another_name(refused, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "models/model")
    for link, target in (("to_model", model), ("to_models", tmp_path / "models"), ("to_link", tmp_path / "to_model")):
        (tmp_path / link).symlink_to(target)
    for source, out in (
        ("models/model", "to_model"),
        ("to_model", "models/model"),
        ("to_link", "to_model/deeper"),
        ("to_link", "to_models/model/deeper/still"),
        ("to_models/model", "models"),
        ("models/model", "to_models"),
        ("to_model", "models/other/../model"),
        ("to_model", "."),
    ):
        refused(("upscale", tmp_path / source, tmp_path / out, "--overwrite"), ONE, f"source {model}")


def test_links_out_of_a_source(refused, run, tiny, tmp_path):
    """As in the hub's cache: the folder holds links, and what they lead to must not be replaced either."""
    (blobs := tmp_path / "blobs").mkdir()
    (model := tmp_path / "model").mkdir()
    for file in tiny.iterdir():
        shutil.copy(file, blobs)
        (model / file.name).symlink_to(blobs / file.name)
    refused(("upscale", model, blobs, "--overwrite"), ONE)
    run("upscale", model, blobs / "out")  # beside them is a place as good as any
    assert all(not p.is_symlink() for p in (blobs / "out").iterdir())


def test_a_source_that_is_mounted_elsewhere(refused, run, mount, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "models/model")
    twin, shelf = mount("bind", model), mount("bind", tmp_path / "models")
    for source, out in ((model, twin / "out"), (twin, model / "out"), (shelf / "model", model), (model, shelf)):
        refused(("upscale", source, out, "--overwrite"), ONE)
    refused(("upscale", tiny, twin, "--overwrite"), "is a mount point", "choose a folder inside it")
    for out in ("o u\tt", "out"):  # the table of mounts escapes blanks
        place = tmp_path / out
        place.mkdir()
        subprocess.run(["mount", "--bind", str(model), str(place)], check=True)
        try:
            refused(("upscale", tiny, place, "--overwrite"), "is a mount point")
        finally:
            subprocess.run(["umount", str(place)], check=True)


def test_hard_links_of_the_old_folder_keep_what_they_have(run, tiny, tmp_path):
    run("upscale", tiny, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "twin", copy_function=os.link)
    before = {p.name: p.read_bytes() for p in (tmp_path / "twin").iterdir()}
    run("upscale", tmp_path / "twin", tmp_path / "out", "--overwrite", "--preset", "average")
    assert {p.name: p.read_bytes() for p in (tmp_path / "twin").iterdir()} == before
    assert len(weights(tmp_path / "out")) > len(weights(tmp_path / "twin"))


# memory and open files ------------------------------------------------------------------------------------------------


def vast_model(folder: Path, hidden: int, intermediate: int) -> Path:
    """A model as large as one likes, whose file is one hole."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (16, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        own = {f"self_attn.{r}_proj": (hidden, hidden) for r in "qkvo"}
        own |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
        own |= {"mlp.down_proj": (hidden, intermediate)}
        own |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    table, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(table).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(folder / "model.safetensors", 8 + len(header) + at)
    return folder


def test_more_memory_than_there_is(refused, run, tmp_path):
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    hidden = int(math.sqrt(total / 20) * 1.1) // 64 * 64  # five float32 copies of the widest weight
    base = vast_model(tmp_path / "base", hidden, 64)
    command = ("upscale", base, tmp_path / "out")
    refused(command, "the plan needs more memory than there is", "swap included", "tries nevertheless")
    hint = run(*command, expect=2).err.split("--max-memory ")[1].split()[0]
    told = run(*command, "--max-memory", hint, "--dry-run", expect=None).err  # the disk may be too small
    assert "more memory than there is" not in told
    if "too little space" not in told:
        assert "of memory will be needed" in told


def test_more_memory_than_is_available(run, tmp_path):
    rows = int(math.sqrt(psutil.virtual_memory().total / 8) * 1.1) // 64 * 64  # two float32 buffers of rows x rows
    base = vast_model(tmp_path / "base", 8, rows)
    command = ("upscale", base, tmp_path / "out", "--preset", "opt_deus_paper", "--dry-run")
    said = run(*command).err
    assert "of memory will be needed" in said and "it runs with less: --max-memory" in said
    limit = int(said.split("--max-memory ")[1].split("MB")[0])
    assert "of memory will be needed" not in run(*command, "--max-memory", f"{limit * 9 // 10}MB").err


def test_memory_as_the_machine_tells_it():
    available, total = memory()
    assert total <= psutil.virtual_memory().total + psutil.swap_memory().total
    assert available <= psutil.virtual_memory().available * 1.1


MIB = 1 << 20
TREES = {  # files of proc and sys -> (available, total) in MiB
    "no limit": ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"}, (600, 1100)),
    "no groups": ({}, (600, 1100)),
    "version 2": (
        {
            "proc/self/cgroup": "0::/batch/job\n",
            "sys/fs/cgroup/batch/job/memory.max": "max\n",
            "sys/fs/cgroup/batch/memory.max": f"{400 * MIB}\n",
            "sys/fs/cgroup/batch/memory.current": f"{300 * MIB}\n",
            "sys/fs/cgroup/batch/memory.stat": f"anon {80 * MIB}\nfile {200 * MIB}\nshmem {20 * MIB}\n",
        },
        (280, 500),
    ),
    "version 2, in a container": (
        {
            "proc/self/cgroup": "0::/docker/1234\n",
            "sys/fs/cgroup/memory.max": f"{200 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{250 * MIB}\n",
            "sys/fs/cgroup/memory.stat": "file 0\nshmem 0\n",
        },
        (0, 300),
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            "sys/fs/cgroup/memory/memory.stat": "total_cache 0\ntotal_shmem 0\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{500 * MIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{100 * MIB}\n",
            "sys/fs/cgroup/memory/job/memory.stat": f"total_cache {50 * MIB}\ntotal_shmem 0\n",
        },
        (450, 600),
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_memory_within_control_groups(name, tmp_path):
    files, expected = TREES[name]
    meminfo = "MemTotal: 1024000 kB\nMemFree: 1 kB\nMemAvailable: 614400 kB\nSwapTotal: 102400 kB\nHugePages_Total: 0\n"
    for path, text in {"proc/meminfo": meminfo, **files}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert tuple(size // MIB for size in memory(tmp_path)) == expected


def test_no_accounts_of_memory(tmp_path):
    assert memory(tmp_path) is None


@pytest.mark.slow
def test_memory_that_runs_out(tmp_path):
    base = vast_model(tmp_path / "base", 8, 60_000)
    command = [sys.executable, "-m", "deus_merge", "upscale", base, tmp_path / "out", "--preset", "opt_deus_paper"]
    line = f"ulimit -v {8 << 20}; exec {' '.join(map(str, command))} --insert all --threads 1"  # kB
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "layer 1: out of memory" in done.stderr and "--max-memory" in done.stderr and "--resume" in done.stderr


def test_a_source_that_changed_since_it_was_planned_with(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    plan = api.plan(api.upscale_recipe(model, preset="copy_next"))
    os.utime(model / "model.safetensors")
    with pytest.raises(CheckpointError, match="has changed since the plan was made"):
        api.merge(plan, tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.slow
def test_more_than_a_thousand_shards(tmp_path):
    base = make_model(tmp_path / "base", layers=60, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    command = [sys.executable, "-m", "deus_merge", "upscale", base, tmp_path / "out", "--preset", "copy_next"]
    command += ["--insert", "all", "--max-shard-size", "1B", "--quiet"]
    few = "ulimit -Sn 256; ulimit -Hn 256; exec "
    some = "ulimit -Sn 256; exec "
    line = " ".join(map(str, command))
    done = subprocess.run(["bash", "-c", few + line], capture_output=True, text=True)
    assert done.returncode == 2 and "too many files would be open at once" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ["base"]
    done = subprocess.run(["bash", "-c", some + line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1000


# dtypes ---------------------------------------------------------------------------------------------------------------


def test_what_a_dtype_loses_is_told(run, tmp_path):
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)):
        make_model(tmp_path / name, layers=2, dtype=dtype)
    said = {}
    for source in ("f32", "bf16", "f16"):
        for dtype in ("float32", "bfloat16", "float16"):
            done = run("upscale", tmp_path / source, tmp_path / "out", "--dtype", dtype, "--dry-run")
            said[source, dtype] = [line for line in done.err.splitlines() if "loses precision" in line]
    assert {k for k, v in said.items() if v} == {
        ("f32", "bfloat16"), ("f32", "float16"), ("bf16", "float16"), ("f16", "bfloat16"),
    }  # fmt: skip
    assert said["f32", "bfloat16"] == ["warning: float32 weights are written as bfloat16: this loses precision"]
    assert said["bf16", "float16"][0].endswith("this loses precision and range")
    models = "".join(f"  - {{model: {tmp_path / m}, parameters: {{weight: 1}}}}\n" for m in ("f32", "bf16"))
    recipe = write_recipe(tmp_path / "r.yml", f"merge_method: linear\ndtype: bfloat16\nmodels:\n{models}")
    done = run("merge", recipe, tmp_path / "out", "--dry-run")
    assert done.err.count("loses precision") == 1


@pytest.mark.parametrize("preset", ["copy_next", "average"])
def test_values_that_do_not_fit_float16(run, tmp_path, preset):
    base = make_model(tmp_path / "base", layers=2)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = 70_000.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    done = run("upscale", base, tmp_path / "out", "--preset", preset, "--dtype", "float16", expect=2)
    told = done.err.splitlines()
    assert any("becomes NaN or infinity" in line and "mlp.up_proj.weight" in line for line in told), done.err
    assert "expected: finite values that fit float16" in done.err and "wider dtype" in done.err
    assert not (tmp_path / "out").exists()
