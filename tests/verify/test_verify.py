"""What ``verify`` finds: any flipped bit, and damage that no checksum tells because the manifest was made to fit."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outputs import EVERY_ACTION, edit_json, places, reseal, sources
from support import load, make_model, write_recipe

from deus_merge import api


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny) -> Path:
    """An output of several files, with tensors copied, cast, fused and zeroed; never changed for long."""
    folder = tmp_path_factory.mktemp("verify")
    sources(folder, tiny)
    recipe = write_recipe(folder / "recipe.yml", EVERY_ACTION.format(folder=folder))
    options = api.RunOptions(private_paths=True)  # a copy of it finds its sources
    api.merge(recipe, folder / "out", options, max_shard_size="150kB")
    return folder / "out"


@pytest.fixture
def out(made, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def failed(done) -> dict[str, str]:
    return {c["name"]: c["detail"] for c in done.json()["checks"] if c["passed"] is False}


def test_a_good_output_passes(run, made):
    actions = Counter(o["action"] for o in json.loads((made / "deus_merge.json").read_text())["tensors"].values())
    assert set(actions) == {"copy", "cast", "compute", "zeros"} and len(list(made.glob("*.safetensors"))) > 2
    result = run("verify", made, "--strict", "--json").json()
    assert result["passed"] and all(c["passed"] for c in result["checks"])
    assert [c["name"] for c in result["checks"]] == [
        "manifest", "other files", "files and headers", "tensors against the plan", "layers and config", "checksums",
        "zeroed tensors", "copied tensors", "finite values", "tokenizer", "transformers",
        "layer kinds",
    ]  # fmt: skip


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_found_and_its_file_named(run, made, data):
    """Anywhere in any file: half of the draws in a tensor, by how it was made; half in a file, half of these early."""
    tensor = None
    if data.draw(st.booleans(), label="in a tensor"):
        record = json.loads((made / "deus_merge.json").read_text())["tensors"]
        action = data.draw(st.sampled_from(["copy", "cast", "compute", "zeros"]), label="action")
        tensor = data.draw(st.sampled_from([n for n, o in record.items() if o["action"] == action]), label="tensor")
        file, begin, end = places(made)[tensor]
    else:
        files = sorted(path for path in made.iterdir() if path.name != "README.md")  # the user's to edit
        file = data.draw(st.sampled_from(files), label="file")
        begin, end = 0, file.stat().st_size
        end = min(end, data.draw(st.sampled_from([end, 2000]), label="end"))
    at, bit = data.draw(st.integers(begin, end - 1), label="byte"), data.draw(st.integers(0, 7), label="bit")
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        overwrite(stream, at, bytes([byte[0] ^ 1 << bit]))
        try:
            found = failed(run("verify", made, "--quick", "--json", expect=3))
        finally:
            overwrite(stream, at, byte)
    assert any(file.name in detail for detail in found.values()), found
    if tensor:
        assert f"{tensor} in {file.name}" in found["checksums"]


def overwrite(stream, at: int, content: bytes) -> None:
    stream.seek(at)
    stream.write(content)
    stream.flush()


def swap(out: Path) -> None:
    """Two copied tensors of one shape change places."""
    spots, record = places(out), json.loads((out / "deus_merge.json").read_text())["tensors"]
    names = [n for n in spots if n.endswith("q_proj.weight") and record[n]["action"] == "copy"]
    contents = [spots[n][0].read_bytes()[spots[n][1] : spots[n][2]] for n in names]
    for name, content in zip(names, reversed(contents), strict=True):
        patch(out, name, content)


def patch(out: Path, name: str, content: bytes) -> None:
    file, begin, _ = places(out)[name]
    with file.open("r+b") as stream:
        overwrite(stream, begin, content)


def cut(out: Path) -> None:
    with sorted(out.glob("*.safetensors"))[1].open("r+b") as file:
        file.truncate(file.seek(0, 2) - 2)


def wrong_shard(out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])
    index["weight_map"][names[0]] = next(f for f in index["weight_map"].values() if f != index["weight_map"][names[0]])
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def unnamed(out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def larger_tokenizer(out: Path) -> None:
    data = json.loads((out / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 2048, "content": "<one too many>"})
    (out / "tokenizer.json").write_text(json.dumps(data))


def made_by(out: Path, action: str) -> str:
    record = json.loads((out / "deus_merge.json").read_text())
    return next(n for n, o in record["tensors"].items() if o["action"] == action and n.endswith("_proj.weight"))


# The manifest is made to fit after each of these, so that no checksum tells.
@pytest.mark.parametrize(
    ("damage", "check", "reported"),
    [
        (lambda out: patch(out, made_by(out, "compute"), b"\xc0\x7f"), "finite values", "holds NaN"),
        (lambda out: patch(out, made_by(out, "cast"), b"\x80\xff"), "finite values", "holds NaN or infinity"),
        (lambda out: patch(out, made_by(out, "copy"), b"\xc0\x7f"), "copied tensors", "differs from its source"),
        (lambda out: patch(out, made_by(out, "zeros"), b"\x01"), "zeroed tensors", "is not zero"),
        (swap, "copied tensors", "q_proj.weight"),
        (wrong_shard, "files and headers", "model.safetensors.index.json"),
        (unnamed, "files and headers", "does not name model.layers.1.mlp.up_proj.weight"),
        (lambda out: edit_json(out / "config.json", num_hidden_layers=6), "layers and config", "missing: "),
        (lambda out: edit_json(out / "config.json", num_hidden_layers=4), "layers and config", "4 layers"),
        (lambda out: edit_json(out / "config.json", intermediate_size=8), "layers and config", "shape [8, 32]"),
        (lambda out: edit_json(out / "config.json", head_dim=None, hidden_size=64), "layers and config", "hidden_size"),
        (lambda out: edit_json(out / "config.json", model_type="qwen3"), "layers and config", "q_norm"),
        (lambda out: edit_json(out / "config.json", architectures=1, model_type=7), "layers and config", "model_type"),
        (lambda out: edit_json(out / "config.json", attention_bias=True), "transformers", "k_proj.bias"),
        (lambda out: edit_json(out / "config.json", tie_word_embeddings=True), "transformers", "ties the embeddings"),
        (lambda out: edit_json(out / "config.json", dtype="float32"), "layers and config", "planned bfloat16"),
        (larger_tokenizer, "tokenizer", "'<one too many>' has number 2048"),
        (lambda out: (out / "tokenizer.json").write_text("{}"), "tokenizer", ""),
        (lambda out: shutil.copy(next(out.glob("*.safetensors")), out / "model-00009.safetensors"),
         "other files", "model-00009.safetensors was not written by the run"),
        (lambda out: (out / "added_tokens.json").write_text("{}"), "other files", "added_tokens.json"),
    ],
)  # fmt: skip
def test_damage_that_no_checksum_tells(run, made, out, damage, check, reported):
    damage(out)
    reseal(out)
    found = failed(run("verify", out, "--json", expect=3))
    assert reported in found[check], found


@pytest.mark.parametrize(
    ("damage", "check", "reported"),
    [
        (cut, "files and headers", "model-00002-of-"),
        (lambda out: (out / "model-00002-of-00003.safetensors").unlink(), "files and headers", "model-00002-of-00003"),
        (lambda out: (out / "tokenizer.json").unlink(), "other files", "tokenizer.json is missing"),
        (lambda out: (out / "model.safetensors.index.json").unlink(), "files and headers", "several safetensors files"),
        (lambda out: (out / "deus_merge.json").write_text("[]"), "manifest", "deus_merge.json"),
        (lambda out: (out / "deus_merge.json").write_bytes(b"\xff" * 9), "manifest", "deus_merge.json"),
        (lambda out: (out / "config.json").write_text("[1" * 50_000), "files and headers", "config.json"),
    ],
)
def test_files_that_are_gone_or_cut(run, out, damage, check, reported):
    damage(out)
    done = run("verify", out, "--json", expect=3)
    assert reported in failed(done)[check]
    assert len(done.json()["checks"]) == 12


@pytest.mark.parametrize("length", [3, 7])
def test_lists_with_an_entry_a_layer(run, tmp_path, length):
    base = make_model(tmp_path / "base", "qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    run("upscale", base, tmp_path / "out", "--insert", "all")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert len(config["layer_types"]) == 7
    kinds = config["layer_types"][:3] if length == 3 else None
    edit_json(tmp_path / "out/config.json", layer_types=kinds)
    reseal(tmp_path / "out")
    found = failed(run("verify", tmp_path / "out", "--quick", "--json", expect=3))
    assert "layer_types" in found["layers and config"]


def test_untied_flag_without_a_head(run, tiny, tmp_path):
    run("upscale", tiny, tmp_path / "out")
    edit_json(tmp_path / "out/config.json", tie_word_embeddings=False)
    reseal(tmp_path / "out")
    found = failed(run("verify", tmp_path / "out", "--quick", "--json", expect=3))
    assert "lm_head.weight" in found["layers and config"]


def test_what_cannot_be_looked_at_is_skipped_and_fails_only_strictly(run, tiny, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    run("upscale", base, tmp_path / "out", "--no-verify")
    result = run("verify", tmp_path / "out", "--json").json()
    assert [c["name"] for c in result["checks"] if c["passed"] is None] == ["checksums"]
    edit_json(base / "config.json", rms_norm_eps=0.5)
    changed = run("verify", tmp_path / "out", "--quick", "--json").json()["checks"]
    assert "has changed since" in next(c["detail"] for c in changed if c["name"] == "copied tensors")
    shutil.rmtree(base)
    done = run("verify", tmp_path / "out", "--json", "--logits", __file__)
    skipped = {c["name"] for c in done.json()["checks"] if c["passed"] is None}
    assert skipped == {"checksums", "copied tensors", "logits"}
    strict = run("verify", tmp_path / "out", "--quick", "--strict", "--json", expect=3).json()
    assert not strict["passed"] and strict["strict"]


def copied(done) -> dict:
    return next(check for check in done.json()["checks"] if check["name"] == "copied tensors")


def test_tensors_that_were_not_compared_are_not_ok(run, tmp_path):
    """Copies whose source is gone, and tensors that are derived when they are read, are skipped, and fail strictly."""
    base = make_model(tmp_path / "base", vocab_size=16)
    recipe = write_recipe(tmp_path / "r.yml", f"merge_method: passthrough\nmodels: [{{model: {base}}}]\n")
    run("merge", recipe, tmp_path / "out")
    assert (
        copied(run("verify", tmp_path / "out", "--strict", "--json"))["detail"]
        == "39 equal to their sources, byte for byte"
    )
    shutil.move(base, tmp_path / "moved")
    gone = copied(run("verify", tmp_path / "out", "--quick", "--json"))
    assert gone["passed"] is None and gone["detail"].startswith(f"none compared; source {base} cannot be read")
    assert "failed verification: copied tensors" in run("verify", tmp_path / "out", "--quick", "--strict", expect=3).err


def test_derived_tensors_have_no_source_to_be_compared_with(run, tmp_path):
    """Of a document, where all are derived, and of an adapter, where some are."""
    base = make_model(tmp_path / "base", vocab_size=16, layers=2)
    make_model(tmp_path / "other", vocab_size=16, layers=2, seed=1)
    both = ", ".join(f"{{model: {tmp_path / name}, parameters: {{weight: 1}}}}" for name in ("base", "other"))
    first = f"merge_method: linear\nname: mean\nmodels: [{both}]\n"
    recipe = write_recipe(tmp_path / "r.yml", f"{first}---\nmerge_method: passthrough\nmodels: [{{model: mean}}]\n")
    run("merge", recipe, tmp_path / "all")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    model = f"{base}+{tmp_path / 'adapter'}"
    write_recipe(recipe, f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n")
    run("merge", recipe, tmp_path / "some")
    for name, detail in {
        "all": "none compared; 21 tensors were derived",
        "some": "19 equal to their sources, byte for byte; 2 tensors were derived",
    }.items():
        found = copied(run("verify", tmp_path / name, "--json"))
        assert found["passed"] is None and found["detail"].startswith(detail)
        assert "verification: copied tensors" in run("verify", tmp_path / name, "--quick", "--strict", expect=3).err


def test_a_model_without_a_copied_tensor_says_so(run, tmp_path):
    base = make_model(tmp_path / "base", vocab_size=16)
    run("upscale", base, tmp_path / "out", "--dtype", "bfloat16", "--preset", "average")
    found = copied(run("verify", tmp_path / "out", "--strict", "--json"))
    assert (found["passed"], found["detail"]) == (True, "no tensor was copied")


def test_a_folder_of_another_program_is_the_wrong_input(run, tiny):
    assert "merge and upscale write one" in run("verify", tiny, expect=2).err


def test_a_manifest_of_format_1_is_still_read(run, out):
    record = json.loads((out / "deus_merge.json").read_text())
    for key in ("weights", "layer_lists", "sha256"):
        del record[key]
    record["tensors"] = {
        n: {k: v for k, v in o.items() if k in ("action", "model", "tensor")} for n, o in record["tensors"].items()
    }
    (out / "deus_merge.json").write_text(json.dumps(record | {"format": 1}, indent=1))
    result = run("verify", out, "--quick", "--json").json()
    assert [c["name"] for c in result["checks"] if c["passed"] is None] == ["checksums"]
    patch(out, made_by(out, "copy"), b"\x01\x02")
    assert "copied tensors" in failed(run("verify", out, "--quick", "--json", expect=3))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_results_of_documents_are_not_called_copies(run, tmp_path, dtype):
    """Nothing on the disk has their bytes, whether or not they are cast: the check says so, and strict fails."""
    models = [make_model(tmp_path / name, layers=2, seed=seed) for seed, name in enumerate("ab")]
    sources = "".join(f"- {{model: {model}, parameters: {{weight: 1}}}}\n" for model in models)
    last = "base_model: soup\nupscale: {preset: llama_pro, insert: all}\n" + (f"dtype: {dtype}\n" if dtype else "")
    recipe = write_recipe(tmp_path / "r.yml", f"name: soup\nmerge_method: linear\nmodels:\n{sources}---\n{last}")
    run("merge", recipe, tmp_path / "out")
    checks = {c["name"]: c for c in run("verify", tmp_path / "out", "--quick", "--json").json()["checks"]}
    assert checks["copied tensors"]["passed"] is None and "document" in checks["copied tensors"]["detail"]
    run("verify", tmp_path / "out", "--quick", "--strict", expect=3)
