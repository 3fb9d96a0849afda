"""Reads what `tokenflow tokenize` wrote for training in PyTorch, in random order (`pip install torch`).

    tokenflow tokenize photos -o codes
    python examples/train_on_codes.py codes

Shards are shuffled, then their rows in a buffer: no more is in memory. The ranks of torchrun and the workers share them.
"""

import argparse
import os
import random
import sys
from collections.abc import Iterator

from tokenflow_sdk import TokenFlowError, read_codes
from tokenflow_sdk.dataset.reading import code_shards

try:
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info
except ModuleNotFoundError:
    sys.exit("error: PyTorch is not installed. Run `pip install torch`.")


class ShuffledCodes(IterableDataset[torch.Tensor]):
    """The codes of a job's pictures, int64 [L] each, in an order of the epoch. For DDP, count steps: ranks get unequal rows."""

    def __init__(self, path: str, buffer: int = 10_000) -> None:
        self.files, self.buffer, self.epoch = code_shards(path), buffer, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        readers, reader = workers * int(os.environ.get("WORLD_SIZE", 1)), own + workers * int(os.environ.get("RANK", 0))
        files = random.Random(self.epoch).sample(self.files, len(self.files))  # noqa: S311 - the same for all readers
        order, rows = random.Random(f"{self.epoch} {reader}"), list[torch.Tensor]()  # noqa: S311
        for _, codes in read_codes(files, rank=reader, world_size=readers):
            rows.append(torch.as_tensor(codes, dtype=torch.int64))  # by DLPack, a copy
            if len(rows) > self.buffer:
                yield rows.pop(order.randrange(len(rows)))
        yield from order.sample(rows, len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", help="the output of `tokenflow tokenize`, a directory or an address")
    parser.add_argument("--workers", type=int, default=2, help="processes that read")
    arguments = parser.parse_args()
    data = ShuffledCodes(arguments.codes)
    for data.epoch in range(2):
        for batch in DataLoader(data, batch_size=32, num_workers=arguments.workers):
            print(f"epoch {data.epoch}: codes {list(batch.shape)}")  # in the place of a step of training


if __name__ == "__main__":
    try:
        main()
    except (TokenFlowError, RuntimeError) as error:
        sys.exit(f"error: {str(error).splitlines()[-1]}")  # those of other processes are tracebacks, with it as last line
