import pytest
import torch
from torch import tensor

from trainers.data import PreferenceCollator

PAD = 99


def rows():
    return [
        {"prompt_ids": [5, 6, 7, 8], "response_ids": [[1], [2, 3]], "scores": [1.5, -1.0]},
        {"prompt_ids": [9], "response_ids": [[4, 4, 4], [5], [6, 7]], "scores": [0.0, 2.0, 1.0]},
    ]


def with_column(name, values):
    return [{**row, name: value} for row, value in zip(rows(), values, strict=True)]


def collate(rows, **kwargs):
    return PreferenceCollator(PAD, **kwargs)(rows)


def assert_equal(actual, expected):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_exact_tensors_with_ragged_k_and_lengths():
    batch = collate(rows())
    expected = {
        "prompt_ids": tensor([[5, 6, 7, 8], [9, PAD, PAD, PAD]]),
        "prompt_mask": tensor([[True, True, True, True], [True, False, False, False]]),
        "response_ids": tensor([[[1, PAD, PAD], [2, 3, PAD], [PAD] * 3], [[4, 4, 4], [5, PAD, PAD], [6, 7, PAD]]]),
        "response_mask": tensor([[[1, 0, 0], [1, 1, 0], [0, 0, 0]], [[1, 1, 1], [1, 0, 0], [1, 1, 0]]]).bool(),
        "mask": tensor([[True, True, False], [True, True, True]]),
        "scores": tensor([[1.5, -1.0, 0.0], [0.0, 2.0, 1.0]]),
    }
    assert list(batch) == list(expected)
    for name, value in expected.items():
        assert_equal(batch[name], value)


def test_pad_token_inside_the_data_is_not_masked():
    data = rows()
    data[0]["prompt_ids"][1] = PAD
    data[0]["response_ids"][1][0] = PAD
    batch = collate(data)
    assert batch["prompt_mask"][0].all()
    assert_equal(batch["response_mask"][0, 1], tensor([True, True, False]))


def test_tokens_that_are_not_trained_on_leave_the_mask_and_stay_in_the_response():
    data = rows()
    data[1]["assistant_masks"] = [[False, True, False], [True], [False, True]]
    plain, batch = collate(rows()), collate(data, pad_to_multiple_of=4)
    expected = [[[1, 0, 0, 0], [1, 1, 0, 0], [0] * 4], [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]]
    assert_equal(batch["response_mask"], tensor(expected).bool())
    assert_equal(batch["response_ids"][..., :3], plain["response_ids"])
    assert_equal(batch["mask"], plain["mask"])
    data[0]["assistant_masks"] = None
    assert_equal(collate(data)["response_mask"], batch["response_mask"][..., :3])


@pytest.mark.parametrize(
    "marks", [[[True], [True]], [[True], [False, False]], [[True, False], [True, True]], [True, False]]
)
def test_marks_that_do_not_fit_the_tokens_or_leave_none_are_refused(marks):
    first, second = rows()
    with pytest.raises(ValueError, match="'assistant_masks' must mark at least one token of each response"):
        collate([first | {"assistant_masks": marks}, second])


def test_pad_to_multiple_of_rounds_prompt_and_response_lengths_only():
    batch = collate(rows(), pad_to_multiple_of=4)
    assert batch["prompt_ids"].shape == (2, 4)
    assert batch["response_ids"].shape == batch["response_mask"].shape == (2, 3, 4)
    assert_equal(batch["response_ids"][1, 0], tensor([4, 4, 4, PAD]))
    assert collate(rows(), pad_to_multiple_of=8)["prompt_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 7], tensor([3, 7])),
        ([0.25, 1], tensor([0.25, 1.0])),
        ([True, False], tensor([True, False])),
        ([0.5, None], tensor([0.5, float("nan")])),
        ([[1.0, 2.0], [3, 4, 5]], tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])),
        ([[1.0, None], [3, 4, 5]], tensor([[1.0, float("nan"), 0.0], [3.0, 4.0, 5.0]])),
        (
            [[[1.0], [2.0, 3.0]], [[4, 5, 6], [7], [8, 9]]],
            tensor([[[1.0, 0, 0], [2, 3, 0], [0, 0, 0]], [[4, 5, 6], [7, 0, 0], [8, 9, 0]]]),
        ),
    ],
    ids=["int", "float", "bool", "missing", "per response", "one missing", "per token"],
)
def test_further_columns(values, expected):
    assert_equal(collate(with_column("extra", values), columns=("extra",))["extra"], expected)


@pytest.mark.parametrize("values", [["anna", "bert"], [None, "bert"], [None, None], [["m", "n"], ["o", "p", "q"]]])
def test_text_is_left_out(values):
    assert "annotator" not in collate(with_column("annotator", values), columns=("annotator",))


@pytest.mark.parametrize("change", [{"scores": [1.0, 2.0]}, {"response_ids": [[1], [], [2]]}, {"prompt_ids": []}])
def test_row_that_does_not_fit_is_refused(change):
    first, second = rows()
    with pytest.raises(ValueError, match="no tokens, or not one score per response"):
        collate([first, {**second, **change}])


def test_a_column_that_only_some_rows_have_or_with_the_name_of_a_mask_is_refused():
    first, second = rows()
    with pytest.raises(KeyError, match="weight"):
        collate([first, {**second, "weight": 1.0}])
    with pytest.raises(ValueError, match="name of a mask"):
        collate(rows(), columns=("mask",))


@pytest.mark.parametrize("values", [[[1.0, 2.0], [1.0, 2.0]], [[[1.0], [2.0]], [[1.0], [1.0], [1.0]]]])
def test_column_that_fits_neither_responses_nor_tokens_is_refused(values):
    with pytest.raises(ValueError, match="column 'extra' holds lists that fit neither"):
        collate(with_column("extra", values), columns=("extra",))


def test_docstring_example_holds():
    import doctest

    import trainers.data.collator as module

    result = doctest.testmod(module)
    assert result.attempted >= 5 and result.failed == 0
