import os

import numpy as np
import pytest

from tmm.layout import KeyInfo, StepRecord, Table
from tmm.runtime.file_view import FileView
from tmm.runtime.segment import SegmentWriter
from tmm.runtime.segment_reader import SegmentReader

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


def test_a_damaged_superblock_is_left_to_hdf5(tmp_path):
    path, _ = write(tmp_path, 1)
    whole = bytearray(path.read_bytes())
    for offset in range(SUPERBLOCK):
        if offset in (9, 10):  # other sizes of addresses make it another, unlikely file
            continue
        damaged = whole.copy()
        damaged[offset] ^= 0x10
        path.write_bytes(damaged)
        with FileView(os.open(path, os.O_RDONLY)) as view:
            assert view.read(SUPERBLOCK) == bytes(damaged[:SUPERBLOCK])
    with pytest.raises(ValueError, match=path.name):
        SegmentReader(path)


def test_only_the_end_of_file_and_the_checksum_are_changed(tmp_path):
    path, _ = write(tmp_path, 3)
    whole = path.read_bytes()
    with FileView(os.open(path, os.O_RDONLY)) as view:
        seen = view.read(len(whole))
        assert seen[:28] == whole[:28]
        assert seen[28:36] != whole[28:36]
        assert seen[36:44] == whole[36:44]
        assert seen[SUPERBLOCK:] == whole[SUPERBLOCK:]
        for offset in (5, 40, 47, 48, 1000):
            view.seek(offset)
            assert view.read(30) == seen[offset : offset + 30]
            assert view.tell() == offset + 30


def test_zeros_follow_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with FileView(os.open(path, os.O_RDONLY)) as view:
        assert view.readable()
        assert view.seekable()
        assert not view.writable()
        assert view.read(5) == b"abc\0\0"
        assert view.seek(0, os.SEEK_END) > 1 << 60
        assert view.read(3) == b"\0\0\0"
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(view._descriptor)
