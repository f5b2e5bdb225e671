"""Segments as they lie in their files, read without HDF5."""

import os

import h5py
import numpy as np
import pytest

from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runtime.store.hdf5_bytes import FileBytes, checksum, checksums
from tmm.runtime.store.hdf5_chunks import chunks_of_array, chunks_of_tree
from tmm.runtime.store.hdf5_objects import read_layout, read_root
from tmm.runtime.store.segment_file import SegmentFile
from tmm.runtime.store.segment_reader import SegmentReader
from tmm.runtime.store.segment_writer import SegmentWriter

SUPERBLOCK = 48  # bytes


def write(folder, steps):
    """A segment of ``steps`` steps, and what its superblock was before the first one."""
    infos = tuple(KeyInfo(f"k/{i}", "k", str(i), i, "mean") for i in range(100))
    writer = SegmentWriter(folder, keys=100)
    before = writer.path.read_bytes()[:SUPERBLOCK]
    for step in range(steps):
        writer.write(StepRecord(step, (Table(infos, np.full(100, step + 0.5)),)))
    writer.close()
    return writer.path, before


def test_a_superblock_that_lags_behind_hides_nothing(tmp_path):
    """As where a writer was killed before it came to write the superblock."""
    path, before = write(tmp_path, 50)
    whole = path.read_bytes()
    assert whole[:SUPERBLOCK] != before
    path.write_bytes(before + whole[SUPERBLOCK:])
    reader = SegmentReader(path)
    assert reader.series("k/99")[1].tolist() == [step + 0.5 for step in range(50)]
    reader.close()


def test_a_file_shorter_than_it_says_is_read_as_far_as_it_is_committed(tmp_path):
    path, _ = write(tmp_path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])  # of which the chunk of ``steps`` is the last
    reader = SegmentReader(path)
    assert reader.steps.tolist() == [0]
    assert reader.series("k/99")[1].tolist() == [0.5]
    reader.close()


@pytest.mark.parametrize("size", [1, 3, 4, 11, 12, 13, 23, 24, 25, 44, 264, 2000])
def test_checksums_are_those_of_hdf5(size):
    """Of one block and of many, whatever the length; 44 bytes are those of a superblock."""
    blocks = np.random.default_rng(size).integers(0, 256, (5, size), dtype=np.uint8)
    assert checksums(blocks).tolist() == [checksum(block.tobytes()) for block in blocks]
    changed = blocks.copy()
    changed[:, size // 2] ^= 1
    assert not np.isin(checksums(changed), checksums(blocks)).any()


def test_the_checksum_of_a_superblock(tmp_path):
    path, _ = write(tmp_path, 1)
    begin = path.read_bytes()[:SUPERBLOCK]
    assert checksum(begin[:44]) == int.from_bytes(begin[44:], "little")


def chunks_by_h5py(path, name):
    """The addresses of chunks by their places."""
    found = {}
    with h5py.File(path, "r") as file:
        size = file[name].chunks

        def note(chunk):
            place = tuple(offset // n for offset, n in zip(chunk.chunk_offset, size, strict=True))
            found[place] = chunk.byte_offset

        file[name].id.chunk_iter(note)
    return found


def chunks_by_tmm(path, name, first, last):
    file = FileBytes(path)
    try:
        layout = read_layout(file, read_root(file).objects[name])
        find = {4: chunks_of_array, 5: chunks_of_tree}[layout.index]
        found = find(file, layout.address, len(layout.shape), first, last)
    finally:
        file.close()
    places = map(tuple, found.places.tolist())
    return dict(zip(places, found.addresses.tolist(), strict=True))


@pytest.mark.parametrize(
    ("shape", "chunk", "some"),
    [
        # An array: in its index, its first blocks, blocks of further levels, and pages.
        *(((n,), (1,), None) for n in (1, 4, 5, 20, 21, 52, 53, 300, 5000)),
        ((3_000_000,), (1,), 300),
        ((1500, 10), (7, 10), None),
        # A tree: one leaf, many, and two levels above the leaves.
        ((3, 3), (1, 1), None),
        ((10, 30), (1, 1), None),
        ((2, 100), (1, 7), None),
        ((80, 80), (1, 1), None),
        ((2000, 2000), (1, 1), 4000),
        ((20, 15, 10), (3, 2, 5), None),
    ],
)
def test_chunks_lie_where_hdf5_finds_them(tmp_path, shape, chunk, some):
    path = tmp_path / "file.h5"
    is_of_fixed_width = chunk[1:] == shape[1:] != ()
    grows = (None, *shape[1:]) if is_of_fixed_width else (None,) * len(shape)
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        values = file.create_dataset("x", shape, "u1", maxshape=grows, chunks=chunk)
        places = [range(0, end, size) for end, size in zip(shape, chunk, strict=True)]
        if some is None:
            values[...] = 1
        else:
            rng = np.random.default_rng(0)
            for _ in range(some):
                values[tuple(place[int(rng.integers(len(place)))] for place in places)] = 1
    expected = chunks_by_h5py(path, "x")
    last = len(places[0]) - 1
    for begin, end in ((0, last), (0, 0), (last // 3, last // 2), (last, last)):
        assert chunks_by_tmm(path, "x", begin, end) == {
            place: address for place, address in expected.items() if begin <= place[0] <= end
        }


def test_parts_are_read_as_h5py_reads_them(tmp_path):
    """Over the borders of chunks, and with chunks that were never written."""
    keys = [
        tuple(KeyInfo(f"{name}/{i}", "k", str(i), i, "mean") for i in range(150)) for name in "ab"
    ]
    bins = (KeyInfo("h", "k", "h", 0, "mean"),)
    writer = SegmentWriter(tmp_path, keys=100, bins=5)
    rng = np.random.default_rng(0)
    for step in range(100):
        infos = keys[step // 60]
        some = infos if step % 2 else infos[:70]
        histograms = (Table(bins, rng.standard_normal((1, 5))),) if step % 3 else ()
        writer.write(StepRecord(step, (Table(some, rng.standard_normal(len(some))),), histograms))
    writer.close()
    file = SegmentFile(writer.path)
    with h5py.File(writer.path, "r") as other:
        for name in ("values", "histograms", "commits"):
            whole = other[name][()]
            assert file.shape(name) == whole.shape
            for rows in (slice(0, len(whole)), slice(31, 33), slice(len(whole) - 1, len(whole))):
                width = whole.shape[1]
                for columns in (slice(0, width), slice(width // 2, width // 2 + 1)):
                    part = file.read(name, rows, columns)
                    assert part.tobytes() == whole[rows, columns].tobytes()
        for column in (0, 63, 64, 299):
            of_column = file.column("values", 90, column)
            assert of_column.tobytes() == other["values"][:90, column].tobytes()
        for name in ("keys", "events", "steps"):
            assert np.array_equal(file.read(name, slice(0, len(other[name]))), other[name][:])
    with pytest.raises(ValueError, match="shape"):
        file.read("values", slice(0, 101), slice(0, 1))
    file.close()


def test_what_was_never_asked_for_before_is_seen_at_once(tmp_path):
    """A step more is noticed without reading the file anew where there is none."""
    path, _ = write(tmp_path, 2)
    reader = SegmentReader(path)
    os.utime(path)  # it may just have been written to
    assert not reader.refresh()
    writer = SegmentWriter(tmp_path, keys=1)
    infos = (KeyInfo("k", "k", "k", 0, "mean"),)
    live = SegmentReader(writer.path)
    for step in range(600):  # over the borders of the chunks of steps and commits
        writer.write(StepRecord(step, (Table(infos, np.array([step + 0.5])),)))
        assert live.refresh()
        assert not live.refresh()
        assert live.row(step) == {"k": step + 0.5}
    writer.close()
    live.close()
