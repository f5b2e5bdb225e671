import numpy as np

from tmm.layout import KeyInfo, StepRecord, Table
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
