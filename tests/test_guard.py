"""Which losses the guard takes for bad steps."""

from sota_transformer.training.guard import Guard


def test_a_loss_spike_is_not_applied() -> None:
    guard = Guard()
    for i in range(40):
        assert guard.problem(5.0 + 0.1 * (i % 3), 1.0) is None
    assert guard.problem(5.9, 1.0) is None
    assert "far above the median" in str(guard.problem(6.5, 1.0))
    assert guard.bad_in_a_row == 1
    assert guard.problem(5.1, 1.0) is None
    assert guard.bad_in_a_row == 0 and guard.skipped == 1
    assert "not finite" in str(guard.problem(5.0, float("inf")))
    copy = Guard()
    copy.restore(guard.state())
    assert vars(copy) == vars(guard)


def test_where_a_spike_begins_and_what_going_back_remembers() -> None:
    """By hand: 4 and 6 in turn have the median 5 and deviate from it by 1, so 13 is no spike."""
    few, known = Guard(), Guard()
    for i in range(32):
        assert known.problem(4.0 + 2 * (i % 2), 1.0) is None
        assert i == 31 or few.problem(4.0 + 2 * (i % 2), 1.0) is None
    assert few.problem(99.0, 1.0) is None  # the 32nd
    assert known.problem(13.01, 1.0) and known.problem(-float("inf"), 1.0)
    assert (known.bad_in_a_row, known.skipped) == (2, 2)
    assert known.problem(13.0, 1.0) is None
    for rows, shift, rate in ((8, 8, 0.5), (4, 12, 0.25)):
        known.bad_in_a_row = 10
        known.go_back(rows)
        assert (known.shift, known.rate, known.bad_in_a_row, known.losses) == (shift, rate, 0, [])
    assert known.returns == 2 and known.skipped == 2
    assert all(known.problem(5.0, 1.0) is None for _ in range(300))
    assert len(known.losses) == 128


def test_batches_of_hard_text_do_not_hide_a_spike() -> None:
    """Means would: 5.36, and eight deviations of 0.4 from it."""
    guard = Guard()
    for i in range(40):
        assert guard.problem(5.9 if i % 5 < 2 else 5.0, 1.0) is None
    assert guard.problem(6.1, 1.0)
