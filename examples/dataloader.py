"""Reads a folder of `.tfc` files as batches of codes for training in PyTorch (`pip install torch`).

    tokenflow encode photos -o codes
    python examples/dataloader.py codes

Each file says which codebook its codes are of, so that codes of two tokenizers are never mixed.
"""

import argparse
import sys
from pathlib import Path

from tokenflow_sdk import Codes, TokenFlowError

try:
    import torch
    from torch.utils.data import DataLoader, Dataset
except ModuleNotFoundError:
    sys.exit("error: PyTorch is not installed. Run `pip install torch`.")


class CodesFolder(Dataset[torch.Tensor]):
    """The files of a folder: int64 [L] each, all with every scale of one tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.tfc")) or sys.exit(f"error: {folder} has no .tfc; `tokenflow encode` writes them")
        self.first = Codes.load(self.paths[0])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        codes, first = Codes.load(self.paths[i]), self.first
        codes.require(first.variant, first.codebook_id, first.codebook_size, first.patch_nums)
        if not codes.complete:
            raise ValueError(f"{self.paths[i]} ends after {codes.n_scales} scales")
        return torch.as_tensor(codes, dtype=torch.int64)  # type: ignore[call-overload] # by DLPack, a copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="processes that read files")
    arguments = parser.parse_args()
    data = CodesFolder(arguments.folder)
    used = torch.zeros(data.first.codebook_size, dtype=torch.int64)
    for batch in DataLoader(data, arguments.batch, shuffle=True, num_workers=arguments.workers):
        scales = batch.split(data.first.scales.counts, dim=1)  # [B, 1] to [B, g * g], as a next-scale model reads them
        print(f"{list(batch.shape)} in scales of {[scale.shape[1] for scale in scales]}")
        used += torch.bincount(batch.flatten(), minlength=len(used))
    print(f"{len(data)} pictures use {int((used > 0).sum())} of {len(used)} codes")


if __name__ == "__main__":
    try:
        main()
    except (TokenFlowError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {str(error).splitlines()[-1]}")  # those of other processes are tracebacks, with it as last line
