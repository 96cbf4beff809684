"""Videos: what is read of a folder, of an animation and of a film, and what is written loses nothing."""

import json
import struct
import sys

import pytest
import torch
from PIL import Image, PngImagePlugin

from scfm.data.animation import (
    SHOWN,
    frames_of,
    gif_beside,
    gif_bytes,
    middle_frame,
    motion_of,
    save_pictures,
    save_png,
    strip_of,
)
from scfm.data.images import list_images, read_folder
from scfm.data.videos import digest_of, first_frames, is_video, list_videos, read_frames

F, H, W = 5, 8, 12


def video(seed=0, frames=F):
    """(F, 3, H, W) in [-1, 1] of whole bytes: what a file can hold, a little above as a file rounds down."""
    values = torch.randint(255, (frames, 3, H, W), generator=torch.Generator().manual_seed(seed))
    return (values + 0.01) / 127.5 - 1


def write(path, frames, **info):
    save_png(frames_of(frames), path, **info)
    return path


@pytest.mark.parametrize("still", [(), (2,), (1, 2, 3, 4)], ids=["moving", "one the same", "all the same"])
def test_a_png_of_a_video_loses_no_frame_and_no_bit(tmp_path, still):
    frames = video()
    for i in still:
        frames[i] = frames[i - 1]
    path = write(tmp_path / "a.png", frames)
    with Image.open(path) as opened:
        assert getattr(opened, "n_frames", 1) == F
    torch.testing.assert_close(read_frames(path, H, W, F), frames, rtol=0, atol=1e-4)


def test_a_png_of_a_video_carries_text_and_shows_its_middle(tmp_path):
    info, frames = PngImagePlugin.PngInfo(), video()
    info.add_text("scfm", "a mark")
    path = write(tmp_path / "a.png", frames, pnginfo=info)
    with Image.open(path) as opened:
        assert opened.info["scfm"] == "a mark"
        opened.verify()
    with Image.open(path) as opened:
        middle = middle_frame(opened).convert("RGB")
    assert middle.tobytes() == frames_of(frames)[2].tobytes()
    with Image.open(write(tmp_path / "b.png", frames[0])) as image:
        assert middle_frame(image).size == (W, H)


def test_motion_is_the_mean_change_of_a_pixel(tmp_path):
    frames = video()
    want = ((frames[1:] - frames[:-1]) / 2).abs().mean().item()
    assert motion_of(write(tmp_path / "a.png", frames)) == pytest.approx(want, abs=1e-5)
    assert motion_of(write(tmp_path / "b.png", frames[:1].expand(F, 3, H, W))) == 0


def test_a_strip_has_the_first_and_the_last_frame(tmp_path):
    videos = torch.stack([video(0, 21), video(1, 21)])
    strip = save_pictures(videos, tmp_path / "a.png")
    assert strip.shape == (3, 2 * H, SHOWN * W)
    for row, frames in enumerate(videos):
        for column, frame in ((0, frames[0]), (SHOWN - 1, frames[-1])):
            cell = strip[:, row * H : (row + 1) * H, column * W : (column + 1) * W]
            torch.testing.assert_close(cell, frame / 2 + 0.5)
    with Image.open(gif_beside(tmp_path / "a.png")) as opened:
        assert (opened.n_frames, opened.size) == (21, (2 * W, H))
    assert strip_of(videos[:, :2], 9).shape == (3, 2 * H, 2 * W)
    save_pictures(videos[:, 0], tmp_path / "images.png")
    assert not gif_beside(tmp_path / "images.png").exists()


def test_a_gif_of_large_videos_is_scaled_down():
    import io

    with Image.open(io.BytesIO(gif_bytes(torch.zeros(1, 2, 3, 960, 480), 1))) as opened:
        assert opened.size == (240, 480)


def film(path, frames, **more):
    """The frames as an MP4 file."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=16)
        stream.width, stream.height, stream.pix_fmt = frames.shape[3], frames.shape[2], "yuv420p"
        for image in frames_of(frames):
            out.mux(stream.encode(av.VideoFrame.from_image(image)))
        out.mux(stream.encode())
    return path


def smooth(frames=F):
    """A video that survives compression: a grey that grows brighter, and a red side."""
    levels = torch.linspace(-0.6, 0.6, frames)[:, None, None, None]
    made = levels.expand(frames, 3, 32, 48).clone()
    made[:, 0, :, :24] = 1.0
    return made


@pytest.mark.parametrize("kind", ["folder", "gif", "png", "webp", "mp4"])
def test_the_same_frames_are_read_of_every_kind(tmp_path, kind):
    frames = smooth()
    images = frames_of(frames)
    path = tmp_path / "clip" if kind == "folder" else tmp_path / f"clip.{kind}"
    if kind == "folder":
        path.mkdir()
        for i, image in enumerate(images):
            image.save(path / f"{i:03d}.png")
        (path / "notes.txt").write_text("no frame")
    elif kind == "mp4":
        film(path, frames)
    else:
        lossless = {"lossless": True} if kind == "webp" else {}
        images[0].save(path, save_all=True, append_images=images[1:], duration=60, **lossless)
    assert is_video(path)
    read = read_frames(path, 32, 48, F)
    assert read.shape == (F, 3, 32, 48) and (read - frames).abs().mean() < 0.06
    assert torch.equal(read_frames(path, 32, 48, 3), read[:3])  # the first ones
    assert read_frames(path, 16, 16, F).shape == (F, 3, 16, 16)


def test_a_film_is_turned_as_its_file_says(tmp_path):
    path = film(tmp_path / "a.mp4", smooth())
    data = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # 90 degrees, clockwise
    at = data.index(plain, data.index(b"tkhd"))
    data[at : at + len(plain)] = turned
    path.write_bytes(data)
    frame = next(first_frames(path, 1))
    assert frame.size == (32, 48)  # as wide as it was high
    top, bottom = frame.getpixel((16, 4)), frame.getpixel((16, 44))
    assert top[0] > bottom[0] + 80  # the red left side has become the top


def folder_of(path, **videos):
    path.mkdir()
    rows = []
    for name, frames in videos.items():
        write(path / f"{name}.png", frames)
        rows.append({"file_name": f"{name}.png", "text": f"a {name}"})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_list_of_videos_is_read_like_one_of_images(tmp_path):
    folder = folder_of(tmp_path / "videos", cat=video(0), dog=video(1, 9))
    first, second = list_videos(folder, F)
    assert (first.caption, first.height, first.width) == ("a cat", H, W)
    assert first.digest == digest_of(folder / "cat.png") != second.digest
    assert [image.digest for image in list_images(folder)] == [first.digest, second.digest]
    with pytest.raises(ValueError, match=r"cat.png has 5 frames, not 9: mend them"):
        list_videos(folder, 9)
    (folder / "dog.png").write_bytes(b"no video")
    with pytest.raises(ValueError, match="dog.png does not open as a video"):
        list_videos(folder, F)


def test_folders_of_frames_have_captions_beside_them(tmp_path):
    for name in ("a.b", "cat"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(frames_of(video())):
            image.save(tmp_path / name / f"{i}.png")
        (tmp_path / f"{name}.txt").write_text(f"the {name}\n")
    write(tmp_path / "dog.gif", video()[0])
    (tmp_path / "cache").mkdir()  # is no video
    with pytest.raises(ValueError, match=r"no caption beside dog.gif: write dog.txt"):
        list_videos(tmp_path, F)
    (tmp_path / "dog.gif").unlink()
    listed = list_videos(tmp_path, F)
    assert [(video.path.name, video.caption) for video in listed] == [("a.b", "the a.b"), ("cat", "the cat")]
    assert listed[0].digest == listed[1].digest
    frame = tmp_path / "cat/3.png"
    frame.rename(frame.with_name("9.png"))
    assert list_videos(tmp_path, F)[1].digest != listed[1].digest  # another order
    frame.with_name("9.png").unlink()
    with pytest.raises(ValueError, match="cat has 4 frames, not 5"):
        list_videos(tmp_path, F)
    with pytest.raises(FileNotFoundError):
        read_folder(tmp_path)  # none of them is an image


def test_frames_of_several_sizes_are_no_video(tmp_path):
    (tmp_path / "cat").mkdir()
    for i, image in enumerate(frames_of(video())):
        image.resize((W + (i == 2), H)).save(tmp_path / f"cat/{i}.png")
    with pytest.raises(ValueError, match="frames of several sizes"):
        read_frames(tmp_path / "cat", H, W, F)


def test_films_without_a_reader_are_one_line_that_names_the_extra(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "videos", cat=video())
    (folder / "cat.png").rename(folder / "cat.mp4")
    (folder / "metadata.jsonl").write_text('{"file_name": "cat.mp4", "text": "a cat"}\n')
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("scfm.data.videos.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"cat.mp4 is read by PyAV, .* pip install 'scfm\[video\]'"):
        list_videos(folder, F)


def test_a_broken_film_is_named(tmp_path):
    pytest.importorskip("av")
    folder = folder_of(tmp_path / "videos", cat=video())
    (folder / "cat.mp4").write_bytes(b"no film")
    (folder / "metadata.jsonl").write_text('{"file_name": "cat.mp4", "text": "a cat"}\n')
    with pytest.raises(ValueError, match="cat.mp4 does not open as a video"):
        list_videos(folder, F)
