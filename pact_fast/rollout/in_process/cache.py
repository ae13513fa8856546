"""Pages of keys and values, shared by every row whose tokens begin alike.

A page holds the keys and values of PAGE tokens, all layers. Full pages are nodes of a trie: a page is known
by the page before it and its own tokens, so equal prefixes are one page however many rows use it. Pages are
counted by reference; one that nobody uses any more stays findable until its place is needed, least recently
used first. There is a root a namespace (salt) and weight version: after `forget` no page that was filled
before is ever found again.

    root -> [system prompt] -> [system prompt] -> [prompt A] -> [prompt A] -> row 0's own pages
                                                            \\-> row 1's own pages
                                               \\-> [prompt B] -> ...

A page that is not full belongs to one row. Tensors are the runner's (`KVPool`); here are only numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

PAGE = 16  # tokens


class OutOfPages(RuntimeError):
    """No page is free and none can be given up; rows must leave first."""


@dataclass(eq=False)
class PagedTokens:
    """The pages of one sequence and how far they are filled.

    pages: page numbers in order. count: tokens whose keys and values are there. node: trie node of its last
    full page that is in the trie, `indexed` pages deep.
    """

    pages: list[int] = field(default_factory=list)
    count: int = 0
    node: Hashable = 0
    indexed: int = 0


class PageTable:
    """Who holds which page. Page 0 is never given out: its tensors stay zero, padding points to it.

    Args:
        num_pages: how many there are, page 0 included; `grow` adds more.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()  # findable, held by nobody, oldest first
        self._pages: dict[tuple[Hashable, tuple[int, ...]], int] = {}  # (node above, tokens) -> page
        self._keys: list[tuple[Hashable, tuple[int, ...]] | None] = [None] * num_pages
        self._nodes = [0] * num_pages  # node of an indexed page
        self._last_node = self._epoch = 0

    @property
    def available(self) -> int:
        """Pages that can be had now, cached ones included."""
        return len(self._free) + len(self._unused)

    @property
    def unused(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Pages that rows or sessions hold."""
        return self.num_pages - 1 - self.available

    def grow(self, num_pages: int) -> None:
        more = num_pages - self.num_pages
        self._free[:0] = range(num_pages - 1, self.num_pages - 1, -1)
        self._refs += [0] * more
        self._keys += [None] * more
        self._nodes += [0] * more
        self.num_pages = num_pages

    def find(self, namespace: Hashable, tokens: Sequence[int], limit: int) -> PagedTokens:
        """The longest known prefix of at most `limit` tokens, whole pages; they are held from now on."""
        found = PagedTokens(node=(self._epoch, namespace))
        for start in range(0, limit - PAGE + 1, PAGE):
            page = self._pages.get((found.node, tuple(tokens[start : start + PAGE])))
            if page is None:
                break
            self._hold(page)
            found.pages.append(page)
            found.node = self._nodes[page]
        found.indexed = len(found.pages)
        found.count = found.indexed * PAGE
        return found

    def extend(self, sequence: PagedTokens, tokens: int) -> None:
        """Gives a sequence pages for `tokens` tokens altogether. OutOfPages, and nothing is given."""
        wanted = -(-tokens // PAGE) - len(sequence.pages)
        if wanted > self.available:
            raise OutOfPages
        for _ in range(wanted):
            if not self._free:
                oldest, _ = self._unused.popitem(last=False)
                self._unindex(oldest)
                self._free.append(oldest)
            page = self._free.pop()
            self._refs[page] = 1
            sequence.pages.append(page)

    def index(self, sequence: PagedTokens, tokens: Sequence[int]) -> None:
        """Puts the full pages of a sequence into the trie; tokens: its first `count` or more."""
        while (sequence.indexed + 1) * PAGE <= sequence.count:
            page = sequence.pages[sequence.indexed]
            start = sequence.indexed * PAGE
            key = (sequence.node, tuple(tokens[start : start + PAGE]))
            known = self._pages.get(key)
            if known is None:
                self._pages[key], self._keys[page] = page, key
                self._last_node += 1
                self._nodes[page] = self._last_node
                known = page
            elif known != page:  # another row was first: let go of ours
                self._hold(known)
                sequence.pages[sequence.indexed] = known
                self._release_page(page)
            sequence.node = self._nodes[known]
            sequence.indexed += 1

    def release(self, sequence: PagedTokens) -> None:
        """Lets all pages go, last ones first: what hangs below in the trie leaves before what is above."""
        for page in reversed(sequence.pages):
            self._release_page(page)
        sequence.pages, sequence.count, sequence.indexed = [], 0, 0

    def discard(self, sequence: PagedTokens) -> list[int]:
        """Lets go and makes unfindable what only this sequence holds; -> those pages, to be wiped."""
        own = [page for page in sequence.pages if self._refs[page] == 1]
        for page in own:
            self._unindex(page)
        self.release(sequence)
        return own

    def forget(self) -> None:
        """Nothing that is cached now is found again; pages that rows hold stay theirs."""
        self._free.extend(self._unused)
        self._unused.clear()
        self._pages.clear()
        self._keys = [None] * self.num_pages
        self._epoch += 1

    def _hold(self, page: int) -> None:
        if self._refs[page] == 0:
            del self._unused[page]
        self._refs[page] += 1

    def _release_page(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page] == 0:
            if self._keys[page] is not None:
                self._unused[page] = None
            else:
                self._free.append(page)

    def _unindex(self, page: int) -> None:
        key, self._keys[page] = self._keys[page], None
        if key is not None:
            del self._pages[key]
