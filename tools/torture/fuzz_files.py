"""Malformed images and weights, as from an untrusted source or a bad disk: valid files with random changes.

Cases are reproducible from their seed, except for names that torch generates in weights files.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyvips
import torch
import yaml
from safetensors.torch import save

from pipeline.core.vgg_layers import CONV_NAMES

WIDTH_PX, HEIGHT_PX = 57, 43
# The config of a small image, which renders in a tenth of a second.
SMALL: dict[str, Any] = {
    "content": "content.png",
    "styles": [{"image": "style.png"}],
    "output": "out.png",
    "work_dir": "run",
    "size": 48,
    "initial_size": 48,
    "network": {"name": "random", "content_layers": {}, "style_layers": {"conv1_1": 1.0}},
    "optimizer": {"max_iterations": 1},
    "compute": {"device": "cpu", "tile_px": 64},
    "memory": {"limit": "2GiB"},
    "store": {"chunk_px": 32},
    "limits": {"max_decode_bytes": "256MiB"},
}


@dataclass(frozen=True)
class Case:
    """Files of a folder, arguments of a command, and whether a run follows a successful plan."""

    kind: str
    files: dict[str, bytes]
    argv: tuple[str, ...] = ("plan", "-c", "c.yaml")
    then_run: bool = False


Mutate = Callable[[random.Random, bytes], bytes]


# --- bytes ---


def number(rng: random.Random, bits: int) -> int:
    """A number that often causes errors: near a limit or a power of two."""
    top = 2**bits
    near = rng.choice([0, 1, 2, 3, 255, 256, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, top - 1, top // 2, top - 4096])
    return (near if rng.random() < 0.8 else rng.getrandbits(bits)) % top


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    reach = len(data) if rng.random() < 0.3 else min(len(data), rng.choice([16, 64, 256, 1024]))
    for _ in range(rng.randint(1, 8)):
        if reach:
            changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """Overwrite 1 to 8 bytes with a number."""
    size = rng.choice([1, 2, 4, 8])
    if len(data) < size:
        return data
    at = rng.randrange(min(len(data), rng.choice([64, 1024, 10**9])) - size + 1) if len(data) > size else 0
    return data[:at] + number(rng, 8 * size).to_bytes(size, rng.choice(["big", "little"])) + data[at + size :]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] if data else data


def drop(rng: random.Random, data: bytes) -> bytes:
    """Remove some bytes."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice([1, 2, 4, 17, 300]) :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """Repeat a piece two or more times."""
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice([1, 4, 12, 200])]
    return data[:start] + piece * rng.choice([2, 3, 100, 5000]) + data[start:]


def pad(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([b"\0", b"\xff", b"\n", data[:100]]) * rng.choice([1, 100, 70_000])


def resize_claims(rng: random.Random, data: bytes) -> bytes:
    """Replace the image's width or height, in any byte order, with another number."""
    side, form = rng.choice([WIDTH_PX, HEIGHT_PX]), rng.choice([">H", "<H", ">I", "<I"])
    old = struct.pack(form, side)
    return data.replace(old, struct.pack(form, number(rng, 8 * len(old))), rng.choice([1, -1]))


BYTES: list[Mutate] = [flip_bits, flip_bits, overwrite, overwrite, cut, drop, repeat, pad]


# --- images ---


def sample_image() -> Any:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT_PX, 0:WIDTH_PX]
    waves = [127 + 90 * np.sin(x / (5 + c)) * np.cos(y / (7 + c)) for c in range(3)]
    pixels = np.clip(np.stack(waves, -1) + rng.normal(0, 9, (HEIGHT_PX, WIDTH_PX, 3)), 0, 255).astype(np.uint8)
    return pyvips.Image.new_from_array(pixels, interpretation="srgb")


def sample_images() -> dict[str, bytes]:
    """Small images of every format and its variants."""
    image = sample_image()
    deep = (image.cast("ushort") * 257).cast("ushort").copy(interpretation="rgb16")
    turned = image.copy()
    turned.set_type(pyvips.GValue.gint_type, "orientation", 6)
    profiled = image.icc_transform("p3", input_profile="srgb")
    tiles = {"tile": True, "tile_width": 16, "tile_height": 16}
    return {
        "jpeg": image.jpegsave_buffer(),
        "jpeg progressive": image.jpegsave_buffer(interlace=True),
        "jpeg turned": turned.jpegsave_buffer(),
        "jpeg cmyk": image.colourspace("cmyk").jpegsave_buffer(),
        "png": image.pngsave_buffer(),
        "png interlaced": image.pngsave_buffer(interlace=True),
        "png deep": deep.pngsave_buffer(),
        "png palette": image.pngsave_buffer(palette=True),
        "png profile": profiled.pngsave_buffer(),
        "png alpha": image.bandjoin(128).pngsave_buffer(),
        "tiff": image.tiffsave_buffer(),
        "tiff big": image.tiffsave_buffer(bigtiff=True, compression="lzw"),
        "tiff tiles": image.tiffsave_buffer(compression="deflate", pyramid=True, **tiles),
        "tiff jpeg": image.tiffsave_buffer(compression="jpeg", tile_height=HEIGHT_PX),
        "tiff deep": deep.tiffsave_buffer(predictor="horizontal", compression="deflate"),
        "tiff lab": image.colourspace("lab").tiffsave_buffer(),
        "webp": image.webpsave_buffer(),
        "webp lossless": image.webpsave_buffer(lossless=True),
        "webp alpha": image.bandjoin(128).webpsave_buffer(),
        "gif": image.gifsave_buffer(),
        "avif": image.heifsave_buffer(compression="av1"),
    }


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def change_png(rng: random.Random, data: bytes) -> bytes:
    """Change the chunks of a PNG and recompute their checksums."""
    chunks = list(png_chunks(data))
    if not data.startswith(b"\x89PNG") or not chunks:
        return flip_bits(rng, data)
    at = rng.randrange(len(chunks))
    kind, body = chunks[at]
    match rng.randrange(6):
        case 0:
            at = 0
            kind, body = chunks[0]
            wide, high = (number(rng, 32) for _ in range(2))
            body = struct.pack(">II", *rng.choice([(wide, high), (wide, HEIGHT_PX), (WIDTH_PX, high)])) + body[8:]
        case 1:
            body = overwrite(rng, body)
        case 2:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
        case 3:
            del chunks[at]
            at = None if not chunks else rng.randrange(len(chunks))
        case 4:
            bomb = zlib.compress(b"\0" * rng.choice([10**5, 10**8]), 9)
            kind, body = rng.choice([(b"iCCP", b"x\0\0" + bomb), (b"zTXt", b"x\0\0" + bomb), (b"IDAT", bomb)])
            chunks.insert(1, (kind, body))
        case 5:
            kind = rng.choice([b"PLTE", b"tRNS", b"IEND", b"IHDR", b"eXIf", b"\0\0\0\0", b"idat"])
    if at is not None and chunks:
        chunks[min(at, len(chunks) - 1)] = (kind, body)
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def change_tiff(rng: random.Random, data: bytes) -> bytes:
    """Change a field of the first directory of a TIFF."""
    if data[:4] not in (b"II*\0", b"II+\0"):
        return overwrite(rng, data)
    big = data[2] == 43
    try:
        (start,) = struct.unpack_from("<Q" if big else "<I", data, 8 if big else 4)
        (count,) = struct.unpack_from("<Q" if big else "<H", data, start)
    except struct.error:  # an earlier change has truncated it
        return overwrite(rng, data)
    entry_bytes = 20 if big else 12
    at = start + (8 if big else 2) + entry_bytes * rng.randrange(max(1, count))
    form, bits = rng.choice([("<H", 16), ("<I", 32), ("<Q", 64)])
    at += rng.choice([0, 2, 4, 8, 12] if big else [0, 2, 4, 8])
    changed = struct.pack(form, number(rng, bits))
    return data[:at] + changed + data[at + len(changed) :]


def image_cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Changed images of every format; all are planned, and one of ten is also rendered."""
    known = sample_images()
    names = sorted(known)
    # A changed image that is valid but large would take minutes to render.
    configs = [SMALL, {**SMALL, "limits": {**SMALL["limits"], "max_pixels": 10**6}}]
    for _ in range(count):
        data = known[rng.choice(names)]
        changes: list[Mutate] = [*BYTES, resize_claims, resize_claims]
        changes += [change_png] * 4 if data.startswith(b"\x89PNG") else []
        changes += [change_tiff] * 4 if data.startswith(b"II") else []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            data = rng.choice(changes)(rng, data)
        if rng.random() < 0.05:
            data = cut(rng, data) + drop(rng, known[rng.choice(names)])
        role, other = rng.choice([("content.png", "style.png"), ("style.png", "content.png")])
        then_run = rng.random() < 0.1
        files = {"c.yaml": yaml.safe_dump(configs[then_run]).encode(), role: data, other: known["png"]}
        yield Case("picture", files, then_run=then_run)


# --- weights ---


def weights() -> dict[str, torch.Tensor]:
    generator, state, channels = torch.Generator().manual_seed(0), {}, 3
    for index, name in enumerate(CONV_NAMES):
        width = 4 if index < 2 else 8
        state[f"{name}.weight"] = torch.randn(width, channels, 3, 3, generator=generator)
        state[f"{name}.bias"] = torch.zeros(width)
        channels = width
    return state


def saved(new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights(), buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def change_header(rng: random.Random, data: bytes) -> bytes:
    """Change the header of a .safetensors file and adjust its length."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
    wild: list[Any] = [None, True, -1, 1.5, 10**30, "x", [], {}, [[[]]], number(rng, 32), float("nan")]
    match rng.randrange(5):
        case 0:
            entry[rng.choice(["shape", "dtype", "data_offsets", "more"])] = rng.choice(wild)
        case 1:
            numbers = entry[rng.choice(["shape", "data_offsets"])]
            numbers[rng.randrange(len(numbers))] = rng.choice(wild)
        case 2:
            header[rng.choice(["conv1_1.weight", "__metadata__", "x" * 5000, "\x1b[2J\n"])] = rng.choice(wild)
        case 3:
            entry["shape"] = [number(rng, 16) for _ in range(rng.randrange(9))]
        case 4:
            header.pop(rng.choice(sorted(header)))
    text = json.dumps(header).encode()
    text = rng.choice(BYTES)(rng, text) if rng.random() < 0.2 else text
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def change_zip(rng: random.Random, data: bytes) -> bytes:
    """Change one member of a .pth zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        chosen = rng.choice([*old.namelist(), *[name for name in old.namelist() if name.endswith("data.pkl")] * 5])
        for info in old.infolist():
            part = old.read(info)
            if info.filename == chosen:
                part = rng.choice([*BYTES, change_pickle, change_pickle])(rng, part)
            new.writestr(info.filename, part, rng.choice([zipfile.ZIP_STORED] * 20 + [zipfile.ZIP_DEFLATED]))
    return buffer.getvalue()


def change_pickle(rng: random.Random, data: bytes) -> bytes:
    """Insert pickle opcodes, some of them calls."""
    calls = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nTensor\n", b"cbuiltins\nbytearray\n", b"ctorch\nSize\n"]
    numbers = [b"J" + struct.pack("<i", number(rng, 31)), b"K\xff", b"\x8a\x08" + struct.pack("<Q", number(rng, 63))]
    steps = [
        *calls,
        *numbers,
        b"(",
        b")",
        b"t",
        b"\x85",
        b"R",
        b"b",
        b"Q",
        b"}",
        b"]",
        b"N",
        b"X\xff\xff\xff\x7f",
        b".",
    ]
    at = rng.randrange(2, max(3, len(data)))
    return (
        data[:at]
        + b"".join(rng.choice(steps) for _ in range(rng.randint(1, 6)))
        + data[at + rng.choice([0, 0, 1, 5]) :]
    )


def weights_cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Changed weights files in the formats of torch and safetensors."""
    image = sample_images()["png"]
    tensors, zipped, old = save(weights()), saved(True), saved(False)
    for _ in range(count):
        name, data, changes = rng.choice(
            [
                ("w.safetensors", tensors, [change_header, change_header, change_header, *BYTES]),
                ("w.pth", zipped, [change_zip, change_zip, change_zip, *BYTES]),
                ("w.pth", old, [change_pickle, change_pickle, *BYTES]),
            ]
        )
        data = rng.choice(changes)(rng, data)
        if rng.random() < 0.05:
            name = rng.choice(["w.pth", "w.safetensors"])
        config = {**SMALL, "network": {**SMALL["network"], "name": "vgg19", "weights": name}}
        files = {"c.yaml": yaml.safe_dump(config).encode(), "content.png": image, "style.png": image, name: data}
        yield Case("weights", files, then_run=rng.random() < 0.1)
