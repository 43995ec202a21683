"""The store: what is read back, and what is refused."""

import hashlib
import json
import math

import pytest
import torch
from sweep_problems import RECORD, ROW, RUN

from experiments.store.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def lines_of(store: Store) -> list[bytes]:
    return (store.folder / "rows.jsonl").read_bytes().splitlines(keepends=True)


# rows


def test_rows_come_back_as_they_were_added(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW, ROW | {"round": 1, "test_accuracy": None}], [RECORD])
    for each in (store, Store(store.folder, create=False)):
        assert each.rows() == [ROW, ROW | {"round": 1, "test_accuracy": None}]
        assert each.records() == [RECORD]
        assert each.rounds_done(RUN) == {0, 1}
        assert each.rounds_done("another") == set()


def test_a_line_is_canonical_and_carries_the_checksum_of_itself(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [])
    (line,) = lines_of(store)
    entry = json.loads(line)
    checksum = entry.pop("checksum")
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    assert checksum == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert b'"test_accuracy":0.30000000000000004' in line
    assert line == json.dumps(json.loads(line), sort_keys=True, separators=(",", ":")).encode() + (
        b"\n"
    )


def test_what_is_read_is_the_readers_own(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [])
    store.rows()[0]["kept"] = 0
    assert store.rows() == [ROW]


def test_one_store_sees_what_another_adds(store):
    other = Store(store.folder)
    assert store.rows() == []
    with other.claim([RUN]) as lease:
        for number in range(3):
            other.add(lease, [ROW | {"round": number}], [])
            assert store.rounds_done(RUN) == set(range(number + 1))


def test_an_equal_row_is_skipped_and_another_one_refused(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [])
        store.add(lease, [ROW, ROW | {"round": 1}, ROW | {"round": 1}], [RECORD])
        before = (lines_of(store), store.records())
        changed = ROW | {"test_accuracy": 0.3, "kept": 4, "round": 1}
        message = rf"{RUN} round 1 .*kept: 3 stored, 4 now, test_accuracy: 0.3.*4 stored, 0.3 now"
        with pytest.raises(ValueError, match=message):
            store.add(lease, [ROW | {"round": 2}, changed], [RECORD])
        with pytest.raises(ValueError, match=r"round 2 .*kept: 3 stored, 4 now"):
            store.add(lease, [ROW | {"round": 2}, ROW | {"round": 2, "kept": 4}], [])
    assert (lines_of(store), store.records()) == before
    assert len(before[0]) == 2


def test_a_row_of_which_later_code_says_more_is_the_same_row(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [])
        store.add(lease, [ROW | {"added_later": 3}], [])
        assert store.rows() == [ROW]
        less = {name: value for name, value in ROW.items() if name != "test_accuracy"}
        with pytest.raises(ValueError, match=r"test_accuracy: .* stored, None now"):
            store.add(lease, [less | {"added_later": 3}], [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value, store):
    with store.claim([RUN]) as lease, pytest.raises(ValueError, match="not JSON compliant"):
        store.add(lease, [ROW, ROW | {"round": 1, "test_accuracy": value}], [])
    assert store.rows() == []


def test_a_torn_last_line_is_cut_off_and_kept_beside(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [RECORD])
        whole = lines_of(store)
        with (store.folder / "rows.jsonl").open("ab") as file:
            file.write(b'{"checksum":"12')
        assert store.rows() == Store(store.folder).rows() == [ROW]
        store.add(lease, [ROW | {"round": 1}], [])
    assert lines_of(store)[:1] == whole
    assert Store(store.folder).rounds_done(RUN) == {0, 1}
    assert (store.folder / "rows.jsonl.torn").read_bytes() == b'{"checksum":"12'


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b'"kept":3', b'"kept":4'),
        lambda line: line[:30] + b"\n",
        lambda line: b"\n",
        lambda line: b"\xff\r{}\n",
        lambda line: b"[1]\n",
        lambda line: b"<<<<<<< HEAD\n",
        lambda line: b"[" * 100_000 + b"\n",
    ],
)
def test_a_changed_line_in_the_middle_is_reported_by_number_and_not_used(change, store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW | {"round": number} for number in range(3)], [])
        first, middle, last = lines_of(store)
        (store.folder / "rows.jsonl").write_bytes(first + change(middle) + last)
        again = Store(store.folder)
        with pytest.warns(UserWarning, match=r"rows.jsonl line 2 is not as it was written"):
            assert again.rounds_done(RUN) == {0, 2}
        again.add(lease, [ROW | {"round": 1}], [])  # so it is computed again
    with pytest.warns(UserWarning, match="line 2"):
        assert sorted(row["round"] for row in Store(store.folder).rows()) == [0, 1, 2]


def test_lines_of_two_machines_can_be_joined(store, tmp_path):
    other = Store(tmp_path / "other")
    for each, kept in ((store, 3), (other, 4)):
        with each.claim([RUN]) as lease:
            each.add(lease, [ROW, ROW | {"round": 1, "kept": kept}], [])
    joined = b"".join(lines_of(store) + lines_of(other))
    (store.folder / "rows.jsonl").write_bytes(joined)
    with pytest.warns(UserWarning, match="line 4 contradicts .*kept: 3 stored, 4 now"):
        assert store.rows() == [ROW, ROW | {"round": 1}]


def test_a_file_put_in_its_place_is_read_from_its_start(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW | {"round": number} for number in range(3)], [])
    lines = lines_of(store)
    assert len(store.rows()) == 3
    new = store.folder / "new"
    new.write_bytes(lines[2] + lines[1])
    new.replace(store.folder / "rows.jsonl")
    assert [row["round"] for row in store.rows()] == [2, 1]
    (store.folder / "rows.jsonl").unlink()
    assert store.rows() == []


# what is no store, or not ours


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2}', "is of format 2, this version reads format 1: give another folder"),
        ('{"format": 1', "is not that of a store"),
        ("[]", "is not that of a store"),
        ("[" * 100_000, "is not that of a store"),
    ],
)
def test_another_format_is_refused_and_left_alone(content, message, tmp_path):
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]
    assert (tmp_path / "store.json").read_text() == content


def test_results_without_store_json_are_left_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds results but no store\.json"):
        Store(tmp_path)


def test_reading_makes_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no store of results"):
        Store(tmp_path / "none", create=False)
    assert not list(tmp_path.iterdir())


# checkpoints


def test_checkpoints_come_back(store):
    tensors = {
        "transposed": torch.randn(3, 4).t(),
        "view": torch.arange(10)[2:5],
        "mask": torch.tensor([True, False]),
        "half": torch.randn(2).bfloat16(),
        "scalar": torch.tensor(0.1),
        "empty": torch.empty(0, 3),
    }
    tensors["same"] = tensors["view"]
    assert store.load(RUN) is None
    with store.claim([RUN]) as lease:
        for number in range(2):
            store.save(lease, RUN, tensors, {"round": number, "at": [0.1, None]})
        found, metadata = store.load(RUN)
        assert metadata == store.metadata(RUN) == {"round": 1, "at": [0.1, None]}
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
        store.discard(lease, RUN)
        store.discard(lease, RUN)
    assert store.load(RUN) is None
    assert store.metadata(RUN) is None


def test_a_broken_checkpoint_is_reported_and_not_used(store):
    with store.claim([RUN]) as lease:
        store.save(lease, RUN, {"w": torch.ones(5)}, {"round": 1})
    path = store.folder / "checkpoints" / f"{RUN}.safetensors"
    content = path.read_bytes()
    flipped = [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in (0, 20, -1)]
    for broken in (b"", content[:7], content[:60], content[:-1], *flipped):
        path.write_bytes(broken)
        with pytest.warns(UserWarning, match="is broken"):
            assert store.load(RUN) is None
        assert store.metadata(RUN) in (None, {"round": 1})  # it does not read the tensors
