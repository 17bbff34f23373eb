"""Time in questions: what is understood, how the ambiguous is read, and what must be left alone."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.query.when import Range, When, understand
from streamvid.toy.questions import WORDINGS

HOUR = 3600.0


def read(question: str, *, stop: float = HOUR, start: float = 0.0, origin: datetime | None = None) -> When:
    return understand(question, start=start, stop=stop, origin=origin)


@pytest.mark.parametrize(
    ("question", "ranges"),
    [
        ("what happens between 10:00 and 10:15?", [(600, 615)]),
        ("what happens from 1:30 to 2:00?", [(90, 120)]),
        ("describe 1:30-2:00", [(90, 120)]),
        ("who speaks between 10 and 20 seconds?", [(10, 20)]),
        ("from 1 to 2 minutes, what changes?", [(60, 120)]),
        ("who is there at 12:34?", [(753, 755)]),
        ("what is at the 2 minute mark?", [(119, 121)]),
        ("what happens around 2 minutes?", [(108, 132)]),
        ("what happens around 10 seconds?", [(5, 15)]),
        ("what happens in the first minute?", [(0, 60)]),
        ("what happens in the last 30 seconds?", [(3570, 3600)]),
        ("how many cars pass in the first half?", [(0, 1800)]),
        ("what happens during the last quarter of the video?", [(2700, 3600)]),
        ("what happens in the first two minutes?", [(0, 120)]),
        ("what happens after 5:00?", [(300, 3600)]),
        ("what happens after 1 minute and 30 seconds?", [(90, 3600)]),
        ("what happened before 0:59:00?", [(0, 3540)]),
        ("who is seen in the beginning?", [(0, 360)]),
        ("what is shown at the end of the video?", [(3240, 3600)]),
        ("what happens at 1:00 and at 3:00?", [(59, 61), (179, 181)]),
        ("what happens after 5:00 and before 6:00?", [(300, 360)]),
        ("in the first 10 minutes, what happens after 9:30?", [(570, 600)]),
    ],
)
def test_explicit_times_become_ranges(question: str, ranges: list[Range]) -> None:
    understood = read(question)
    assert list(understood.ranges) == ranges
    assert all(word in question for word in understood.words)


@pytest.mark.parametrize(
    "question",
    [
        "what happens?",
        "what comes after the red circle?",
        "what happens before the circle?",
        "which shape comes first?",
        "what is the last shape?",
        "who stands at the end of the street?",
        "what is at the start of the race?",
        "who wins in the end?",
        "is the video about 2 minutes long?",
        "how many people are between 2 and 3 cars?",
        "does the light stay on for 30 seconds?",
        "after 5 people came in, who left?",
        "is the score 3:2?",
        "did they win 10:15?",
        "at 5 o'clock position, what is there?",
        "what is the first minute hand doing?",
        "how far from 3 houses to 4 trees?",
        *(w.format(name="red circle", shape="circle", color="red") for kind in WORDINGS.values() for w in kind),
    ],
)
def test_what_only_sounds_like_time_is_left_alone(question: str) -> None:
    """Every wording of the toy world is here: its answers cannot have changed."""
    assert understand(question, start=0, stop=HOUR, find=lambda name: (10.0, 20.0)) == When()


def test_ten_hundred_is_minutes_where_the_video_is_long_enough() -> None:
    assert read("what is at 10:00?", stop=HOUR).ranges == ((599, 601),)
    assert read("what is at 10:00?", stop=9 * HOUR).notes == ()
    day = read("what is at 10:00?", stop=12 * HOUR)
    assert day.ranges == ((599, 601),)
    assert "write 10:00:00 for hours" in day.notes[0]


def test_the_second_time_of_a_pair_is_of_the_kind_of_the_first() -> None:
    understood = read("what happens between 1:00:00 and 1:30?", stop=3 * HOUR)
    assert understood.ranges == ((3600, 5400),)
    assert "hours and minutes, like 1:00:00" in understood.notes[0]


def test_two_fields_beyond_the_video_stay_minutes_and_leave_it() -> None:
    """Nothing is remembered there, and the answer has to say so: the range must not be bent into the video."""
    assert read("what is at 10:00?", stop=60.0).ranges == ((599, 601),)
    assert read("what happens between 2:00 and 3:00?", stop=60.0).ranges == ((120, 180),)
    assert read("what happens after 2:00?", stop=60.0).ranges == ((120, 121),)
    assert read("what happens before 0:30?", start=60.0).ranges == ((0, 30),)


def test_time_on_the_wall_where_the_origin_is_known() -> None:
    noon = datetime(2026, 5, 1, 12, 0, 0)
    at = read("who came at 14:05?", stop=6 * HOUR, origin=noon)
    assert at.ranges == ((2 * HOUR + 299, 2 * HOUR + 301),)
    assert "on the wall" in at.notes[0]
    assert read("who came at 2:05 pm?", stop=6 * HOUR, origin=noon).ranges == at.ranges
    assert read("who came at 14:05?", stop=HOUR, origin=noon).ranges == ((844, 846),), "not watched then: 14 minutes"


def test_time_on_the_wall_after_midnight() -> None:
    late = datetime(2026, 5, 1, 23, 0, 0)
    assert read("who came between 1:00 and 1:30?", stop=4 * HOUR, origin=late).ranges == ((2 * HOUR, 2.5 * HOUR),)


def test_time_on_the_wall_without_an_origin_is_not_used_and_says_so() -> None:
    understood = read("who came at 2:05 pm?")
    assert not understood
    assert "on the wall" in understood.unused[0]


@pytest.mark.parametrize(
    ("question", "name", "ranges"),
    [
        ("what happens before the red circle appears?", "the red circle", [(0, 20)]),
        ("what is there after the blue square leaves?", "the blue square", [(10, 60)]),
        ("what comes in after the dog appears?", "the dog", [(10, 60)]),
        ("what happens until my neighbour's car arrives?", "my neighbour's car", [(0, 20)]),
    ],
)
def test_events_are_looked_up_and_kept_in_view(question: str, name: str, ranges: list[Range]) -> None:
    asked = []

    def find(event: str) -> Range:
        asked.append(event)
        return 10.0, 20.0

    understood = understand(question, start=0, stop=60, find=find)
    assert asked == [name]
    assert list(understood.ranges) == ranges
    assert "00:10-00:20" in understood.notes[0]


def test_an_event_that_is_not_found_filters_nothing_and_says_so() -> None:
    understood = understand("what is there before the cat appears?", start=0, stop=60, find=lambda name: None)
    assert not understood
    assert "'the cat' was not found" in understood.unused[0]


def test_times_that_exclude_each_other_filter_nothing_and_say_so() -> None:
    understood = read("what happens after 5:00 and before 4:00?")
    assert not understood
    assert "exclude each other" in understood.unused[0]


def test_a_range_written_backwards_is_read_and_noted() -> None:
    understood = read("what happens between 2:00 and 1:00?")
    assert understood.ranges == ((60, 120),)
    assert "other way round" in understood.notes[-1]


def test_what_was_watched_may_start_late() -> None:
    assert read("what is in the first minute?", start=100, stop=400).ranges == ((100, 160),)
    assert read("what is before 3:00?", start=100, stop=400).ranges == ((100, 180),)


@given(first=st.integers(0, 3599), length=st.integers(1, 600), stop=st.integers(1, 8000), words=st.sampled_from("bfd"))
@settings(max_examples=80, deadline=None)
def test_ranges_are_half_open_sorted_and_as_said(first: int, length: int, stop: int, words: str) -> None:
    a, b = (f"{s // 60}:{s % 60:02}" for s in (first, first + length))
    question = {"b": f"between {a} and {b}", "f": f"from {a} to {b}", "d": f"{a}-{b}"}[words]
    ranges = understand(f"what happens {question}?", start=0, stop=float(stop)).ranges
    assert len(ranges) == 1
    start, end = ranges[0]
    assert start < end
    if first < stop:
        assert ranges == ((first, min(first + length, stop)),)
    else:
        assert start >= stop, "beyond the video stays beyond"


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_is_read_without_trouble(text: str) -> None:
    for start, stop in understand(text, start=0, stop=100, find=lambda name: (1.0, 2.0)).ranges:
        assert start < stop


NOON = datetime(2026, 3, 4, 12, tzinfo=UTC)
DAY = 24 * HOUR


@pytest.mark.parametrize(
    "question, ranges",
    [
        ("what is in the picture right now?", ((20 * HOUR - 10, 20 * HOUR),)),
        ("who is there now?", ((20 * HOUR - 10, 20 * HOUR),)),
        ("who came ten minutes ago?", ((20 * HOUR - 660, 20 * HOUR - 540),)),
        ("what happened an hour ago?", ((19 * HOUR - 300, 19 * HOUR + 300),)),
        ("what happened 20 seconds ago?", ((20 * HOUR - 25, 20 * HOUR - 15),)),
        ("who came in the past hour?", ((19 * HOUR, 20 * HOUR),)),
        ("who came in in the last ten minutes?", ((20 * HOUR - 600, 20 * HOUR),)),
        ("who came today?", ((12 * HOUR, 20 * HOUR),)),
        ("who came this morning?", ((17 * HOUR, 20 * HOUR),)),
        ("who came yesterday?", ((0, 12 * HOUR),)),
        ("who came yesterday afternoon?", ((0, 6 * HOUR),)),
        ("who came last night?", ((8 * HOUR, 18 * HOUR),)),
        ("who came at 14:05 yesterday?", ((2 * HOUR + 299, 2 * HOUR + 301),)),
        ("who came yesterday between 14:00 and 15:00?", ((2 * HOUR, 3 * HOUR),)),
        ("who came at 7:30?", ((19.5 * HOUR - 1, 19.5 * HOUR + 1),)),
        ("has the dog left by now?", ()),
        ("what happened until now?", ()),
        ("now what does the dog do?", ()),
    ],
)
def test_a_live_source_is_asked_about_from_now_backwards(
    question: str, ranges: tuple[tuple[float, float], ...]
) -> None:
    """Watched since noon, twenty hours ago: it is eight in the morning of the next day."""
    assert read(question, stop=20 * HOUR, origin=NOON).ranges == ranges


def test_a_film_has_no_now() -> None:
    for question in ("what is there right now?", "what happened ten minutes ago?", "who came yesterday?"):
        assert not read(question, stop=20 * HOUR)


def test_of_several_days_the_latest_such_time_is_meant() -> None:
    """After three days, 14:05 is today's; before 14:05 it is yesterday's."""
    afternoon = read("who came at 14:05?", stop=3 * DAY + 3 * HOUR, origin=NOON)
    assert afternoon.ranges == ((3 * DAY + 2 * HOUR + 299, 3 * DAY + 2 * HOUR + 301),)
    at_noon = read("who came at 14:05?", stop=3 * DAY, origin=NOON)
    assert at_noon.ranges == ((2 * DAY + 2 * HOUR + 299, 2 * DAY + 2 * HOUR + 301),)
