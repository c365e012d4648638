"""Python's language reference as training text."""

from pathlib import Path

from lorakit.data import Document, python_reference, read_records, write_python_reference


def test_the_reference_is_real_text_and_whole_topics_are_held_out(tmp_path: Path) -> None:
    topics = python_reference()
    assert len(topics) > 60
    assert sum(len(topic.text) for topic in topics if isinstance(topic, Document)) > 300_000
    train, held_out = write_python_reference(tmp_path / "data", 0.1, seed=0)
    sides = [{r.text for r in read_records(path) if isinstance(r, Document)} for path in (train, held_out)]
    assert sides[0] | sides[1] == {topic.text for topic in topics if isinstance(topic, Document)}
    assert not sides[0] & sides[1]
    assert len(sides[1]) == round(0.1 * len(topics))
    again = write_python_reference(tmp_path / "again", 0.1, seed=0)
    assert [path.read_bytes() for path in again] == [train.read_bytes(), held_out.read_bytes()]
