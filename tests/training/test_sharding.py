"""A base in slices is the same base: for every family, in a run, in one that was killed, with two sizes."""

import json
import os
import shutil
import signal
import socket
import time
from types import SimpleNamespace

import forked
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import scfm.training.sharding as sharding
from scfm.cli import main
from scfm.data.cache import batch_indices
from scfm.data.prepare import check_processes
from scfm.models.family import FAMILIES
from scfm.models.loading import load_pipeline
from scfm.models.lora import LoraModels, adapter_parameters
from scfm.models.scaled_lora import power_file
from scfm.models.source import PipelineSource
from scfm.training.config import DistillConfig
from scfm.training.distill_trainer import DistillTrainer
from scfm.training.plan import make_plan
from toy.pipelines import BUILD, FLUX, TOKENS, build_flux, build_sd3
from toy.shapes import draw_captions, draw_images

FLOAT32, CPU = torch.float32, torch.device("cpu")
CAPTIONS = ["a large red cross", "a small blue ring on the left", "a green star"]
ALL = {"FluxPipeline": build_flux, "StableDiffusion3Pipeline": build_sd3, **BUILD}


def in_group(rank, count, meeting, folder, target, *args):
    """What a process of `together` does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    result = target(*args)
    (folder / f"{target.__name__}{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def together(count, folder, target, *args):
    """What target(*args) returns in each of so many processes of one group."""
    meeting = folder / f"meeting_{target.__name__}"
    processes = [
        forked.SERVER.Process(target=in_group, args=(r, count, meeting, folder, target, *args), daemon=True)
        for r in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count
    return [json.loads((folder / f"{target.__name__}{r}.json").read_text()) for r in range(count)]


# The slices


@pytest.mark.parametrize("rows, count", [(7, 2), (8, 4), (2, 4), (5, 3), (1, 2)])
def test_slices_are_those_of_chunk(rows, count):
    own = [torch.arange(rows)[slice(*sharding.slice_bounds(rows, i, count))].tolist() for i in range(count)]
    theirs = [part.tolist() for part in torch.arange(rows).chunk(count)]
    assert own == theirs + [[]] * (count - len(theirs))


def test_parts_become_as_many_as_asked_for_and_keep_their_order():
    parts = [torch.arange(1), torch.arange(1, 6)]
    for count in range(2, 7):
        split = sharding.split_into(parts, count)
        assert len(split) == count and torch.cat(split).tolist() == list(range(6)) and min(map(len, split))
    with pytest.raises(ValueError, match="6 examples in 2 parts cannot become 7 parts"):
        sharding.split_into(parts, 7)


class Counted:
    """safe_open, which counts the bytes that are read."""

    read = 0

    def __init__(self, *args, **more):
        self.opened = safe_open(*args, **more)

    def __enter__(self):
        self.file = self.opened.__enter__()
        return self

    def __exit__(self, *error):
        return self.opened.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        part = self.file.get_slice(name)

        class Part:
            get_shape = part.get_shape

            def __getitem__(self, index):
                rows = part[index]
                Counted.read += rows.numel() * rows.element_size()
                return rows

        return Part()


def share(folder, shard):
    """[bytes read, bytes held, bytes of the whole base]."""
    sharding.safe_open = Counted
    pipe = sharding.load_sharded(PipelineSource(folder), FLOAT32, CPU, shard)
    return [Counted.read, *sharding.held_bytes(pipe.transformer)]


@pytest.mark.slow
def test_each_process_reads_and_holds_its_share(tmp_path):
    file = FLUX / "transformer/diffusion_pytorch_model.safetensors"
    size = 4 * sum(p.numel() for p in build_flux().transformer.parameters())
    for read, held, whole in together(4, tmp_path, share, FLUX, 2):  # two groups of two
        assert whole == size
        assert 0.49 < held / whole < 0.51 and 0.49 < read / file.stat().st_size < 0.51


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{pipeline's class: its folder}: weights in several files, and beside them a point of its latents."""
    folders = {}
    for name, build in ALL.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        pipe = build()
        pipe.save_pretrained(folder)
        shutil.rmtree(folder / "transformer")
        pipe.transformer.save_pretrained(folder / "transformer", max_shard_size="1MB")
        family = FAMILIES[name](pipe, 32, 32, 32 if name in BUILD else TOKENS)
        cond = {**family.encode_text(CAPTIONS), "guidance": torch.tensor([1.0, 4.0, 2.0])}
        x = torch.randn(3, *family.latent_shape, generator=torch.Generator().manual_seed(1))
        torch.save([x, torch.linspace(0.9, 0.2, 3), cond, family.max_sequence_length], folder / "point.pt")
    return folders


def answers(pipe, folder, shake=0.2):
    """Velocities of teacher and student, and the student's gradient, with checkpointing."""
    *point, length = torch.load(folder / "point.pt", weights_only=True)
    family = FAMILIES[PipelineSource(folder).class_name](pipe, 32, 32, length)
    torch.manual_seed(0)
    with sharding.full_shapes(pipe.transformer):
        models = LoraModels(pipe.transformer, family.velocity, family.lora_targets, rank=2, alpha=6)
    for i, weight in enumerate(adapter_parameters(pipe.transformer, "student")):
        weight.data.normal_(std=shake, generator=torch.Generator().manual_seed(i))
    pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.train()
    teacher, student = models.teacher(*point), models.student(*point)
    student.square().mean().backward()
    # of the last block's text some families use nothing: no gradient
    return [teacher, student.detach(), *(p.grad for p in models.parameters("student") if p.grad is not None)]


class Gathered(TorchDispatchMode):
    """Counts the bytes of what is gathered from all processes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d._allgather_base_.default:
            self.bytes += args[0].numel() * args[0].element_size()
        return function(*args, **(kwargs or {}))


def compare(folders, shard):
    """{name: the largest difference of a sharded base from a whole one, relative}. The weights are sent once
    for each forward and once for backward, whatever is recomputed."""
    found = {}
    for name, folder in folders.items():
        torch.manual_seed(torch.distributed.get_rank())  # what is drawn at loading has to play no part
        pipe = sharding.load_sharded(PipelineSource(folder), FLOAT32, CPU, shard)
        with Gathered() as gathered:
            sharded = answers(pipe, folder)
        times = gathered.bytes / sharding.held_bytes(pipe.transformer)[1]
        assert 3 - 1e-9 < times < 3.1, times  # padding; the teacher's forward, the student's, its backward
        whole = answers(load_pipeline(folder, FLOAT32, parts="transformer")[0], folder)
        pairs = zip(sharded, whole, strict=True)
        found[name] = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)
        assert len(whole) > 20 and (whole[0] - whole[1]).abs().max() > 1e-3
    return found


@pytest.mark.slow
def test_every_family_computes_the_same_in_slices(saved, tmp_path):
    assert any(len(list(folder.glob("transformer/*.safetensors"))) > 1 for folder in saved.values())
    for found in together(2, tmp_path, compare, saved, 2):
        assert found.keys() == ALL.keys() and max(found.values()) < 1e-4, found


# Runs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images, five of them wide, with captions."""
    folder = tmp_path_factory.mktemp("own")
    generator = torch.Generator().manual_seed(3)
    captions = draw_captions(10, generator)
    lines = []
    for i, (image, text) in enumerate(zip(draw_images(captions, generator)[0], captions.text, strict=False)):
        image = Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).byte().numpy())
        (image if i < 5 else image.resize((48, 24))).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def words(images, out, **more):
    """The command, as behind `scfm`."""
    settings = {
        "pretrained_model_name_or_path": FLUX,
        "train_data_dir": images,
        "output_dir": out,
        "height": 32,
        "width": 32,
        "max_sequence_length": TOKENS,
        "rank": 2,
        "algorithm": "dual",
        "learning_rate": 3e-4,
        "max_train_steps": 4,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "teacher_steps": 2,
        "num_eval_prompts": 2,
        "eval_num_steps": 2,
        "validation_steps": 0,
        "checkpointing_steps": 2,
        "report_to": "none",
        **more,
    }
    return [
        "distill",
        *(w for k, v in settings.items() for w in ([f"--{k}"] if v is True else [f"--{k}", v])),
    ]


def adapters(out, step=4):
    """{adapter: its tensors} of a checkpoint."""
    state = torch.load(out / f"checkpoints/{step:06d}/state.pt", weights_only=True)
    return state["adapters"]


def furthest(a, b):
    """The largest difference of two dicts of tensors."""
    assert a.keys() == b.keys() and a
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dual", "step_scaled"])
def test_a_shared_base_trains_the_same_lora(images, tmp_path, algorithm):
    """And the second process, whose folder here is another, writes nothing but its settings."""
    more = {"algorithm": algorithm, "gradient_checkpointing": True, "validation_steps": 4}
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert main([str(w) for w in words(images, one, **more)]) == 0
    pair = start_pair([words(images, out, **more, shard=2) for out in (two, tmp_path / "other")], log)
    assert [process.join(120) or process.exitcode for process in pair] == [0, 0], log.read_text()[-2000:]

    ours, theirs = adapters(one), adapters(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert furthest(ours[name], theirs[name]) < 1e-6
    assert max(float(v.abs().max()) for k, v in ours["student"].items() if "lora_B" in k) > 1e-4
    first = "pytorch_lora_weights.safetensors"
    files = [first, *([power_file(first, 2).name] if algorithm == "step_scaled" else [])]
    for name in [f"{folder}/{file}" for file in files for folder in (".", "student")]:
        assert furthest(load_file(one / name), load_file(two / name)) < 1e-6
    a, b = (json.loads((out / "selection.json").read_text()) for out in (one, two))
    assert a.pop("endpoint_distance").keys() == b.pop("endpoint_distance").keys() and a == b
    assert (two / "validation/000004.png").is_file() and log.read_text().count("is saved as") == 1
    written = {p.name for p in (tmp_path / "other").rglob("*") if p.is_file()}
    assert written <= {"config.json", "run.json", "inputs.json"}
    state = (two / "checkpoints/000004/state.pt").stat().st_size  # adapters and Adam's moments, no base
    assert state == pytest.approx((one / "checkpoints/000004/state.pt").stat().st_size, rel=0.01)


def start_pair(commands, log):
    """Two commands as the two processes of one group."""
    group = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    return [
        forked.start(command, log, RANK=rank, LOCAL_RANK=rank, ACCELERATE_USE_CPU="true", **group)
        for rank, command in zip("01", commands, strict=True)
    ]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


SIZES = {"more_sizes": "24x48", "micro_batch_size": 0, "max_train_steps": 6, "global_batch_size": 6}


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of two sizes, in two processes that share the base."""
    out = tmp_path_factory.mktemp("whole") / "run"
    forked.run_two(words(images, out, **SIZES, shard=2), out.with_suffix(".log"), 120)
    return out


@pytest.mark.slow
def test_killed_and_called_again_it_is_the_same_run_bit_for_bit(images, whole, tmp_path):
    command, log = words(images, tmp_path / "run", **SIZES, shard=2), tmp_path / "log"
    processes = forked.start_two(command, log)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/000002").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert not (tmp_path / "run/selection.json").exists()
    forked.run_two(command, log, 120)
    ours, theirs = adapters(whole, 6), adapters(tmp_path / "run", 6)
    assert all(furthest(ours[name], theirs[name]) == 0 for name in ours)
    assert (whole / "selection.json").read_text() == (tmp_path / "run/selection.json").read_text()


@pytest.mark.slow
def test_a_run_goes_on_without_the_others(images, whole, tmp_path):
    """From a checkpoint of two processes that shared the base, in one that holds it."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/000006")
    (tmp_path / "run/selection.json").unlink()
    assert main([str(w) for w in words(images, tmp_path / "run", **SIZES)]) == 0
    ours, theirs = adapters(whole, 6), adapters(tmp_path / "run", 6)
    assert all(furthest(ours[name], theirs[name]) < 1e-4 for name in ours)


@pytest.mark.slow
def test_processes_with_unlike_sizes_make_equally_many_forwards(images, whole, tmp_path, monkeypatch):
    """Where they did not, the run of two sizes would have waited for ever."""
    command = words(images, tmp_path / "run", **SIZES)
    assert main([str(w) for w in command]) == 0
    ours, theirs = adapters(whole, 6), adapters(tmp_path / "run", 6)
    assert all(furthest(ours[name], theirs[name]) < 1e-4 for name in ours)  # other companies: other rounding

    settings = json.loads((tmp_path / "run/config.json").read_text()) | {"max_train_steps": 7}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    run = DistillTrainer(DistillConfig(**settings), progress=False)
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    uneven = 0
    for step in range(6):
        index = batch_indices(step, 6, run.dataset.size_of, 0)
        fewest = [run.parts_of(index, process) for process in range(2)]
        uneven += len(fewest[0]) != len(fewest[1])
        counts = []
        for process in range(2):
            monkeypatch.setattr(type(run.accelerator), "process_index", process)
            for takes_all in (False, True):
                run.takes_all = takes_all
                parts = run.micro_batches(index)
                assert sorted(torch.cat(parts).tolist()) == [3 * process + i for i in range(3)]
            counts.append(len(parts))
        assert counts[0] == counts[1] == max(map(len, fewest))
    assert uneven


# The plan


def test_the_plan_counts_the_share_of_one_process():
    base = 4 * sum(p.numel() for p in build_flux().transformer.parameters()) / 2**30
    settings = {"height": 32, "width": 32, "max_sequence_length": TOKENS, "rank": 2}
    whole = make_plan(DistillConfig(pretrained_model_name_or_path=str(FLUX), **settings))
    shared = make_plan(DistillConfig(pretrained_model_name_or_path=str(FLUX), **settings, shard=4))
    assert shared["GiB"]["base"] == pytest.approx(base / 4) and whole["GiB"]["base"] == pytest.approx(base)
    assert 0 < shared["GiB"]["blocks in use"] < base and "blocks in use" not in whole["GiB"]
    assert (
        shared["GiB received a step"] == pytest.approx(4 * 3 / 4 * base) and not whole["GiB received a step"]
    )
    assert shared["seconds a step"] == pytest.approx(whole["seconds a step"] / 4)
    activations = [plan["GiB"]["activations, guessed"] for plan in (whole, shared)]
    assert activations[1] == pytest.approx(activations[0] / 4)
    halves = make_plan(
        DistillConfig(pretrained_model_name_or_path=str(FLUX), **settings, shard=4, micro_batch_size=1)
    )
    assert halves["GiB received a step"] == pytest.approx(
        2 * shared["GiB received a step"]
    )  # 2 examples each
    with pytest.raises(ValueError, match="quantize='int8' with shard"):
        make_plan(
            DistillConfig(pretrained_model_name_or_path=str(FLUX), **settings, shard=4, quantize="int8")
        )


def test_the_plan_says_who_holds_what(capsys):
    tiny = ["--height", "32", "--width", "32", "--max_sequence_length", str(TOKENS)]
    assert main(["plan", "--pretrained_model_name_or_path", str(FLUX), *tiny, "--shard", "4"]) == 0
    assert "shared by 4 GPUs" in capsys.readouterr().out


# What is refused


@pytest.mark.parametrize(
    "more, message",
    [
        ({"shard": 2}, "shard is 2, but 1 process was launched"),
        ({"shard": 1}, "shard=1: a number of processes, 2 or more; 0 for none"),
        ({"shard": 2, "quantize": "int8"}, "quantize='int8' with shard"),
        ({"shard": 2, "compile_blocks": True}, "compile_blocks=True with shard"),
        ({"shard": 2, "non_shortcut_ratio": 0.5}, "non_shortcut_ratio=0.5 with shard"),
        (
            {"shard": 2, "guidance_mode": "distilled", "algorithm": "one_ema"},
            "guidance_mode distilled with sh",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_before_any_work(images, tmp_path, capsys, more, message):
    assert main([str(w) for w in words(images, tmp_path / "run", **more)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_captions_to_generate_from_are_refused(tmp_path, capsys):
    command = words(None, tmp_path / "run", shard=2, prompts=tmp_path / "captions.txt")
    i = command.index("--train_data_dir")
    assert main([str(w) for w in command[:i] + command[i + 2 :]]) == 2
    assert "make the images first, with scfm data" in capsys.readouterr().err


def test_processes_that_are_no_groups_are_refused():
    for shard, processes in ((2, 3), (4, 2), (3, 4)):
        with pytest.raises(ValueError, match=f"shard is {shard}, but {processes} processes were launched"):
            sharding.check_sharding(shard, processes)
    for shard, processes in ((0, 1), (0, 3), (2, 2), (8, 16)):
        sharding.check_sharding(shard, processes)


def test_another_sharding_is_refused_by_the_name_of_ours(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate was set up for FSDP.*scfm distill --shard N"):
        check_processes(SimpleNamespace(num_processes=1))


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    pipe = build_flux()
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="lies in diffusion_pytorch_model.bin: load and save it once"):
        sharding.check_slices(PipelineSource(tmp_path))
    sharding.check_slices(PipelineSource(FLUX))


def test_a_missing_tensor_and_another_shape_are_named(tmp_path):
    transformer = sharding.hollow_transformer(PipelineSource(FLUX))
    file = FLUX / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "x_embedder.bias"}, tmp_path / "fewer.safetensors")
    with pytest.raises(ValueError, match="lack x_embedder.bias: download or save"):
        sharding.read_slices(transformer, [tmp_path / "fewer.safetensors"], FLOAT32, CPU)
    weights["x_embedder.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"x_embedder.bias is \[3\], and the model has \[128\]"):
        sharding.read_slices(transformer, [tmp_path / "other.safetensors"], FLOAT32, CPU)


def test_a_family_whose_models_are_evaluated_apart_is_refused():
    """Its processes would make unequal numbers of forwards, and hang."""
    sharding.check_rows(SimpleNamespace(forward_rows=lambda cond: None))
    with pytest.raises(
        ValueError, match="SimpleNamespace does not say .* forward_rows, or leave --shard out"
    ):
        sharding.check_rows(SimpleNamespace())
