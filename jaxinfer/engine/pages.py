"""The free list of the KV pages of one data shard."""

from collections.abc import Iterable


class PageAllocator:
    """Hands out the pages 1 .. pages-1 of one shard's pool; page 0 is the null page and never leaves the pool.

    Every operation costs O(1) per page. Pages come out in an order that depends only on the calls made so far, because
    every process runs its own copy and all copies must agree.
    """

    def __init__(self, pages: int):
        if pages < 2:
            raise ValueError(f"pages: found {pages}, legal is at least 2 (page 0 is the null page)")
        self.pages = pages
        self._free = list(range(pages - 1, 0, -1))
        self._taken = bytearray(pages)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Takes `count` pages out of the pool. Raises ValueError when there are fewer: callers look at free_pages."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"asked for {count} pages, legal is 0 to {len(self._free)} (the free pages)")
        taken = tuple(self._free.pop() for _ in range(count))
        for page in taken:
            self._taken[page] = 1
        return taken

    def free(self, pages: Iterable[int]) -> None:
        """Gives pages back. Raises ValueError for a page that is not taken (freed twice, or never this pool's)."""
        for page in pages:
            if not 0 < page < self.pages:
                raise ValueError(f"page {page} does not belong to this pool, legal is 1 to {self.pages - 1}")
            if not self._taken[page]:
                raise ValueError(f"page {page} is already free")
            self._taken[page] = 0
            self._free.append(page)
