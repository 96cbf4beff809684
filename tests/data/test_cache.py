"""The cache: right rows under the right captions, damage named and mended, every image once an epoch."""

import json
import logging
import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import scfm.data.cache
from scfm.data.cache import CachePlan, batch_indices, epoch_order
from scfm.data.fingerprint import fingerprint
from scfm.data.images import list_images, read_folder, read_image
from scfm.data.teacher_images import generate_images
from scfm.models.flux import Flux
from scfm.models.sd3 import SD3
from scfm.models.source import PipelineSource
from toy.pipelines import FLUX, TOKENS, build_sd3, load_flux

SIZES = [(32, 32), (24, 40), (40, 24)]
CAPTIONS = ["a red cross", "a small blue ring", "a yellow circle", "a green star", "a pink square"]


@pytest.fixture(scope="module")
def families():
    pipe = load_flux()
    return {size: Flux(pipe, *size, TOKENS) for size in SIZES}


@pytest.fixture(scope="module")
def images(families, tmp_path_factory):
    """150 images in three sizes, of five captions."""
    folder = tmp_path_factory.mktemp("data") / "images"
    generate_images(families, CAPTIONS * 30, folder, 1, progress=False, batch_size=32)
    return folder


def plan_of(
    images,
    folder,
    pipeline=FLUX,
    sizes=SIZES,
    max_sequence_length=TOKENS,
    dtype=torch.float32,
    negative_prompt="",
):
    return CachePlan(
        PipelineSource(pipeline),
        list_images(images),
        folder,
        sizes,
        max_sequence_length,
        dtype,
        negative_prompt,
    )


@pytest.fixture(scope="module")
def made(families, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    plan_of(images, folder).encode(families, progress=False)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kinds(shards):
    return Counter(shard.kind for shard in shards)


# What is in it


@pytest.mark.slow
def test_each_row_is_its_own_images_and_its_own_captions(families, images, made):
    rows = plan_of(images, made).open()
    assert len(rows) == 150 and rows.captions == CAPTIONS * 30 and rows.sizes == SIZES
    for i, (path, caption) in enumerate(read_folder(images)):
        size = Image.open(path).size[::-1]
        assert rows.sizes[rows.size_of[i]] == size
        own = families[size].encode_images(read_image(path, *size)[None])
        torch.testing.assert_close(rows.latents([i]), own, rtol=0, atol=1e-5)
        for name, value in families[size].encode_text([caption]).items():
            torch.testing.assert_close(rows.text([i])[name], value, rtol=0, atol=1e-5)
    picked = torch.tensor([7, 3, 7, 149])
    same = picked[rows.size_of[picked] == rows.size_of[7]]
    assert torch.equal(rows.latents(same), torch.cat([rows.latents([i]) for i in same.tolist()]))
    assert torch.equal(
        rows.text(picked)["tokens"], rows.text_of([rows.captions[i] for i in picked])["tokens"]
    )


def test_a_caption_is_kept_once_and_only_its_rows_are_copied(images, made):
    plan = plan_of(images, made)
    text = [load_file(made / shard.name) for shard in plan.shards if shard.kind == "text"]
    assert len(text) == 1 and len(text[0]["tokens"]) == 5
    cond = plan.open().text([0, 5])
    assert cond["tokens"].untyped_storage().nbytes() == 2 * TOKENS * 64 * 4


@pytest.mark.slow
def test_what_cannot_be_read_is_named(images, made):
    rows = plan_of(images, made).open()
    several = [int((rows.size_of == s).nonzero()[0]) for s in (0, 1)]
    with pytest.raises(ValueError, match="several sizes"):
        rows.latents(several)
    with pytest.raises(ValueError, match="no caption 'a blue horse'"):
        rows.text_of([CAPTIONS[0], "a blue horse"])


def test_sd3_keeps_the_negative_prompt_once(tmp_path):
    build_sd3().save_pretrained(tmp_path / "pipeline")
    family = SD3(build_sd3(), 32, 32, TOKENS, negative_prompt="a blue ring")
    generate_images(family, CAPTIONS * 2, tmp_path / "images", 1, 1.0, progress=False)
    told = dict(pipeline=tmp_path / "pipeline", sizes=[(32, 32)], negative_prompt="a blue ring")
    plan = plan_of(tmp_path / "images", tmp_path / "cache", **told)
    plan.encode({(32, 32): family}, progress=False)
    common = [load_file(tmp_path / "cache" / shard.name) for shard in plan.shards if shard.kind == "common"]
    assert len(common) == 1 and {k: len(v) for k, v in common[0].items()} == {
        "empty_tokens": 1,
        "empty_pooled": 1,
    }
    cond, own = plan.open().text([1, 4, 1]), family.encode_text([CAPTIONS[i] for i in (1, 4, 1)])
    assert cond.keys() == own.keys()
    for name in own:
        torch.testing.assert_close(cond[name], own[name], rtol=0, atol=1e-5)
    other = plan_of(tmp_path / "images", tmp_path / "cache", **{**told, "negative_prompt": "ugly"})
    assert kinds(other.missing()) == {"text": 1, "common": 1}


def test_bf16_is_kept_as_it_is_and_read_as_float32(tmp_path, images):
    pipe = load_flux(dtype=torch.bfloat16)
    families = {size: Flux(pipe, *size, TOKENS) for size in SIZES}
    plan = plan_of(images, tmp_path, dtype=torch.bfloat16)
    plan.encode(families, progress=False)
    rows = plan.open()
    assert (
        load_file(tmp_path / plan.shards[0].name)["latents"].dtype == torch.bfloat16
        and rows.latents([0]).dtype == torch.float32
    )
    assert rows.text([0])["tokens"].dtype == torch.bfloat16


def test_ten_images_and_one(families, images, tmp_path):
    for count in (10, 1):
        own = tmp_path / f"own{count}"
        own.mkdir()
        lines = (images / "metadata.jsonl").read_text().splitlines()[:count]
        (own / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        for line in lines:
            shutil.copy(images / json.loads(line)["file_name"], own)
        plan = plan_of(own, own / "cache")
        plan.encode(families, progress=False)
        rows = plan.open()
        seen = batch_indices(0, 32, rows.size_of, 0)
        assert len(rows) == count and set(seen.tolist()) == set(range(count)) and len(seen) == 32


def test_the_same_image_under_two_captions(families, images, tmp_path):
    shutil.copy(images / "00000.png", tmp_path / "a.png")
    shutil.copy(images / "00000.png", tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": n, "text": t}) + "\n"
            for n, t in [("a.png", "one"), ("b.png", "two"), ("a.png", "three")]
        )
    )
    plan = plan_of(tmp_path, tmp_path / "cache")
    plan.encode(families, progress=False)
    rows = plan.open()
    assert rows.captions == ["one", "two", "three"] and torch.equal(
        rows.latents([0, 1]), rows.latents([2, 0])
    )
    assert [len(s.rows) for s in plan.shards] == [1, 3, 0]


# Damage, kills, processes


def hurt(path, how):
    data = path.read_bytes()
    if how == "cut short":
        path.write_bytes(data[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit":
        path.write_bytes(data[:-7] + bytes([data[-7] ^ 4]) + data[-6:])
    elif how == "the header":
        path.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    elif how == "another's":
        other = next(
            p
            for p in sorted(path.parent.iterdir())
            if p.name.split("-")[0] == path.name.split("-")[0] and p != path
        )
        shutil.copy(other, path)
    elif how == "no checksum":
        save_file(load_file(path), path)
    elif how == "lost":
        path.unlink()


@pytest.mark.parametrize(
    "how", ["cut short", "empty", "a bit", "the header", "another's", "no checksum", "lost"]
)
def test_damage_is_named_once_never_used_and_mended_bit_for_bit(
    families, images, made, tmp_path, caplog, how
):
    folder = shutil.copytree(made, tmp_path / "cache")
    before, stamps = files_of(folder), {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    name = next(name for name in sorted(before) if name.startswith("latents"))
    hurt(folder / name, how)
    with caplog.at_level(logging.WARNING):
        plan = plan_of(images, folder)
        assert [shard.name for shard in plan.missing()] == [name]
        with pytest.raises(ValueError, match="lacks 1 of"):
            plan.open()
        plan.encode(families, progress=False)
        plan.open()
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (how != "lost") and all(name in line and "\n" not in line for line in warned)
    assert files_of(folder) == before
    assert all(path.stat().st_mtime_ns == stamps[path.name] for path in folder.iterdir() if path.name != name)


def test_damage_between_the_check_and_the_opening_is_seen(images, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "cache")
    plan = plan_of(images, folder)
    assert plan.missing() == []
    hurt(folder / plan.shards[0].name, "a bit")
    with pytest.raises(ValueError, match="lacks 1 of"):
        plan.open()


@pytest.mark.slow
def test_stopped_after_any_shard_it_goes_on(families, images, made, tmp_path, monkeypatch):
    write = scfm.data.cache.write_shard
    for stop in range(len(plan_of(images, made).shards)):
        folder, count = tmp_path / str(stop), [0]

        def stopping(path, tensors, count=count, stop=stop):
            if count[0] == stop:
                raise KeyboardInterrupt
            count[0] += 1
            write(path, tensors)

        monkeypatch.setattr(scfm.data.cache, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            plan_of(images, folder).encode(families, progress=False)
        monkeypatch.setattr(scfm.data.cache, "write_shard", write)
        assert not folder.exists() or len(files_of(folder)) == stop
        plan_of(images, folder).encode(families, progress=False)
        assert files_of(folder) == files_of(made)


@pytest.mark.parametrize("count", [2, 3, 20])
def test_shared_out_it_is_the_same_cache(families, images, made, tmp_path, count):
    plans = [plan_of(images, tmp_path / "cache") for _ in range(count)]
    assert all(plan.missing() for plan in plans)  # as if they had all begun at once
    for number, plan in enumerate(plans):
        plan.encode(families, (number, count), progress=False)
    assert files_of(tmp_path / "cache") == files_of(made) and not plans[0].missing()


def test_families_that_do_not_fit_the_plan_are_refused(families, images, tmp_path):
    plan = plan_of(images, tmp_path)
    with pytest.raises(ValueError, match=r"\(40, 24\)"):
        plan.encode({size: families[size] for size in SIZES[:2]})
    with pytest.raises(ValueError, match="none of 16 tokens"):
        plan.encode({size: Flux(families[size].pipe, *size, 8) for size in SIZES})


# Keys


@pytest.fixture
def pipeline(tmp_path):
    return shutil.copytree(FLUX, tmp_path / "pipeline")


def scaled(path, factor):
    save_file({k: v * factor for k, v in load_file(path).items()}, path, {"format": "pt"})


def test_what_changes_asks_for_new_rows_and_for_no_others(images, made, pipeline):
    latents, text = kinds(plan_of(images, made).shards)["latents"], {"text": 1, "common": 1}

    def missing(**more):
        return kinds(plan_of(images, made, **{"pipeline": pipeline, **more}).missing())

    assert missing() == {}
    assert missing(max_sequence_length=8) == missing(negative_prompt="ugly") == text
    assert missing(dtype=torch.bfloat16) == {"latents": latents, **text}
    assert missing(sizes=[(32, 32)])["latents"] == 3 and "text" not in missing(sizes=[(32, 32)])
    scaled(pipeline / "transformer/diffusion_pytorch_model.safetensors", 1.01)
    assert missing() == {}
    scaled(pipeline / "vae/diffusion_pytorch_model.safetensors", 1.01)
    assert missing() == {"latents": latents}
    (pipeline / "tokenizer/tokenizer.json").write_text(
        (pipeline / "tokenizer/tokenizer.json").read_text() + " "
    )
    assert missing() == {"latents": latents, **text}


@pytest.mark.parametrize("size", [2**16, 2**23])
def test_any_tensor_of_a_fine_tune_shows(pipeline, size):
    path = pipeline / "vae/diffusion_pytorch_model.safetensors"
    weights = {
        f"layer{i}": torch.randn(size // 40, generator=torch.Generator().manual_seed(i)) for i in range(10)
    }
    save_file(weights, path)
    seen = {fingerprint(PipelineSource(pipeline), "vae")}
    for name in weights:
        save_file({**weights, name: weights[name] * 1.0001}, path)
        seen.add(fingerprint(PipelineSource(pipeline), "vae"))
    assert len(seen) == 11


def test_a_revision_of_the_hub_is_part_of_the_key(tmp_path):
    snapshots = [shutil.copytree(FLUX, tmp_path / "snapshots" / name) for name in ("abc", "def")]
    assert fingerprint(PipelineSource(snapshots[0]), "vae") != fingerprint(
        PipelineSource(snapshots[1]), "vae"
    )
    assert fingerprint(PipelineSource(FLUX), "vae") == fingerprint(PipelineSource(str(FLUX)), "vae")


def test_a_changed_caption_or_image_is_encoded_and_nothing_else(families, images, made, tmp_path):
    own, cache = shutil.copytree(images, tmp_path / "own"), shutil.copytree(made, tmp_path / "cache")
    lines = (own / "metadata.jsonl").read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), "text": "a grey mouse"})
    (own / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    plan = plan_of(own, cache)
    assert kinds(plan.missing()) == {"text": 1}
    plan.encode(families, progress=False)
    assert plan.open().captions[4] == "a grey mouse"
    shutil.copy(own / "00001.png", own / "00000.png")
    assert kinds(plan_of(own, cache).missing())["latents"] >= 1


def test_images_that_do_not_open_or_change_meanwhile_are_named(families, images, tmp_path):
    own = shutil.copytree(images, tmp_path / "own")
    data = (own / "00017.png").read_bytes()
    for broken in (b"", b"no image", data[: len(data) // 2], data[:60] + b"\0\0\0\0" + data[64:]):
        (own / "00017.png").write_bytes(broken)
        with pytest.raises(ValueError, match="00017.png does not open"):
            plan_of(own, tmp_path / "cache")
    (own / "00017.png").write_bytes(data)
    plan = plan_of(own, tmp_path / "cache")
    shutil.copy(own / "00016.png", own / "00017.png")
    with pytest.raises(ValueError, match="00017.png has changed"):
        plan.encode(families, progress=False)


# The order of an epoch


buckets = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(buckets, st.integers(1, 12), st.integers(0, 5), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_every_image_once_an_epoch_and_few_mixed_updates(counts, batch, epoch, seed):
    size_of = torch.tensor([size for size, count in enumerate(counts) for _ in range(count)])
    size_of = size_of[torch.randperm(len(size_of), generator=torch.Generator().manual_seed(seed))]
    n = len(size_of)
    first, last = (
        epoch * n // batch,
        ((epoch + 1) * n - 1) // batch,
    )  # the updates that this epoch has a part in
    updates = [batch_indices(u, batch, size_of, seed) for u in range(first, last + 1)]
    assert all(len(rows) == batch for rows in updates)
    start = epoch * n - first * batch
    assert sorted(torch.cat(updates)[start : start + n].tolist()) == list(range(n))
    assert sum(len(size_of[rows].unique()) > 1 for rows in updates) <= (
        len(counts) + 1 if len(counts) > 1 else 0
    )


def test_epochs_and_seeds_have_orders_of_their_own():
    size_of = torch.arange(60) % 3
    orders = {tuple(epoch_order(epoch, 4, size_of, seed).tolist()) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25


class Numbers:
    """A family whose latents and embeddings say the number of the image: its colour, and the number in its
    caption."""

    max_sequence_length = 1

    def encode_images(self, images):
        red, green = ((images[:, c, 0, 0] + 1) * 127.5 for c in (0, 1))
        return (red.round() * 256 + green.round())[:, None]

    def encode_text(self, captions):
        numbers = torch.tensor([[float(f"0 {caption}".split()[-1])] for caption in captions])
        return {"tokens": numbers, "empty_tokens": torch.zeros(1, 1).expand(len(captions), 1)}


@pytest.mark.parametrize("processes", [1, 2])
def test_1000_images_in_uneven_buckets(tmp_path, processes):
    """Batch 8: every image exactly once an epoch, and no caption ever on another's latents."""
    sizes, lines = [(8, 8), (8, 16), (16, 8)], []
    for i in range(1000):
        height, width = sizes[0 if i % 10 < 7 else 1 if i % 10 < 9 else 2]
        Image.new("RGB", (width, height), (i // 256, i % 256, 0)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"image {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    for number in range(processes):
        plan = plan_of(tmp_path, tmp_path / "cache", sizes=sizes, max_sequence_length=1)
        plan.encode(dict.fromkeys(sizes, Numbers()), (number, processes), progress=False)
    rows, seen = plan.open(), [[] for _ in range(processes)]
    assert torch.bincount(rows.size_of).tolist() == [700, 200, 100]
    for update in range(250):  # two epochs
        index, part = batch_indices(update, 8, rows.size_of, 0), 8 // processes
        for number in range(processes):
            mine = index[number * part : (number + 1) * part]
            for size in rows.size_of[mine].unique():
                some = mine[rows.size_of[mine] == size]
                assert (
                    rows.latents(some).flatten().tolist()
                    == rows.text(some)["tokens"].flatten().tolist()
                    == some.tolist()
                )
            seen[number] += mine.tolist()
    counted = Counter(i for mine in seen for i in mine)
    assert counted == dict.fromkeys(range(1000), 2)
