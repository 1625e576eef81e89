"""TensorBoard's file, read back by its format: records of length, checksum, event, checksum."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from cluster.storage import Store
from pipelines.event_file import PUT_SECONDS, EventFile
from pipelines.metrics import MetricsReader, MetricsWriter
from tests.pipelines.reports import report


def masked_crc32c(data: bytes) -> int:
    """Bit by bit, as RFC 3720 defines it, and TensorFlow's mask."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(store: Store) -> list[Event]:
    (name,) = store.list()
    assert "tfevents" in name
    data, found = store.read_bytes(name), []
    while data:
        length, checksum = struct.unpack("<QI", data[:12])
        payload = data[12 : 12 + length]
        assert checksum == masked_crc32c(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(payload)
        found.append(Event.FromString(payload))
        data = data[16 + length :]
    assert found[0].file_version == "brain.Event:2"
    return found[1:]


def curve(store: Store, tag: str) -> list[tuple[int, float]]:
    return [
        (event.step, round(value.simple_value, 4))
        for event in events(store)
        for value in event.summary.value
        if value.tag == tag
    ]


def test_grows_and_begins_anew_where_the_training_goes_back(tmp_path: Path) -> None:
    metrics, board, now = Store(tmp_path / "metrics"), Store(tmp_path / "tensorboard"), [0.0]
    reader = MetricsReader(metrics)

    def train(writer: str, steps: range, loss: float) -> None:
        written = MetricsWriter(metrics, writer)
        for step in steps:
            written.write(
                report(step, loss=loss, val_loss=9.0 if step % 2 == 0 else None, expert_load={0: [0.75, 0.25]})
            )
        written.flush()

    with EventFile(board, clock=lambda: now[0]) as file:
        file.follow(reader, reader.poll())
        assert board.list() == []
        train("t1", range(1, 4), 1.0)
        file.follow(reader, reader.poll())
        assert curve(board, "loss/training") == [(1, 1.0), (2, 1.0), (3, 1.0)]
        assert curve(board, "loss/validation") == [(2, 9.0)]
        assert curve(board, "expert_load/layer_00_largest") == [(1, 1.5), (2, 1.5), (3, 1.5)]
        assert events(board)[0].wall_time > 1.7e9
        first = board.list()
        train("t2", range(4, 6), 1.0)
        file.follow(reader, reader.poll())
        assert len(events(board)) == 3  # the interval has not passed
        now[0] += PUT_SECONDS
        file.follow(reader, reader.poll())
        assert len(events(board)) == 5 and board.list() == first
        train("t3", range(3, 5), 2.0)  # from the checkpoint of step 2
        file.follow(reader, reader.poll())
        assert curve(board, "loss/training") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]

        train("t4", range(5, 8), 2.0)  # a late look: two writers at once, and the second goes back
        train("t5", range(6, 7), 4.0)
        file.follow(reader, reader.poll())
        assert curve(board, "loss/training")[3:] == [(4, 2.0), (5, 2.0), (6, 4.0)]

    # Another driver takes over: what it finds is in its file too.
    taken_over = MetricsReader(metrics)
    taken_over.skip_existing()
    with EventFile(board) as file:
        train("t6", range(5, 6), 3.0)
        file.follow(taken_over, taken_over.poll())
        file.put()
    assert curve(board, "loss/training") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 3.0)]
