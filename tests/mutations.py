"""Damage for files, from a seeded generator: bytes, JSON values, pickles, zip directories. To try another kind, write a
function from `random.Random` and the whole file to what became of it, and name it in a test of test_fuzz.py."""

import io
import itertools
import json
import pickletools
import struct
import zipfile

# what sizes, offsets and lengths are replaced by
NUMBERS = (0, 1, 2, 3, 127, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
VALUES = (
    None, True, -1, 0, 0.5, 1e-320, 1e308, float("inf"), float("nan"), 2**31, 10**18, 10**400, "", "x", "\x1b[2J",
    "\ud800", [], {}, [[]], [10**400], {"a": 1}, ["LlamaForCausalLM"], 10**9,
)  # fmt: skip


def bytes_of(random, data):
    """A few bits, bytes, numbers or stretches of it."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        place, kind = random.randrange(len(found) or 1), random.randrange(7)
        if kind < 2:
            found[place : place + 1] = bytes([(found[place : place + 1] or b"\0")[0] ^ 1 << random.randrange(8)])
        elif kind == 2:
            found[place : place + 1] = random.randbytes(1)
        elif kind == 3:
            width = random.choice((2, 4, 8))
            found[place : place + width] = (random.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 4:
            del found[place : place + random.choice((1, 8, 100))]
        elif kind == 5:
            found[place:place] = found[place : place + random.choice((1, 4, 30))] * random.choice((1, 1, 50))
        else:
            found[place : place + 64] = bytes(len(found[place : place + 64]))
    return bytes(found)


def truncated(random, data):
    return data[: random.randrange(len(data))]


def directory_of(random, data):
    """Damage in the zip's directory, its end and the local headers, where a byte means the most."""
    place = data.rindex(b"PK\x05\x06")
    (start,) = struct.unpack("<I", data[place + 16 : place + 20])
    if random.random() < 0.7:
        return data[:start] + bytes_of(random, data[start:])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        header = random.choice(archive.infolist()).header_offset
    return data[:header] + bytes_of(random, data[header : header + 40]) + data[header + 40 :]


def pickle_of(random, data):
    """Opcodes of a pickle left out, doubled, exchanged, or others in between."""
    places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    parts = [data[start:end] for start, end in itertools.pairwise(places)]
    for _ in range(random.choice((1, 1, 2, 4))):
        place, kind = random.randrange(len(parts)), random.randrange(5)
        if kind == 0:
            del parts[place]
        elif kind == 1:
            parts[place:place] = parts[place : place + random.choice((1, 3, 10))]
        elif kind == 2:
            other = random.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif kind == 3:
            parts.insert(place, bytes_of(random, parts[place]))
        else:
            parts.insert(place, random.choice(OPCODES))
        parts = parts or [b"."]
    return b"".join(parts)


OPCODES = (
    b"cos\nsystem\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nHalfStorage\n",
    b"ccollections\nOrderedDict\n", b"R", b"b", b"}b", b"}X\x07\x00\x00\x00stridesK\x01K\xff\x86sb",
    b"N}X\x06\x00\x00\x00offsetJ\xff\xff\xff\xffs\x86b", b"Q", b"(", b"t", b"0", b"1", b"2", b"\x81", b"\x92", b"o",
    b"i__main__\nA\n", b"\x82\x01", b"s", b"u", b"a", b"e", b"]", b"}", b")", b"\x85", b"\x86", b"\x87", b"K\x00",
    b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"N", b"\x88", b"r\xff\xff\xff\xff", b"h\x00",
    b"h\x05", b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x95" + b"\x00" * 8,
    b"\x94", b"\x93", b"G" + b"\xff" * 8, b"P1\n", b".",
)  # fmt: skip


def rezipped(data, change):
    """The zip with each entry's content as `change` of its name and content gives it, and right checksums."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return made.getvalue()


def json_of(random, data):
    """Values of a JSON text, or names of its objects, replaced by others."""
    value = json.loads(data)
    places = list(_places(value))
    for _ in range(random.choice((1, 1, 2))):
        holder, key = random.choice(places)
        kind = random.randrange(5)
        if kind < 3:
            holder[key] = random.choice(VALUES)
        elif kind == 3:
            other, name = random.choice(places)
            if name in (other if isinstance(other, dict) else range(len(other))):
                holder[key] = (
                    other[name] if not isinstance(other[name], dict | list) else json.loads(json.dumps(other[name]))
                )
        elif isinstance(holder, dict):
            holder.pop(key, None)
    return json.dumps(value).encode()


def _places(value):
    for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(child, dict | list):
            yield from _places(child)
