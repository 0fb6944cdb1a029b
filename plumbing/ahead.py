"""Images on disk, read once per stay in a window: the next ones while this window trains."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Ahead:
    """The images of this window and of the next, by number, as they are read in threads.

    read(i) gives image i as (uint8 (3, S, S), i). At most as many images are held as the two
    windows have.
    """

    def __init__(self, read: Callable[[int], tuple[Tensor, int]], workers: int):
        self.read, self.pool = read, ThreadPoolExecutor(max(1, workers))
        self.images: dict[int, Future] = {}

    def hold(self, window: Tensor, following: Tensor) -> None:
        """Begin to read what is missing of the images (W,) of both; what is in neither goes."""
        wanted = dict.fromkeys([*window.tolist(), *following.tolist()])  # this window's first
        self.images = {i: self.images.get(i) or self.pool.submit(self.read, i) for i in wanted}

    def holds(self, order: Tensor) -> bool:
        return all(i in self.images for i in order.tolist())

    def batches(self, numbers: Iterable[list[int]]):
        """Yields (pixels uint8 (B, 3, S, S), index (B,)); raises what read raised."""
        for batch in numbers:
            yield torch.stack([self.images[i].result()[0] for i in batch]), torch.tensor(batch)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.images = {}
