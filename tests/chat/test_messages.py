"""Every way of writing a conversation becomes one shape; what is none is named, with its place and the remedy."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vlm_sft.chat.messages import Conversation, check_turns, count_images, normalise, split_turns, text_of

A, B = object(), object()  # images pass through untouched, whatever they are


def part(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def talk(*contents: Any, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, Any]]:
    return [{"role": roles[n % len(roles)], "content": content} for n, content in enumerate(contents)]


def written(conversation: Conversation) -> list[tuple[str, list[Any]]]:
    """(role, parts), where a part is its text or None for an image."""
    return [(m["role"], [p.get("text") for p in m["content"]]) for m in conversation.messages]


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ([part("image"), part("text", text="What?")], [A]),
        ([part("image"), part("text", text="What?")], A),
        ([part("image"), part("text", text="What?")], [[A]]),
        ([part("image"), part("text", text="What?")], (A,)),
        ([part("image", index=0, text=None), part("text", text="What?", index=None)], [A]),
        ([part("image", image=A), part("text", text="What?", image=None)], None),
        ([part("image", image=A), part("text", text="What?")], []),
        ("What?", [A]),  # TRL's format: images in front of the first question
    ],
)
def test_one_image_in_many_spellings(content: Any, images: Any) -> None:
    messages = talk(content, "A cat.")
    before = copy.deepcopy([m["role"] for m in messages]), len(messages[0]["content"])
    conversation = normalise(messages, images)
    assert written(conversation) == [("user", [None, "What?"]), ("assistant", ["A cat."])]
    assert conversation.images == [A]
    assert all(
        part.keys() == {"type", "text"} or part == {"type": "image"} for part in conversation.messages[0]["content"]
    )
    assert ([m["role"] for m in messages], len(messages[0]["content"])) == before


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ((0, 1), [A, B]),
        ((1, 0), [B, A]),
        ((0, 0, 1), [A, A, B]),
        ((None, None), [A, B]),
        ((1, 0, None), [B, A, "C"]),
        ((1, None, 0), [B, "C", A]),
    ],
)
def test_images_by_index_or_in_order(indices: tuple[int | None, ...], expected: list[Any]) -> None:
    pool = [A, B, "C"][: max(2, len(set(indices)))]
    parts = [part("image") | ({} if index is None else {"index": index}) for index in indices]
    assert normalise(talk(parts, "Yes."), pool).images == expected


def test_an_image_inside_a_part_stands_where_the_part_does() -> None:
    parts = [part("image"), part("image", image=B), part("image")]
    assert normalise(talk(parts, "Yes."), [A, "C"]).images == [A, B, "C"]


def test_images_of_plain_strings_go_to_the_first_question() -> None:
    messages = talk(
        "Be brief.", "What?", "That.", "And?", "This.", roles=("system", "user", "assistant", "user", "assistant")
    )
    assert written(normalise(messages, [A, B]))[:2] == [("system", ["Be brief."]), ("user", [None, None, "What?"])]


def test_a_part_in_any_message_turns_that_off() -> None:
    with pytest.raises(ValueError, match=r"2 images but the messages hold 1 image parts; add {'type': 'image'}"):
        normalise(talk("What?", "That.", [part("image")], "This."), [A, B])


def test_the_argument_is_left_as_it_is() -> None:
    messages = talk([part("image", index=0, text=None), part("text", text="a", index=None)], "b")
    before = copy.deepcopy(messages)
    result = normalise(messages, [A])
    result.messages[0]["content"].clear()
    assert messages == before


def test_opting_out_is_kept() -> None:
    messages = talk("a", "b")
    messages[1]["train"] = False
    messages[0]["train"] = None
    first, second = normalise(messages).messages
    assert "train" not in first
    assert second["train"] is False


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        (None, None, "`messages` is None; expected a list"),
        ("[]", None, r"`messages` is a str; .*parse JSON strings first"),
        ({"role": "user"}, None, "`messages` is a dict"),
        ([], None, "`messages` is empty"),
        (["hi"], None, r"messages\[0\] is a str; expected a dict with role, content, train"),
        (talk(None, "b"), None, r"messages\[0\] has a content that is None"),
        (talk(7, "b"), None, r"messages\[0\] has a content that is a int"),
        (talk(part("text", text="a"), "b"), None, r"messages\[0\] has a content that is a dict"),
        (
            [{"role": "human", "content": "a"}],
            None,
            r"messages\[0\] has the role 'human'; expected one of system, user",
        ),
        ([{"content": "a"}], None, "has the role None"),
        (talk("a", "b", roles=("user", "critic")), None, r"messages\[1\] has the role 'critic'"),
        (
            [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}],
            None,
            r"messages\[0\].content\[0\] has the keys path, which no .*: rename 'path' to 'image'$",
        ),
        ([{"role": "user", "content": "a", "train": "no"}], None, "'train': 'no'; expected true or false"),
        ([{"role": "user", "content": "a", "name": "x"}], None, r"messages\[0\] has the keys name, which no template"),
        (talk([["a"]], "b"), None, r"messages\[0\].content\[0\] is a list"),
        (
            talk([part("video")], "b"),
            None,
            r"messages\[0\].content\[0\] is a part of the kind 'video': video and sound are not",
        ),
        (talk([{"text": "a"}], "b"), None, "has the type None"),
        (talk([part("text")], "b"), None, r"content\[0\] is a text part whose text is None"),
        (talk([part("text", text=3)], "b"), None, "whose text is a int"),
        (talk([part("image", url="x")], "b"), None, "has the keys url"),
        (talk("a \ud800", "b"), None, r"messages\[0\].content\[0\] holds a lone surrogate at character 2"),
        (talk("a", "b \U000f0000"), None, r"messages\[1\].content\[0\] holds U\+F0000 at character 2"),
        (
            talk("a", [part("image"), part("text", text="b")]),
            [A],
            r"messages\[1\].content\[0\] is an image in an assistant",
        ),
        (talk([part("image")], "b"), None, r"messages\[0\].content\[0\] stands for image 0 but the row has 0 images"),
        (talk([part("image"), part("image")], "b"), [A], "stands for image 1 but the row has 1 images"),
        (talk([part("image", index=-1)], "b"), [A], "stands for image -1"),
        (talk([part("image", index="0")], "b"), [A], "stands for image 0 but"),
        (talk([part("text", text="a")], "b"), [A], "1 images but the messages hold 0 image parts"),
        (talk([part("image", index=1)], "b"), [A, B], "2 images but the messages hold 1 image parts"),
    ],
)
def test_what_is_not_a_conversation_is_named(messages: Any, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalise(messages, images)


def test_a_none_among_images_is_kept_for_whoever_opens_it() -> None:
    assert normalise(talk("a", "b"), [None]).images == [None]
    assert normalise(talk("a", "b"), None).images == []


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("sua", None),
        ("ua", None),
        ("uaua", None),
        ("u", r"messages\[0\] is from user and nothing answers it"),
        ("s", r"messages\[0\] is from system and nothing answers it"),
        ("uau", r"messages\[2\] is from user and nothing"),
        ("a", r"messages\[0\] is from assistant; expected user"),
        ("uua", r"messages\[1\] is from user; expected assistant"),
        ("uaa", r"messages\[2\] is from assistant; expected user"),
        ("usa", r"messages\[1\] is from system; expected assistant"),
        ("ssua", r"messages\[1\] is from system; expected user"),
    ],
)
def test_turns(roles: str, message: str | None) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = normalise([{"role": names[role], "content": "x"} for role in roles]).messages
    if message is None:
        check_turns(messages)
    else:
        with pytest.raises(ValueError, match=message):
            check_turns(messages)


def test_text_images_and_pieces() -> None:
    messages = [
        *talk([part("text", text="a"), part("image"), part("text", text=" b")], "c"),
        *talk([part("image"), part("text", text="d")], "e"),
    ]
    conversation = normalise(messages, [A, B])
    assert [text_of(message) for message in conversation.messages] == ["a b", "c", "d", "e"]
    assert count_images(conversation.messages) == 2
    assert [(len(piece.messages), piece.images) for piece in split_turns(conversation)] == [(2, [A]), (4, [A, B])]
