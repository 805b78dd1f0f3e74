import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.engine.pages import PageAllocator


@given(st.integers(2, 40), st.data())
def test_a_page_is_out_or_in_and_never_both(pages, data):
    allocator = PageAllocator(pages)
    out: list[tuple[int, ...]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if out and data.draw(st.booleans()):
            allocator.free(out.pop(data.draw(st.integers(0, len(out) - 1))))
        else:
            out.append(allocator.allocate(data.draw(st.integers(0, allocator.free_pages))))
        taken = [page for block in out for page in block]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(1, pages))
        assert allocator.free_pages + len(taken) == pages - 1


def test_the_null_page_is_never_handed_out():
    assert sorted(PageAllocator(5).allocate(4)) == [1, 2, 3, 4]


def test_asking_for_more_than_is_free_takes_nothing():
    allocator = PageAllocator(4)
    with pytest.raises(ValueError, match="asked for 4 pages, legal is 0 to 3"):
        allocator.allocate(4)
    assert allocator.free_pages == 3


@pytest.mark.parametrize("page", [0, 4, -1])
def test_a_foreign_page_is_refused(page):
    allocator = PageAllocator(4)
    allocator.allocate(3)
    with pytest.raises(ValueError, match=f"page {page} does not belong"):
        allocator.free([page])


def test_a_page_freed_twice_is_refused():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.free(pages)
    with pytest.raises(ValueError, match=f"page {pages[0]} is already free"):
        allocator.free(pages)
    assert allocator.free_pages == 3


def test_a_pool_without_a_page_to_give_is_refused():
    with pytest.raises(ValueError, match="found 1, legal is at least 2"):
        PageAllocator(1)
